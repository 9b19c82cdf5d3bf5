defmodule DSPex.PythonBridge.Bridge.PeerLifecycle do
  @moduledoc false
  # How one peer follows another: part of the bridge's process, over its state.
  #
  # A peer that starts is `next`. When it has answered the bridge's own ping it becomes `peer` and serves. The
  # definitions of all programs are sent to it before the calls; it loads a program with the first run that needs it.
  #
  # When the `peer` dies, a `next` is started: after 50 ms, and twice as long, up to 5 s, after each further one that was of
  # no use. The bridge never gives up. While none starts,
  # calls wait within their own timeouts, and after `max_retries` further attempts fail at once.
  #
  # A restart starts a `next` while the `peer` goes on serving. When the new one takes over, the other is `old`: it
  # finishes its calls, and is ended.

  alias DSPex.PythonBridge.Protocol
  alias DSPex.PythonBridge.Bridge.{DeclaredPrograms, Peer, StartDiagnosis, State, Status}
  alias DSPex.PythonBridge.Calls.{Dispatcher, InFlight, SendQueue}
  alias DSPex.PythonBridge.OS.Reaper
  alias DSPex.PythonBridge.OTP.ServerGuard

  @first_delay_ms 50
  @max_delay_ms 5_000
  # A peer that has lasted so long is followed by another at once: such peers start every two seconds at most.
  @lasting_ms 2_000
  # The first delay doubled seven times is past the maximum.
  @max_doublings 7
  # More than `StartDiagnosis` takes.
  @diagnosis_ms 6_000

  ## Start

  @doc "Starts a peer."
  @spec open(State.t()) :: State.t()
  def open(state) do
    case Peer.open(state.options) do
      {:ok, peer} ->
        Reaper.watch(state.reaper, peer.os_pid)
        {:ok, ping} = Protocol.encode_body(:ping, %{})
        in_flight = Dispatcher.attach(state.in_flight, peer.port)
        {ping_id, in_flight} = Dispatcher.own_request(in_flight, peer.port, ping)
        next = %{peer | ping_id: ping_id}
        state = %{state | next: next, in_flight: in_flight, opened: state.opened + 1}
        set_timer(state, state.options.start_timeout, :start_timeout)

      {:error, text} ->
        Status.down(state, nil, :not_started, text)
        not_started(state, nil, text)
    end
  end

  @doc "Handles the reply to a request of the bridge itself; `:nobody` for one that comes too late."
  @spec own_reply(State.t(), SendQueue.transport(), non_neg_integer(), binary()) ::
          {:ok, State.t()} | :nobody
  def own_reply(%{next: %Peer{ping_id: id} = next} = state, _port, id, _frame) do
    Status.log(state, next, :debug, "up after #{Peer.uptime_ms(next)} ms")
    Status.up(state, next)
    {:ok, take_over(%{state | next: %{next | up?: true}})}
  end

  def own_reply(%{loading: {_port, id, _definition}} = state, _, id, frame),
    do: {:ok, DeclaredPrograms.loaded(state, frame)}

  # Of a request whose reply nobody needs.
  def own_reply(state, _port, 0, _frame), do: {:ok, state}

  def own_reply(%{in_flight: %{asked: asked} = in_flight} = state, port, id, _frame) do
    cond do
      asked[port] == id -> {:ok, %{state | in_flight: Dispatcher.warm(in_flight, port)}}
      # The peer has ended, and `asked` is forgotten.
      not is_map_key(in_flight.send_queues, port) -> {:ok, state}
      true -> :nobody
    end
  end

  defp take_over(%{next: next, peer: before} = state) do
    state = cancel_timer(%{state | next: nil, peer: next, status: :running, last_error: nil})
    state = %{state | in_flight: Dispatcher.serve(state.in_flight, next.port)}
    InFlight.notify(state.in_flight, :ready)
    state = answer_restarts(if(before, do: drain(state, before), else: state), :ok)
    DeclaredPrograms.load(state)
  end

  ## End

  @doc "Handles the death of a peer, by its port or OS pid; a peer that is gone already changes nothing."
  @spec lost(State.t(), port() | pos_integer(), String.t()) :: State.t()
  def lost(%{next: %Peer{} = next} = state, which, why) when which in [next.port, next.os_pid],
    do: lost_next(state, why, :died)

  def lost(%{peer: %Peer{} = peer} = state, which, why) when which in [peer.port, peer.os_pid] do
    # First, so that callers who get the error do not choose this peer again.
    InFlight.notify(state.in_flight, :down)
    state = %{end_peer(%{state | peer: nil}, peer, :died, why) | last_error: why}

    cond do
      state.status == :stopping ->
        %{state | in_flight: InFlight.fail_all(state.in_flight, :python_process_died, :held)}

      state.next ->
        Status.death(state, peer, :warning, why, "its successor is starting")
        %{state | status: :restarting}

      true ->
        {delay, state} = try_again(state, failures(state, peer))
        Status.death(state, peer, :warning, why, "next attempt in #{delay} ms")
        refuse_calls(state)
    end
  end

  def lost(state, which, why) do
    case Enum.find(state.old, &(which in [&1.port, &1.os_pid])) do
      nil ->
        state

      peer ->
        Status.death(state, peer, :warning, why, "another serves already")
        DeclaredPrograms.load(end_peer(forget_old(state, peer), peer, :died, why))
    end
  end

  # It did start, so the bridge is not `:failed`, whatever killed it.
  defp failures(%{failures: failures, options: %{max_retries: most}}, peer) do
    if Peer.uptime_ms(peer) >= @lasting_ms, do: 0, else: min(failures + 1, most)
  end

  defp lost_next(%{next: next} = state, why, reason),
    do: explain(end_peer(%{state | next: nil}, next, reason, why), next, why)

  # A peer writes why it does not start to standard error, which the bridge does not read: another process starts it
  # again for that line. The bridge goes on without it if that process ends early.
  defp explain(state, next, "exit" <> _status = why) do
    state = set_timer(state, @diagnosis_ms, {:not_started, next, why})
    %{timer: timer, options: options} = state
    owner = self()

    diagnose = fn ->
      line = StartDiagnosis.last_line(options, owner)
      why = if line, do: "#{why}: #{line}", else: why
      send(owner, {:timeout, timer, {:not_started, next, why}})
    end

    spawn(fn -> ServerGuard.run(diagnose) end)
    state
  end

  defp explain(state, next, why), do: not_started(state, next, why)

  # The peer is gone, or is killed now, with all that it started.
  defp end_peer(%{in_flight: before} = state, peer, reason, why) do
    Peer.close(peer)
    Reaper.kill(state.reaper, peer.os_pid)
    how = if reason in [:replaced, :stopped], do: :replaced, else: :died
    {loading?, state} = DeclaredPrograms.lost(state, peer.port, how)
    how = if how == :died and loading?, do: :spared, else: how
    state = %{state | in_flight: Dispatcher.lost(before, peer.port, how)}
    Status.down(state, peer, reason, why)
    Status.resent(state, state.in_flight.resent - before.resent, reason)
    state
  end

  @doc "Ends a peer that starts, since the bridge ends."
  @spec give_up_next(State.t()) :: State.t()
  def give_up_next(%{next: nil} = state), do: state
  def give_up_next(%{next: next} = state), do: end_peer(%{state | next: nil}, next, :stopped, nil)

  # A restart that fails changes nothing; without a peer, the attempts go on.
  defp not_started(%{peer: %Peer{}} = state, next, why) do
    Status.death(state, next, :warning, why, "the present one goes on")
    answer_restarts(cancel_timer(state), {:error, "the new Python process did not start: #{why}"})
  end

  defp not_started(state, next, why) do
    {delay, state} = try_again(%{state | last_error: why}, state.failures + 1)
    Status.death(state, next, :warning, why, "next attempt in #{delay} ms")
    answer_restarts(refuse_calls(state), {:error, "the Python process did not start: #{why}"})
  end

  # Calls do not wait for a Python that does not start. Those of a pool know other bridges.
  defp refuse_calls(%{status: :failed, last_error: reason} = state) do
    InFlight.notify(state.in_flight, {:failed, reason})
    %{state | in_flight: InFlight.fail_all(state.in_flight, {:not_started, reason}, :held)}
  end

  defp refuse_calls(state), do: state

  defp try_again(state, failures) do
    doublings = min(max(failures - 1, 0), @max_doublings)
    delay = min(@first_delay_ms * 2 ** doublings, @max_delay_ms)
    status = if failures > state.options.max_retries, do: :failed, else: :restarting
    {delay, set_timer(%{state | failures: failures, status: status}, delay, :open)}
  end

  ## Restart

  @doc "Starts a peer that replaces the present one; `from` is answered when it serves, or has failed."
  @spec restart(State.t(), GenServer.from()) :: State.t()
  def restart(state, from) do
    state = %{state | restarts_waiting: [from | state.restarts_waiting]}

    cond do
      state.next ->
        state

      state.peer ->
        open(state)

      true ->
        status = if state.status == :failed, do: :restarting, else: state.status
        open(%{cancel_timer(state) | failures: 0, status: status})
    end
  end

  @doc "Kills a peer that does not react, and starts another."
  @spec replace(State.t()) :: State.t()
  def replace(%{peer: %Peer{} = peer} = state) do
    Status.log(state, peer, :warning, "does not react and is replaced")
    InFlight.notify(state.in_flight, :down)
    state = %{end_peer(%{state | peer: nil}, peer, :unresponsive, nil) | status: :restarting}
    if state.next, do: state, else: open(%{state | failures: 0})
  end

  # A peer that starts has its own timeout.
  def replace(state), do: state

  defp answer_restarts(state, answer) do
    Enum.each(state.restarts_waiting, &GenServer.reply(&1, answer))
    %{state | restarts_waiting: []}
  end

  defp drain(state, peer) do
    Status.log(state, peer, :info, "another has taken over")
    Process.send_after(self(), {:drain_timeout, peer.port}, state.options.drain_ms)
    drained(%{state | old: [peer | state.old]}, peer.port)
  end

  @doc "Ends an old peer if it has answered its last call."
  @spec drained(State.t(), port()) :: State.t()
  def drained(%{old: []} = state, _port), do: state

  def drained(state, port) do
    peer = Enum.find(state.old, &(&1.port == port))

    if peer == nil or Dispatcher.busy?(state.in_flight, port) do
      state
    else
      Peer.close(peer)
      Reaper.retire(state.reaper, peer.os_pid)
      Status.down(state, peer, :replaced)
      {_loading?, state} = DeclaredPrograms.lost(forget_old(state, peer), port, :replaced)

      DeclaredPrograms.load(%{
        state
        | in_flight: Dispatcher.lost(state.in_flight, port, :replaced)
      })
    end
  end

  @doc "Kills an old peer whose time to finish is over."
  @spec drain_timeout(State.t(), port()) :: State.t()
  def drain_timeout(state, port) do
    case Enum.find(state.old, &(&1.port == port)) do
      nil -> state
      peer -> DeclaredPrograms.load(end_peer(forget_old(state, peer), peer, :replaced, nil))
    end
  end

  defp forget_old(state, peer), do: %{state | old: List.delete(state.old, peer)}

  ## The timer: a peer that starts waits for one thing at a time

  @doc "Handles the timer that this module has set."
  @spec timer_fired(State.t(), :open | :start_timeout | {:not_started, Peer.t(), String.t()}) ::
          State.t()
  def timer_fired(state, :open), do: open(state)
  def timer_fired(state, {:not_started, next, why}), do: not_started(state, next, why)

  def timer_fired(state, :start_timeout) do
    why = "no answer to its first ping within #{state.options.start_timeout} ms"
    lost_next(state, why, :start_timeout)
  end

  defp set_timer(state, ms, what),
    do: %{cancel_timer(state) | timer: :erlang.start_timer(ms, self(), what)}

  defp cancel_timer(%{timer: nil} = state), do: state

  defp cancel_timer(%{timer: timer} = state) do
    :erlang.cancel_timer(timer, async: true, info: false)
    %{state | timer: nil}
  end
end
