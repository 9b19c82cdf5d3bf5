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
  waiting for the pings before: with the defaults three are missed within 8 s instead of minutes. As soon as the peer
  sends anything, these misses do not count any longer: the pings waited behind what the peer had not read yet.

  A peer answers a ping with an error if code of your own has blocked its event loop for 5 s. That is a miss, too.

  [settings.md](settings.md#a-monitor) lists the options; defaults come from `config :dspex, :python_bridge_monitor`.

  Health is a map:

    * `:status` – `:healthy` or `:unhealthy` by the last check, `:unknown` before the first, and of
      what is no monitor that runs
    * `:failures` – misses in a row that count towards a restart
    * `:last_check` – when the last check ended, a UTC `DateTime`, or nil
    * `:checks` – how many checks there were
    * `:success_rate` – the part of them that was answered, 0.0 to 1.0
    * `:response_ms` – `:last`, `:p50`, `:p99` of the last 1000 answers, in ms; nil before the first
  """

  use GenServer

  require Logger

  alias DSPex.PythonBridge.{Bridge, Options, Telemetry}
  alias DSPex.PythonBridge.Bridge.Server
  alias DSPex.PythonBridge.Options.Table

  # A monitor answers questions at once, as a bridge does.
  @question_ms 5_000
  # The number of response times that are kept.
  @window 1_000
  # failures: misses in a row; doubted: how many of them were pings in doubt; missed: the OS pid of the peer that missed
  # them; times: the last response times, in ms, newest first.
  @unknown %{status: :unknown, last_check: nil, checks: 0, answered: 0, times: []}
           |> Map.merge(%{failures: 0, doubted: 0, missed: nil})

  # timer: of the next check; nil while one runs. waiting: callers who forced it. pings: those under way, by their monitors:
  # when they were sent, and whether in doubt. doubt: the timer of the next ping in doubt; again?: whether there is reason
  # for it. counts_from: pings in doubt that were sent before it do not count as missed.
  @enforce_keys [:options, :counts_from]
  defstruct [:options, :timer, :doubt, :counts_from, health: @unknown] ++
              [waiting: [], pings: %{}, again?: false]

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
  The health by the checks so far; answered at once, also while a check runs. None of these functions exits or raises in
  the caller.
  """
  @spec get_health_status(GenServer.server()) :: health()
  def get_health_status(monitor \\ __MODULE__), do: ask(monitor, :health)

  @doc """
  Makes a check now, or waits for the one that is running, and returns the health after it. It counts like any other.
  """
  @spec force_health_check(GenServer.server()) :: health()
  def force_health_check(monitor \\ __MODULE__) do
    # What is no monitor has no such time.
    with check_ms when is_integer(check_ms) <- ask(monitor, :check_ms),
         do: ask(monitor, :check, check_ms)
  end

  @doc "Forgets all checks so far: the health is as before the first."
  @spec reset_stats(GenServer.server()) :: :ok
  def reset_stats(monitor \\ __MODULE__) do
    ask(monitor, :reset)
    :ok
  end

  defp ask(monitor, question, timeout \\ @question_ms) do
    pid = GenServer.whereis(monitor)

    # A process of another kind may end by the question, as a pool would. One of another node cannot be looked at.
    with true <- not is_pid(pid) or node(pid) != node() or monitor?(pid),
         answer when answer != {:error, :unknown_call} <- GenServer.call(pid, question, timeout),
         do: answer,
         else: (_no_monitor -> report(@unknown))
  catch
    # Any term may be given as a monitor, and may raise.
    _kind, _not_running -> report(@unknown)
  end

  defp monitor?(pid), do: :proc_lib.translate_initial_call(pid) == {__MODULE__, :init, 1}

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
  def init(options),
    do: {:ok, schedule(%__MODULE__{options: options, counts_from: System.monotonic_time()})}

  @impl GenServer
  def handle_call(:health, _from, state), do: {:reply, report(state.health), state}

  # Of a ping, and the bridge's status if that is missed.
  def handle_call(:check_ms, _from, state),
    do: {:reply, state.options.timeout + 3 * @question_ms, state}

  def handle_call(:reset, _from, state), do: {:reply, :ok, %{state | health: @unknown}}

  def handle_call(:check, from, state) do
    state = %{state | waiting: [from | state.waiting]}
    {:noreply, if(state.timer, do: start_check(state), else: state)}
  end

  def handle_call(_stray, _from, state), do: {:reply, {:error, :unknown_call}, state}

  # Both come from a bridge in a pool.
  @impl GenServer
  def handle_cast(:unanswered, %{doubt: nil} = state), do: {:noreply, ping_in_doubt(state)}
  def handle_cast(:unanswered, state), do: {:noreply, %{state | again?: true}}

  # The misses of pings in doubt no longer count.
  def handle_cast(:heard, %{health: health} = state) do
    health = %{health | failures: health.failures - health.doubted, doubted: 0}
    {:noreply, forget_misses(%{state | health: health})}
  end

  def handle_cast(_stray, state), do: {:noreply, state}

  @impl GenServer
  def handle_info({:timeout, timer, :check}, %{timer: timer} = state),
    do: {:noreply, start_check(state)}

  def handle_info({:timeout, timer, :doubt}, %{doubt: timer} = state) do
    waits? =
      Enum.any?(state.pings, fn {_, {sent, doubt?}} -> doubt? and sent > state.counts_from end)

    again? = state.again? or waits?
    {:noreply, if(again?, do: ping_in_doubt(state), else: %{state | doubt: nil})}
  end

  # A ping has a process of its own, which exits with the result.
  def handle_info({:DOWN, ping, :process, _pid, {:checked, result}}, state)
      when is_map_key(state.pings, ping) do
    {{sent, doubt?}, pings} = Map.pop!(state.pings, ping)
    state = %{state | pings: pings}
    late? = doubt? and sent <= state.counts_from and missed?(result) and not blocked?(result)
    state = if late?, do: state, else: checked(state, result, sent, doubt?)
    {:noreply, if(doubt?, do: state, else: conclude(state))}
  end

  def handle_info({:DOWN, ping, :process, _pid, crash}, state) when is_map_key(state.pings, ping),
    do: {:stop, crash, state}

  # A timer that was cancelled too late, or what is not for it.
  def handle_info(_message, state), do: {:noreply, state}

  ## Pings

  defp schedule(state),
    do: %{state | timer: :erlang.start_timer(state.options.interval, self(), :check)}

  defp start_check(state) do
    # The next check comes one interval after a forced one.
    :erlang.cancel_timer(state.timer, async: true, info: false)
    start_ping(%{state | timer: nil}, false)
  end

  defp conclude(state) do
    Enum.each(state.waiting, &GenServer.reply(&1, report(state.health)))
    schedule(%{state | waiting: []})
  end

  defp ping_in_doubt(%{options: options} = state) do
    timer = :erlang.start_timer(max(div(options.timeout, 5), 1), self(), :doubt)
    start_ping(%{state | doubt: timer, again?: false}, true)
  end

  # Answers to the pings in doubt are still awaited: only they show that the peer is healthy again.
  defp forget_misses(state), do: %{state | again?: false, counts_from: System.monotonic_time()}

  defp start_ping(%{options: %{bridge: bridge, timeout: timeout}} = state, doubt?) do
    {_pid, monitor} = spawn_monitor(fn -> exit({:checked, ping(bridge, timeout)}) end)
    put_in(state.pings[monitor], {System.monotonic_time(), doubt?})
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

  # A bridge that is not running counts, too, although there is nothing to restart.
  defp missed?({:missed, reason, status}),
    do: status.state == :running or reason == :bridge_not_running

  defp missed?(_answered_or_overloaded), do: false

  # The peer's event loop is blocked, as it says itself.
  defp blocked?({:missed, reason, _status}), do: not is_atom(reason)
  defp blocked?(_answered_or_overloaded), do: false

  defp checked(state, result, sent, doubt?) do
    # An error is an answer: it counts, whatever else the peer sends, and there is reason for another ping.
    blocked? = blocked?(result)
    health = %{state.health | last_check: DateTime.utc_now(), checks: state.health.checks + 1}
    health = count(health, result, doubt? and not blocked?, state.options)
    metadata = %{bridge: state.options.bridge, result: name(result), failures: health.failures}
    duration = System.monotonic_time() - sent
    Telemetry.execute([:monitor, :check], %{duration: duration}, metadata)
    state = %{state | health: health, again?: state.again? or (doubt? and blocked?)}
    if health.failures >= state.options.max_failures, do: restart(state, result), else: state
  end

  defp count(health, {:answered, ms}, _doubt?, _options) do
    times = Enum.take([ms | health.times], @window)
    %{no_misses(health) | status: :healthy, answered: health.answered + 1, times: times}
  end

  defp count(health, :overloaded, _doubt?, _options), do: health

  defp count(health, {:missed, reason, status} = result, doubt?, %{bridge: bridge}) do
    health = %{health | status: :unhealthy}
    health = if missed?(result), do: miss(health, status.os_pid, doubt?), else: health

    # A peer's error text may have contents of a request.
    Logger.warning(
      "monitor of bridge #{inspect(bridge)}, Python process #{status.os_pid || "none"}: " <>
        "no answer to a ping (#{if(is_atom(reason), do: reason, else: "an error")}), " <>
        if(missed?(result),
          do: "#{health.failures} in a row",
          else: "the bridge is #{status.state}"
        ),
      bridge: bridge,
      os_pid: status.os_pid
    )

    health
  end

  defp miss(%{missed: os_pid} = health, os_pid, doubt?) do
    doubted = if doubt?, do: health.doubted + 1, else: health.doubted
    %{health | failures: health.failures + 1, doubted: doubted}
  end

  # Misses of another peer are not counted to it.
  defp miss(health, os_pid, doubt?),
    do: miss(%{no_misses(health) | missed: os_pid}, os_pid, doubt?)

  defp no_misses(health), do: %{health | failures: 0, doubted: 0}

  defp name({:answered, _ms}), do: :ok
  defp name({:missed, reason, _status}) when is_atom(reason), do: reason
  defp name({:missed, _error_text, _status}), do: :error
  defp name(:overloaded), do: :overloaded

  defp restart(state, {:missed, reason, _status}) do
    if reason != :bridge_not_running, do: Server.replace(state.options.bridge)
    forget_misses(%{state | health: no_misses(state.health)})
  end

  defp report(health) do
    sorted = health.times |> Enum.sort() |> List.to_tuple()

    health
    |> Map.take([:status, :failures, :last_check, :checks])
    |> Map.merge(%{
      success_rate: if(health.checks > 0, do: health.answered / health.checks, else: 0.0),
      response_ms: %{
        last: List.first(health.times),
        p50: percentile(sorted, 50),
        p99: percentile(sorted, 99)
      }
    })
  end

  # Nearest rank.
  defp percentile({}, _percent), do: nil
  defp percentile(sorted, percent), do: elem(sorted, ceil(tuple_size(sorted) * percent / 100) - 1)
end
