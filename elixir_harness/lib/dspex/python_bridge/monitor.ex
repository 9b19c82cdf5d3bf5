defmodule DSPex.PythonBridge.Monitor do
  @moduledoc """
  Asks a bridge's peer regularly whether it still answers, and has it replaced when it does not.

  A check is a `ping` with a timeout. After `:max_failures` misses in a row the monitor has
  the bridge replace its peer (at once: `DSPex.PythonBridge.Bridge.restart/1` would have it finish its
  work first); it starts nothing itself, and counts from 0 again. A peer
  busy with LM calls answers pings, so it is left alone.

  Only what a restart may mend counts as a failure: a miss of a peer that serves. While one starts, the
  bridge itself keeps its time (`:start_timeout`) and makes the attempts: such a miss makes the health `:unhealthy` and leads to nothing. An answer that too
  many calls wait (`:overloaded`) says nothing of the peer's health and leaves it as it was.

  The monitor of a pool's bridge is told when a call was given up, by its caller's timeout or death, and
  the peer has sent nothing since. It then asks at once, and again each fifth of the timeout until an answer comes, without
  waiting for the earlier ones: each has its full timeout, but `:max_failures` of them are missed within
  8 s instead of minutes (with the defaults), and the peer is replaced. As soon as the peer sends anything, the doubt is
  over and its misses do not count: they were of pings that waited behind what the peer had not read yet.

  Options, with defaults from `config :dspex, :python_bridge_monitor`:

  | option | default | what |
  | --- | --- | --- |
  | `:name` | `DSPex.PythonBridge.Monitor` | how the monitor is registered; nil for not at all |
  | `:bridge` | `DSPex.PythonBridge.Bridge` | the bridge to watch |
  | `:interval` | 30 000 ms | from the end of one check to the next |
  | `:timeout` | 5 000 ms | for the answer to a ping |
  | `:max_failures` | 3 | misses in a row until a restart |

  Health is a map:

    * `:status` – `:healthy` or `:unhealthy` by the last check, `:unknown` before the first
    * `:failures` – misses in a row that count towards a restart
    * `:last_check` – when the last check ended, a UTC `DateTime`, or nil
    * `:checks` – how many there were
    * `:success_rate` – the part of them that was answered, 0.0 to 1.0
    * `:response_ms` – `:last`, `:p50`, `:p99` of the last 1000 answers, in ms; nil before the first
  """

  use GenServer
  use DSPex.PythonBridge.OTP.ServerGuard

  require Logger

  alias DSPex.PythonBridge.{Bridge, Options, Telemetry}
  alias DSPex.PythonBridge.Bridge.Server
  alias DSPex.PythonBridge.OTP.ServerGuard

  @defaults %{
    name: __MODULE__,
    bridge: Bridge,
    interval: 30_000,
    timeout: 5_000,
    max_failures: 3
  }

  @window 1_000

  @no_stats %{
    status: :unknown,
    failures: 0,
    doubted: 0,
    missed: nil,
    last_check: nil,
    checks: 0,
    answered: 0,
    response_times: []
  }

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
  Starts a monitor; the first check comes after one interval. An option that cannot be right gives
  `{:error, %ArgumentError{}}` with a text that names it.
  """
  @spec start_link(keyword()) :: GenServer.on_start() | {:error, Exception.t()}
  def start_link(opts \\ []) do
    with {:ok, options} <- options(opts) do
      GenServer.start_link(
        __MODULE__,
        options,
        if(options.name, do: [name: options.name], else: [])
      )
    end
  end

  @doc """
  How the peer is, by the checks so far; answered at once, also while a check runs.

  As the other functions here, it raises an `ArgumentError` if the process is not a monitor, and exits if there
  is none.
  """
  @spec get_health_status(GenServer.server()) :: health()
  def get_health_status(monitor \\ __MODULE__), do: ask(monitor, :health, 5_000)

  @doc """
  Makes a check now, which counts like any other, and gives the health after it. Waits at most the
  monitor's timeout for it, and for a check that is under way.
  """
  @spec force_health_check(GenServer.server()) :: health()
  def force_health_check(monitor \\ __MODULE__), do: ask(monitor, :check, :infinity)

  @doc "Forgets all checks so far: the health is as before the first."
  @spec reset_stats(GenServer.server()) :: :ok
  def reset_stats(monitor \\ __MODULE__), do: ask(monitor, :reset, 5_000)

  # A process of another kind may end by a call that it does not know, a supervisor would. Here it can be told
  # by the function that it began with; of another node, by its answer.
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

  # One that has just ended is for the call to tell.
  defp another?(pid) do
    Process.alive?(pid) and
      not match?({__MODULE__, :init, _arity}, :proc_lib.translate_initial_call(pid))
  end

  @doc """
  The options in full, or the error that names the one that cannot be right.

      iex> {:ok, options} = DSPex.PythonBridge.Monitor.options(interval: 10_000)
      iex> {options.interval, options.timeout, options.max_failures}
      {10000, 5000, 3}
  """
  @spec options(keyword()) :: {:ok, map()} | {:error, Exception.t()}
  def options(opts \\ []) do
    config = Application.get_env(:dspex, :python_bridge_monitor, [])

    text =
      cond do
        not Keyword.keyword?(config) -> "config: expected a keyword list"
        not Keyword.keyword?(opts) -> "options: expected a keyword list"
        true -> Enum.find_value(Keyword.merge(config, opts), &refusal/1)
      end

    if text,
      do: {:error, ArgumentError.exception("python bridge monitor: " <> text)},
      else: {:ok, @defaults |> Map.merge(Map.new(config)) |> Map.merge(Map.new(opts))}
  end

  defp refusal({:name, name}) when is_atom(name) or is_tuple(name), do: nil
  defp refusal({:bridge, bridge}) when is_atom(bridge) and bridge != nil, do: nil
  defp refusal({:bridge, bridge}) when is_pid(bridge) or is_tuple(bridge), do: nil
  defp refusal({:max_failures, n}) when is_integer(n) and n > 0, do: nil

  defp refusal({key, ms}) when key in [:interval, :timeout] and ms in 1..4_294_967_295, do: nil

  defp refusal({key, value}) when key in [:interval, :timeout],
    do: "#{inspect(key)}: expected a positive number of milliseconds, got #{inspect(value)}"

  defp refusal({key, value}) when is_map_key(@defaults, key),
    do: "#{inspect(key)}: #{inspect(value)} is not accepted"

  defp refusal({key, _value}), do: Options.unknown(key, [:name | Map.keys(@defaults)])

  ## The process

  @impl GenServer
  def init(options) do
    # check: the monitor of the one that runs, since started; waiting: who asked for it; next: who
    # asked meanwhile and gets a check of their own. doubt: the timer of the next ping that may be due,
    # pings: when those in doubt were sent, by their monitors, told?: whether there is need of another;
    # outdated: pings since which the peer has sent something. doubted: how many of the failures were of pings.
    state = Map.merge(@no_stats, %{options: options, check: nil, waiting: [], next: []})
    state = Map.merge(state, %{doubt: nil, pings: %{}, outdated: %{}, told?: false})
    {:ok, schedule(Map.merge(state, %{timer: nil, started: nil}))}
  end

  @impl GenServer
  def handle_call(:health, _from, state), do: {:reply, health(state), state}
  def handle_call(:reset, _from, state), do: {:reply, :ok, Map.merge(state, @no_stats)}

  def handle_call(:check, from, %{check: nil} = state),
    do: {:noreply, start_check(%{state | waiting: [from]})}

  def handle_call(:check, from, state), do: {:noreply, %{state | next: [from | state.next]}}

  def handle_call(question, from, state) do
    ServerGuard.drop({:"$gen_call", from, question}, __MODULE__)
    {:noreply, state}
  end

  # Both from the bridge, if that is a pool's.
  @impl GenServer
  def handle_cast(:unanswered, %{doubt: nil} = state), do: {:noreply, ask_again(state)}
  def handle_cast(:unanswered, state), do: {:noreply, %{state | told?: true}}

  # Their answers are still welcome: nothing else tells that the peer is healthy again.
  def handle_cast(:heard, state) do
    outdated = Map.merge(state.outdated, state.pings)
    failures = state.failures - state.doubted
    state = %{state | told?: false, pings: %{}, outdated: outdated}
    {:noreply, %{state | failures: failures, doubted: 0}}
  end

  def handle_cast(message, state), do: drop(message, state)

  @impl GenServer
  def handle_info({:timeout, timer, :check}, %{timer: timer, check: nil} = state),
    do: {:noreply, start_check(state)}

  # The check ran in a process of its own; its exit reason is what it found.
  def handle_info({:DOWN, check, :process, _pid, reason}, %{check: check} = state)
      when is_reference(check) do
    state = checked(%{state | check: nil}, reason, state.started, 0)
    Enum.each(state.waiting, &GenServer.reply(&1, health(state)))

    case state.next do
      [] -> {:noreply, schedule(%{state | waiting: []})}
      next -> {:noreply, start_check(%{state | waiting: next, next: []})}
    end
  end

  def handle_info({:DOWN, ping, :process, _pid, reason}, state)
      when is_map_key(state.pings, ping) do
    {sent, pings} = Map.pop!(state.pings, ping)
    state = checked(%{state | pings: pings}, reason, sent, 1)
    # Only as long as all are missed.
    {:noreply, if(missed?(reason) and state.failures > 0, do: state, else: forget_pings(state))}
  end

  def handle_info({:DOWN, ping, :process, _pid, reason}, state)
      when is_map_key(state.outdated, ping) do
    {sent, outdated} = Map.pop!(state.outdated, ping)
    state = %{state | outdated: outdated}

    if missed?(reason),
      do: {:noreply, state},
      else: {:noreply, state |> checked(reason, sent, 1) |> forget_pings()}
  end

  def handle_info({:timeout, timer, :doubt}, %{doubt: timer} = state) do
    state = %{state | doubt: nil}
    {:noreply, if(state.told? or state.pings != %{}, do: ask_again(state), else: state)}
  end

  # Of a timer that was cancelled too late.
  def handle_info({:timeout, _timer, :check}, state), do: {:noreply, state}
  def handle_info(message, state), do: drop(message, state)

  defp drop(message, state) do
    ServerGuard.drop(message, __MODULE__)
    {:noreply, state}
  end

  defp ask_again(%{options: options} = state) do
    {_pid, ping} = start_ping(options)
    timer = :erlang.start_timer(max(div(options.timeout, 5), 1), self(), :doubt)
    pings = Map.put(state.pings, ping, System.monotonic_time())
    %{state | doubt: timer, told?: false, pings: pings}
  end

  defp forget_pings(state) do
    for pings <- [state.pings, state.outdated],
        {ping, _sent} <- pings,
        do: Process.demonitor(ping, [:flush])

    %{state | pings: %{}, outdated: %{}}
  end

  defp missed?({:checked, {:missed, _reason, %{state: :running}}}), do: true
  defp missed?(_answered_or_else), do: false

  # in_doubt: 1 for a ping in doubt, 0 for a regular check.
  defp checked(state, reason, started, in_doubt) do
    state = %{state | last_check: DateTime.utc_now(), checks: state.checks + 1}
    state = count(state, reason, in_doubt)
    tell(state, reason, started)
    restart_if_due(state, reason)
  end

  defp schedule(state),
    do: %{state | timer: :erlang.start_timer(state.options.interval, self(), :check)}

  defp start_check(state) do
    # Of a forced check: the next comes one interval after it.
    if state.timer, do: :erlang.cancel_timer(state.timer, async: true, info: false)
    {_pid, check} = start_ping(state.options)
    %{state | check: check, started: System.monotonic_time(), timer: nil}
  end

  defp start_ping(%{bridge: bridge, timeout: timeout}),
    do: spawn_monitor(fn -> exit({:checked, check(bridge, timeout)}) end)

  defp check(bridge, timeout) do
    started = System.monotonic_time(:microsecond)

    case Bridge.call(bridge, :ping, %{}, timeout) do
      {:ok, _pong} -> {:answered, (System.monotonic_time(:microsecond) - started) / 1000}
      {:error, :overloaded} -> :overloaded
      {:error, reason} -> {:missed, reason, Bridge.get_status(bridge)}
    end
  end

  defp count(state, {:checked, {:answered, ms}}, _in_doubt) do
    times = Enum.take([ms | state.response_times], @window)
    state = %{state | status: :healthy, failures: 0, doubted: 0, response_times: times}
    %{state | answered: state.answered + 1}
  end

  defp count(state, {:checked, {:missed, reason, bridge_status}}, in_doubt) do
    # A bridge that is not there is counted, too, but there is nothing that could be restarted.
    counts? = bridge_status.state == :running or reason == :bridge_not_running
    # Those of a peer that has been replaced meanwhile are not its successor's.
    same? = bridge_status.os_pid == state.missed
    {so_far, doubted} = if same?, do: {state.failures, state.doubted}, else: {0, 0}
    failures = if counts?, do: so_far + 1, else: state.failures

    state =
      if counts?,
        do: %{state | missed: bridge_status.os_pid, doubted: doubted + in_doubt},
        else: state

    Logger.warning(
      "monitor of bridge #{inspect(state.options.bridge)}, Python process " <>
        "#{bridge_status.os_pid || "none"}: no answer to a ping (#{describe(reason)}), " <>
        if(counts?, do: "#{failures} in a row", else: "the bridge is #{bridge_status.state}"),
      bridge: state.options.bridge,
      os_pid: bridge_status.os_pid
    )

    %{state | status: :unhealthy, failures: failures}
  end

  defp count(state, {:checked, :overloaded}, _in_doubt), do: state

  # The check itself failed, which no peer can cause.
  defp count(state, _crash, _in_doubt), do: %{state | status: :unhealthy}

  # A peer's error text may repeat what was sent.
  defp describe(reason) when is_atom(reason), do: reason
  defp describe(_text), do: "an error"

  defp tell(state, reason, started) do
    metadata = %{
      bridge: state.options.bridge,
      result: result(reason),
      failures: state.failures
    }

    measurements = %{duration: System.monotonic_time() - started}
    Telemetry.execute([:monitor, :check], measurements, metadata)
  end

  defp result({:checked, {:answered, _ms}}), do: :ok
  defp result({:checked, {:missed, reason, _status}}) when is_atom(reason), do: reason
  defp result({:checked, :overloaded}), do: :overloaded
  defp result(_error_text_or_crash), do: :error

  # Asked from a process of its own: the monitor answers whatever the bridge does.
  defp restart_if_due(%{failures: failures, options: options} = state, reason)
       when failures >= options.max_failures do
    gone? = match?({:checked, {:missed, :bridge_not_running, _status}}, reason)
    unless gone?, do: spawn(fn -> Server.replace(options.bridge) end)
    %{state | failures: 0, doubted: 0}
  end

  defp restart_if_due(state, _reason), do: state

  defp health(state) do
    sorted = state.response_times |> Enum.sort() |> List.to_tuple()

    %{
      status: state.status,
      failures: state.failures,
      last_check: state.last_check,
      checks: state.checks,
      success_rate: if(state.checks > 0, do: state.answered / state.checks, else: 0.0),
      response_ms: %{
        last: List.first(state.response_times),
        p50: percentile(sorted, 50),
        p99: percentile(sorted, 99)
      }
    }
  end

  # Nearest rank.
  defp percentile({}, _percent), do: nil
  defp percentile(sorted, percent), do: elem(sorted, ceil(tuple_size(sorted) * percent / 100) - 1)
end
