defmodule DSPex.PythonBridge.Monitor do
  @moduledoc """
  Pings a bridge's peer at an interval, and restarts it when it does not answer.

  After `:max_failures` missed pings in a row the monitor has the bridge replace its peer at once
  (`DSPex.PythonBridge.Bridge.restart/1` would let it finish its work first), and counts from 0 again. It starts nothing
  itself. A peer that is busy with LM calls answers pings.

  Only a peer that serves can miss a ping that counts. While a peer starts, the bridge keeps its time itself
  (`:start_timeout`): such a miss makes the health `:unhealthy`, and nothing else. An `:overloaded` reply says nothing
  about the peer and changes nothing.

  A bridge in a pool also reports a call that was given up, by its caller's timeout or death, while the peer has sent
  nothing since. Then the monitor pings at once, and again each fifth of the timeout until an answer comes, without
  waiting for the pings before: each has its full timeout, but `:max_failures` of them are missed within 8 s instead of
  minutes (with the defaults). As soon as the peer sends anything, these misses do not count any longer: the pings
  waited behind what the peer had not read yet.

  A peer answers a ping with an error if code of your own has blocked its event loop for 5 s. That is a miss, too.

  Options, with defaults from `config :dspex, :python_bridge_monitor`:

  | option | default | what |
  | --- | --- | --- |
  | `:name` | `DSPex.PythonBridge.Monitor` | how the monitor is registered; nil for not at all |
  | `:bridge` | `DSPex.PythonBridge.Bridge` | the bridge to monitor |
  | `:interval` | 30 000 ms | from the end of one check to the next |
  | `:timeout` | 5 000 ms | for the answer to a ping |
  | `:max_failures` | 3 | misses in a row until a restart |

  Health is a map:

    * `:status` – `:healthy` or `:unhealthy` by the last check, `:unknown` before the first
    * `:failures` – misses in a row that count towards a restart
    * `:last_check` – when the last check ended, a UTC `DateTime`, or nil
    * `:checks` – how many checks there were
    * `:success_rate` – the part of them that was answered, 0.0 to 1.0
    * `:response_ms` – `:last`, `:p50`, `:p99` of the last 1000 answers, in ms; nil before the first
  """

  use GenServer

  require Logger

  alias DSPex.PythonBridge.{Bridge, Options, Telemetry}
  alias DSPex.PythonBridge.Bridge.{Health, Server}
  alias DSPex.PythonBridge.Options.Table

  # check: the monitor of the regular check that runs, since `started`; waiting: callers who forced it; next: those who
  # asked meanwhile, and get a check of their own. timer: of the next check. doubt: the timer of the next ping in doubt;
  # ask_again?: whether there is reason for one. pings: when those in doubt were sent, by their monitors; outdated: those
  # of them since which the peer has sent something.
  @enforce_keys [:options]
  defstruct [:options, :check, :started, :timer, :doubt, health: %Health{}] ++
              [waiting: [], next: [], pings: %{}, outdated: %{}, ask_again?: false]

  @type health :: %{
          status: :healthy | :unhealthy | :unknown,
          failures: non_neg_integer(),
          last_check: DateTime.t() | nil,
          checks: non_neg_integer(),
          success_rate: float(),
          response_ms: %{last: float() | nil, p50: float() | nil, p99: float() | nil}
        }

  ## Interface

  @doc """
  Starts a monitor; the first check comes after one interval. A wrong option gives `{:error, %ArgumentError{}}` with
  a message that names it.
  """
  @spec start_link(keyword()) :: GenServer.on_start() | {:error, Exception.t()}
  def start_link(opts \\ []) do
    with {:ok, options} <- options(opts) do
      name = if options.name, do: [name: options.name], else: []
      GenServer.start_link(__MODULE__, options, name)
    end
  end

  @doc """
  The health by the checks so far; answered at once, also while a check runs.

  As the other functions here, it raises an `ArgumentError` if the process is not a monitor, and exits if there
  is none.
  """
  @spec get_health_status(GenServer.server()) :: health()
  def get_health_status(monitor \\ __MODULE__), do: ask(monitor, :health, 5_000)

  @doc """
  Makes a check now, which counts like any other, and returns the health after it. It waits at most the
  monitor's timeout, and for a check that is running.
  """
  @spec force_health_check(GenServer.server()) :: health()
  def force_health_check(monitor \\ __MODULE__), do: ask(monitor, :check, :infinity)

  @doc "Forgets all checks so far: the health is as before the first."
  @spec reset_stats(GenServer.server()) :: :ok
  def reset_stats(monitor \\ __MODULE__), do: ask(monitor, :reset, 5_000)

  # A process of another kind may end by a call that it does not know; a supervisor does. On this node the function
  # that it began with shows its kind; on another, its answer.
  defp ask(monitor, question, timeout) do
    pid = GenServer.whereis(monitor)

    with false <- is_pid(pid) and node(pid) == node() and another?(pid),
         answer when answer != {:error, :unknown_call} <-
           GenServer.call(monitor, question, timeout) do
      answer
    else
      _another -> raise ArgumentError, "#{inspect(monitor)} is not a monitor of a bridge"
    end
  end

  # If it has just ended, the call exits.
  defp another?(pid) do
    Process.alive?(pid) and
      not match?({__MODULE__, :init, _arity}, :proc_lib.translate_initial_call(pid))
  end

  @doc """
  The options with their defaults, or the error that names the wrong one.

      iex> {:ok, options} = DSPex.PythonBridge.Monitor.options(interval: 10_000)
      iex> {options.interval, options.timeout, options.max_failures}
      {10000, 5000, 3}
  """
  @spec options(keyword()) :: {:ok, map()} | {:error, Exception.t()}
  def options(opts \\ []) do
    table = [
      name: {{:test, &Options.name?/1, "an atom, {:global, _} or {:via, …}"}, __MODULE__},
      bridge: {{:test, &server?/1, "the name or the pid of a bridge"}, Bridge},
      interval: {:ms, 30_000},
      timeout: {:ms, 5_000},
      max_failures: {:positive, 3}
    ]

    with {:ok, opts} <- Table.check(opts, table, "python bridge monitor", :python_bridge_monitor),
         do: {:ok, Map.new(opts)}
  end

  defp server?(bridge),
    do: bridge != nil and (is_atom(bridge) or is_pid(bridge) or is_tuple(bridge))

  ## The process

  @impl GenServer
  def init(options), do: {:ok, schedule(%__MODULE__{options: options})}

  @impl GenServer
  def handle_call(:health, _from, state), do: {:reply, Health.report(state.health), state}
  def handle_call(:reset, _from, state), do: {:reply, :ok, %{state | health: %Health{}}}

  def handle_call(:check, from, %{check: nil} = state),
    do: {:noreply, start_check(%{state | waiting: [from]})}

  def handle_call(:check, from, state), do: {:noreply, %{state | next: [from | state.next]}}
  def handle_call(_stray, _from, state), do: {:reply, {:error, :unknown_call}, state}

  # Both come from a bridge in a pool.
  @impl GenServer
  def handle_cast(:unanswered, %{doubt: nil} = state), do: {:noreply, ping_in_doubt(state)}
  def handle_cast(:unanswered, state), do: {:noreply, %{state | ask_again?: true}}

  # Answers to the pings are still awaited: only they show that the peer is healthy again.
  def handle_cast(:heard, state) do
    outdated = Map.merge(state.outdated, state.pings)
    state = %{state | ask_again?: false, pings: %{}, outdated: outdated}
    {:noreply, %{state | health: Health.heard(state.health)}}
  end

  def handle_cast(_stray, state), do: {:noreply, state}

  @impl GenServer
  def handle_info({:timeout, timer, :check}, %{timer: timer, check: nil} = state),
    do: {:noreply, start_check(state)}

  # A check runs in a process of its own, and exits with its result.
  def handle_info({:DOWN, check, :process, _pid, result}, %{check: check} = state)
      when is_reference(check) do
    state = checked(%{state | check: nil}, result, state.started, false)
    Enum.each(state.waiting, &GenServer.reply(&1, Health.report(state.health)))

    case state.next do
      [] -> {:noreply, schedule(%{state | waiting: []})}
      next -> {:noreply, start_check(%{state | waiting: next, next: []})}
    end
  end

  def handle_info({:DOWN, ping, :process, _pid, result}, state)
      when is_map_key(state.pings, ping) do
    {sent, pings} = Map.pop!(state.pings, ping)
    state = checked_in_doubt(%{state | pings: pings}, result, sent)
    # The others only count while all are missed.
    all_missed? = missed?(result) and state.health.failures > 0
    {:noreply, if(all_missed?, do: state, else: forget_pings(state))}
  end

  def handle_info({:DOWN, ping, :process, _pid, result}, state)
      when is_map_key(state.outdated, ping) do
    {sent, outdated} = Map.pop!(state.outdated, ping)
    state = %{state | outdated: outdated}

    cond do
      blocked?(result) -> {:noreply, checked_in_doubt(state, result, sent)}
      missed?(result) -> {:noreply, state}
      true -> {:noreply, state |> checked(result, sent, true) |> forget_pings()}
    end
  end

  def handle_info({:timeout, timer, :doubt}, %{doubt: timer} = state) do
    state = %{state | doubt: nil}
    again? = state.ask_again? or state.pings != %{}
    {:noreply, if(again?, do: ping_in_doubt(state), else: state)}
  end

  # A timer that was cancelled too late.
  def handle_info({:timeout, _timer, :check}, state), do: {:noreply, state}
  def handle_info(_stray, state), do: {:noreply, state}

  ## Pings

  defp schedule(state),
    do: %{state | timer: :erlang.start_timer(state.options.interval, self(), :check)}

  defp start_check(state) do
    # The next check comes one interval after a forced one.
    if state.timer, do: :erlang.cancel_timer(state.timer, async: true, info: false)
    check = start_ping(state.options)
    %{state | check: check, started: System.monotonic_time(), timer: nil}
  end

  defp ping_in_doubt(%{options: options} = state) do
    pings = Map.put(state.pings, start_ping(options), System.monotonic_time())
    timer = :erlang.start_timer(max(div(options.timeout, 5), 1), self(), :doubt)
    %{state | doubt: timer, ask_again?: false, pings: pings}
  end

  defp forget_pings(state) do
    for {ping, _sent} <- Map.merge(state.pings, state.outdated),
        do: Process.demonitor(ping, [:flush])

    %{state | pings: %{}, outdated: %{}}
  end

  defp start_ping(%{bridge: bridge, timeout: timeout}) do
    {_pid, monitor} = spawn_monitor(fn -> exit({:checked, ping(bridge, timeout)}) end)
    monitor
  end

  defp ping(bridge, timeout) do
    started = System.monotonic_time(:microsecond)

    case Bridge.call(bridge, :ping, %{}, timeout) do
      {:ok, _pong} -> {:answered, (System.monotonic_time(:microsecond) - started) / 1000}
      {:error, :overloaded} -> :overloaded
      {:error, reason} -> {:missed, reason, Bridge.get_status(bridge)}
    end
  end

  ## Results

  # An error is an answer: it counts, whatever else the peer sends, and the next ping comes without another such call.
  defp checked_in_doubt(state, result, sent) do
    blocked? = blocked?(result)
    state = checked(state, result, sent, not blocked?)
    %{state | ask_again?: state.ask_again? or (blocked? and state.health.failures > 0)}
  end

  # The peer's event loop is blocked, as it says itself.
  defp blocked?({:checked, {:missed, reason, %{state: :running}}}), do: not is_atom(reason)
  defp blocked?(_answered_or_silent), do: false

  defp missed?({:checked, {:missed, _reason, %{state: :running}}}), do: true
  defp missed?(_answered_or_other), do: false

  defp checked(state, result, started, in_doubt?) do
    health = count(Health.checked(state.health), result, in_doubt?, state.options)
    metadata = %{bridge: state.options.bridge, result: name(result), failures: health.failures}
    duration = System.monotonic_time() - started
    Telemetry.execute([:monitor, :check], %{duration: duration}, metadata)
    %{state | health: restart_if_due(health, state.options, result)}
  end

  defp count(health, {:checked, {:answered, ms}}, _in_doubt?, _options),
    do: Health.answered(health, ms)

  defp count(health, {:checked, {:missed, reason, status}}, in_doubt?, %{bridge: bridge}) do
    # A bridge that is not running counts, too, although there is nothing to restart.
    counts? = status.state == :running or reason == :bridge_not_running

    health =
      if counts?,
        do: Health.missed(health, status.os_pid, in_doubt?),
        else: Health.unhealthy(health)

    Logger.warning(
      "monitor of bridge #{inspect(bridge)}, Python process #{status.os_pid || "none"}: " <>
        "no answer to a ping (#{describe(reason)}), " <>
        if(counts?, do: "#{health.failures} in a row", else: "the bridge is #{status.state}"),
      bridge: bridge,
      os_pid: status.os_pid
    )

    health
  end

  defp count(health, {:checked, :overloaded}, _in_doubt?, _options), do: health

  # The check itself crashed, which no peer can cause.
  defp count(health, _crash, _in_doubt?, _options), do: Health.unhealthy(health)

  # A peer's error text may have contents of a request.
  defp describe(reason) when is_atom(reason), do: reason
  defp describe(_text), do: "an error"

  defp name({:checked, {:answered, _ms}}), do: :ok
  defp name({:checked, {:missed, reason, _status}}) when is_atom(reason), do: reason
  defp name({:checked, :overloaded}), do: :overloaded
  defp name(_error_text_or_crash), do: :error

  # From a process of its own: the monitor does not wait for the bridge.
  defp restart_if_due(%{failures: failures} = health, %{max_failures: most} = options, result)
       when failures >= most do
    gone? = match?({:checked, {:missed, :bridge_not_running, _status}}, result)
    unless gone?, do: spawn(fn -> Server.replace(options.bridge) end)
    Health.recovered(health)
  end

  defp restart_if_due(health, _options, _result), do: health
end
