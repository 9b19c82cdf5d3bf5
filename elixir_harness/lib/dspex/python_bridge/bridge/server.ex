defmodule DSPex.PythonBridge.Bridge.Server do
  @moduledoc """
  The process of a bridge: it owns the ports of its peers and routes frames by id. Its interface is
  `DSPex.PythonBridge.Bridge`; this module is for reading.

  It never waits for anything: requests and replies pass through `DSPex.PythonBridge.Calls.InFlight`, whose
  writes do not block; encoding and decoding are the callers' work, killing is the reaper's, logging what
  peers log is `DSPex.PythonBridge.Bridge.LogForwarder`'s. How peers
  start, follow one another and end is in `DSPex.PythonBridge.Bridge.PeerLifecycle`.
  """

  use GenServer
  use DSPex.PythonBridge.OTP.ServerGuard

  alias DSPex.PythonBridge.{Calls, Options, Programs, Protocol, Telemetry}

  alias DSPex.PythonBridge.Bridge.{
    Backoff,
    LogForwarder,
    Peer,
    PeerLifecycle,
    ProgramReplay,
    Redaction,
    Status
  }

  alias DSPex.PythonBridge.Calls.{Dispatcher, InFlight, LoadCounters}
  alias DSPex.PythonBridge.OS.Reaper
  alias DSPex.PythonBridge.OTP.{Registry, ServerGuard}
  alias DSPex.PythonBridge.Tools.Invocation

  # Frames from this size on are not left to the next garbage collection: in a bridge with nothing to
  # do it may never come, and they would stay. Collecting costs far less than such a frame.
  @big_bytes 1_000_000

  # Anyone can send anything: a request that no caller here makes must not end the bridge.
  defguardp is_caller(ref, pid, timeout)
            when (is_reference(ref) and is_pid(pid) and
                    (timeout == :infinity or timeout in 0..4_294_967_295)) or
                   (ref == nil and pid == nil and timeout in 0..4_294_967_295)

  defguardp is_terms(retry, deaths)
            when retry in [:here, :never, :caller] and is_integer(deaths) and deaths >= 0

  # peer serves, next starts, old ones finish. load_deaths: see Loading, by the stamp of the program.
  # load_failures: errors, by the stamp of the program that the present peer could not load.
  # again_timer: when another peer is started for those that were left out. restarts_later: those who asked for
  # a restart when a peer was loading without them.
  @enforce_keys [:options, :label, :reaper, :log_forwarder, :programs, :in_flight]
  defstruct [
    :options,
    :label,
    :reaper,
    :log_forwarder,
    :programs,
    :in_flight,
    :peer,
    :next,
    :timer,
    :last_error,
    status: :starting,
    old: [],
    restarts_waiting: [],
    restarts_later: [],
    again_timer: nil,
    backoff: Backoff.new(),
    load_deaths: %{},
    load_failures: %{},
    load_carefully?: false,
    opened: 0,
    big?: false,
    late_replies: 0,
    unreadable_frames: 0
  ]

  @doc """
  Has a bridge replace a peer that does not react: killed at once, its calls sent again. For the
  monitor.
  """
  @spec replace(GenServer.server()) :: :ok
  def replace(bridge), do: GenServer.cast(bridge, :replace)

  @impl GenServer
  def init(%Options{} = options) do
    Process.flag(:trap_exit, true)
    entry = %{name: Status.name(options), default_timeout: options.default_timeout}
    Registry.put(:bridge, self(), entry)
    # Keeps the queued messages, which have what callers sent in them, out of crash reports.
    Process.flag(:sensitive, true)

    with {counters, index, _coordinator, _monitor} <- options.slot,
         do: LoadCounters.reset(counters, index)

    programs = if options.programs == nil, do: Programs.Store.new(), else: options.programs
    Telemetry.look_once()

    state = %__MODULE__{
      options: options,
      label: inspect(Status.name(options)),
      reaper: Reaper.start(self()),
      log_forwarder: LogForwarder.start(Status.name(options)),
      programs: programs,
      in_flight: InFlight.new(options, programs)
    }

    {:ok, state, {:continue, :open}}
  end

  @impl GenServer
  def handle_continue(:open, state), do: {:noreply, PeerLifecycle.open(state)}

  @impl GenServer
  def handle_call(:get_status, _from, state), do: {:reply, Status.status(state), state}

  def handle_call({:load_failure, id}, _from, state),
    do: {:reply, ProgramReplay.failure(state, id), state}

  def handle_call(:restart, from, state), do: {:noreply, PeerLifecycle.restart(state, from)}

  def handle_call(question, from, state) do
    ServerGuard.drop({:"$gen_call", from, question}, __MODULE__)
    {:noreply, state}
  end

  @impl GenServer
  def handle_cast(:replace, state), do: {:noreply, PeerLifecycle.replace(state)}
  def handle_cast(message, state), do: drop(message, state)

  # The two hot paths first; before them what makes them the only ones again.
  @impl GenServer
  def handle_info(
        {port, {:data, _frame}} = message,
        %{in_flight: %{silent?: true, to: port}} = state
      ),
      do: handle_info(message, %{state | in_flight: InFlight.heard(state.in_flight)})

  def handle_info({port, {:data, frame}}, state) when is_port(port) and is_binary(frame) do
    case Protocol.route(frame) do
      {:reply, id} -> state |> reply_came(port, id, frame) |> noreply(frame)
      {:stream, id} -> state |> chunk_came(port, id, frame) |> noreply(frame)
      {:tool_call, id} -> state |> tool_called(port, id, frame) |> noreply(frame)
      :log -> state |> logged(port, frame) |> noreply(frame)
      :none -> state |> unreadable_frame() |> noreply(frame)
    end
  end

  def handle_info({:request, ref, pid, timeout, body, {retry, deaths, _what} = terms}, state)
      when is_caller(ref, pid, timeout) and is_binary(body) and is_terms(retry, deaths),
      do: request_came(state, ref, pid, timeout, body, terms, InFlight.nothing_beside())

  def handle_info(
        {:request, ref, pid, timeout, body, {retry, deaths, _what} = terms, beside},
        state
      )
      when is_caller(ref, pid, timeout) and is_binary(body) and is_terms(retry, deaths) and
             is_boolean(beside.stream?) and is_boolean(beside.tools?),
      do: request_came(state, ref, pid, timeout, body, terms, beside)

  def handle_info({:tool_result, port, id, frame}, state)
      when is_port(port) and is_binary(frame) do
    in_flight = Calls.Events.tool_result(state.in_flight, port, id, frame)
    noreply(%{state | in_flight: in_flight}, frame)
  end

  # From who was to decode a chunk or a tool call.
  def handle_info(:unreadable_frame, state), do: {:noreply, unreadable_frame(state)}

  # The caller's timeout passed; the caller died; nobody answered a cast.
  def handle_info({:abandon, ref}, state) when is_reference(ref), do: abandon(state, ref)

  def handle_info({{:caller_down, id}, _ref, :process, _pid, _reason}, state),
    do: abandon(state, id)

  def handle_info({:timeout, _timer, {:cast, id}}, state), do: abandon(state, id)

  # What belongs to a bridge is killed only from outside, and started again.
  def handle_info({:"ETS-TRANSFER", table, reaper, Reaper}, %{reaper: reaper} = state) do
    os_pids = for peer <- peers(state), do: peer.os_pid
    {:noreply, %{state | reaper: Reaper.replace(table, os_pids)}}
  end

  def handle_info(
        {:DOWN, log, :process, _pid, _reason},
        %{log_forwarder: %{monitor: log}} = state
      ),
      do: {:noreply, %{state | log_forwarder: LogForwarder.replace(state.log_forwarder)}}

  # A send queue's helper has written.
  def handle_info({:DOWN, monitor, :process, _pid, _reason}, state),
    do: collect(%{state | in_flight: Dispatcher.written(state.in_flight, monitor)})

  def handle_info(:collect, state), do: collect(state)

  def handle_info({:dropped, bytes}, state) when is_integer(bytes) and bytes >= @big_bytes,
    do: {:noreply, state, :hibernate}

  def handle_info({:dropped, _few}, state), do: {:noreply, state}

  def handle_info({:timeout, timer, :acquit}, state),
    do: {:noreply, %{state | in_flight: Dispatcher.acquit(state.in_flight, timer)}}

  def handle_info({:timeout, timer, what}, %{timer: timer} = state) when is_reference(timer),
    do: {:noreply, PeerLifecycle.timer_fired(%{state | timer: nil}, what)}

  def handle_info({:timeout, timer, :try_again}, %{again_timer: timer} = state)
      when is_reference(timer),
      do: {:noreply, PeerLifecycle.try_left_out(%{state | again_timer: nil})}

  # Of a timer that was cancelled too late.
  def handle_info({:timeout, _timer, _what}, state), do: {:noreply, state}

  def handle_info({:drain_timeout, port}, state),
    do: {:noreply, PeerLifecycle.drain_timeout(state, port)}

  def handle_info({:start_failure, %Peer{} = next, why, explanation, then}, state)
      when is_binary(why) and (is_binary(explanation) or explanation == nil) and is_binary(then),
      do: {:noreply, PeerLifecycle.explained(state, next, why, explanation, then)}

  # A death shows as an exit status, as an exit of the port (:epipe, when something was still to be
  # written), or both, in either order. The first ends the peer's time here; the second no longer
  # matches any peer's port.
  def handle_info({port, {:exit_status, code}}, state) when is_port(port) and is_integer(code),
    do: {:noreply, lost(state, port, "exit status #{code}")}

  def handle_info({:EXIT, port, reason}, state) when is_port(port) and is_atom(reason),
    do: {:noreply, lost(state, port, "its port closed: #{inspect(reason)}")}

  # A child of the peer's holds its output open, so that the port tells nothing.
  def handle_info({:peer_gone, os_pid}, state) when is_integer(os_pid),
    do: {:noreply, lost(state, os_pid, "it is gone")}

  # A process has linked itself to the bridge, and ended. Everyone else's calls go on. (The parent's exit
  # never gets here.)
  def handle_info({:EXIT, pid, :normal}, state) when is_pid(pid), do: {:noreply, state}

  def handle_info(message, state), do: drop(message, state)

  ## The end

  # What the peer has is answered first, if this is an end in order. Then the peer sees end of input
  # and may leave; what has not left soon is ended before this process is, since the BEAM itself may
  # be about to stop. A peer that does not read would never see the end of input, and would keep the
  # BEAM from stopping.
  @impl GenServer
  def terminate(reason, state) do
    peers = peers(state)
    state = if in_order?(reason), do: finish_calls(state), else: state
    if Enum.any?(peers, &Peer.blocked?/1), do: Reaper.kill_all(state.reaper)
    Enum.each(peers, &Peer.close/1)
    InFlight.fail_all(state.in_flight, :bridge_not_running, :all)
    Registry.delete(:bridge, self())
    Reaper.finish(state.reaper)
    # Of those that are left: others may have come to their end while calls were finished.
    for peer <- peers(state), do: Status.down(state, peer, :stopped)
  end

  defp peers(state), do: Enum.reject([state.peer, state.next | state.old], &is_nil/1)

  defp in_order?(reason), do: reason in [:normal, :shutdown] or match?({:shutdown, _}, reason)

  defp finish_calls(state) do
    in_flight = InFlight.fail_all(state.in_flight, :bridge_not_running, :held)
    # Nothing is started any more, nor taken over, and what a death gives back is not sent again.
    state = %{state | status: :stopping, in_flight: in_flight, timer: nil, again_timer: nil}
    state = PeerLifecycle.give_up_next(state)
    finish_calls(state, now() + state.options.drain_ms)
  end

  defp finish_calls(state, deadline) do
    if InFlight.pending(state.in_flight) == 0 do
      state
    else
      receive do
        {:"$gen_call", from, :get_status} ->
          GenServer.reply(from, Status.status(state))
          finish_calls(state, deadline)

        {:"$gen_call", from, {:load_failure, id}} ->
          GenServer.reply(from, ProgramReplay.failure(state, id))
          finish_calls(state, deadline)

        # Whoever asked for something else hears that the bridge has ended.
        {:"$gen_call", _from, _question} ->
          finish_calls(state, deadline)

        message ->
          message |> handle_info(state) |> state_of() |> finish_calls(deadline)
      after
        max(deadline - now(), 0) -> state
      end
    end
  end

  defp state_of({:stop, _reason, state}), do: state
  defp state_of(noreply), do: elem(noreply, 1)

  @impl GenServer
  defdelegate format_status(status), to: Redaction

  defp now, do: System.monotonic_time(:millisecond)

  defp drop(message, state) do
    ServerGuard.drop(message, __MODULE__)
    {:noreply, state}
  end

  ## Requests

  # A pool's coordinator has all bridges make a change of the programs, or none.
  defp of_coordinator?({_retry, _deaths, {_kind, _ids, stamp}}), do: stamp != nil
  defp of_coordinator?(_terms), do: false

  defp request_came(state, ref, pid, timeout, body, {retry, _deaths, what} = terms, beside) do
    cond do
      what != nil and not Programs.Store.change?(what) ->
        drop({:request, ref, pid, timeout, body, terms, beside}, state)

      state.status == :stopping ->
        refuse(state, ref, :bridge_not_running, body, retry)

      InFlight.pending(state.in_flight) >= state.options.max_pending and
          not of_coordinator?(terms) ->
        refuse(state, ref, :overloaded, body, retry)

      not InFlight.fits?(state.in_flight, timeout, body, state.options.max_frame_bytes) ->
        size = {:too_large, byte_size(body), state.options.max_frame_bytes}
        refuse(state, ref, size, body, retry)

      true ->
        in_flight = InFlight.accept(state.in_flight, ref, pid, timeout, body, terms, beside)
        noreply(%{state | in_flight: in_flight}, body)
    end
  end

  defp refuse(state, ref, failure, body, retry),
    do: noreply(%{state | in_flight: InFlight.refuse(state.in_flight, ref, failure, retry)}, body)

  # Hibernation is a collection that spares nothing, not even the message just handled.
  defp noreply(state, bytes) when byte_size(bytes) < @big_bytes, do: {:noreply, state}
  defp noreply(state, _big), do: {:noreply, %{state | big?: true}, :hibernate}

  # Again when a big request that had to queue may have been written: once, not for every frame.
  defp collect(%{big?: true} = state) do
    if Dispatcher.all_written?(state.in_flight),
      do: {:noreply, %{state | big?: false}, :hibernate},
      else: {:noreply, state}
  end

  defp collect(state), do: {:noreply, state}

  defp abandon(state, id_or_ref) do
    state = %{state | in_flight: InFlight.abandon(state.in_flight, id_or_ref)}
    state = Enum.reduce(state.old, state, &PeerLifecycle.drained(&2, &1.port))
    # It may have been the change that the next peer waited for.
    {:noreply, PeerLifecycle.load_programs(state)}
  end

  ## Replies

  defp reply_came(state, port, id, frame) do
    case InFlight.deliver(state.in_flight, id, frame) do
      {:ok, in_flight} ->
        call_answered(%{state | in_flight: in_flight}, port)

      :nobody ->
        case PeerLifecycle.own_reply(state, id, frame) do
          {:ok, state} -> state
          # Too late, twice, or never asked for.
          :nobody -> %{state | late_replies: state.late_replies + 1}
        end
    end
  end

  defp chunk_came(state, port, id, frame) do
    case Calls.Events.chunk(state.in_flight, port, id, frame) do
      {:ok, in_flight} -> %{state | in_flight: in_flight}
      :nobody -> %{state | late_replies: state.late_replies + 1}
    end
  end

  defp tool_called(state, port, id, frame) do
    max = state.options.max_frame_bytes
    call = %Invocation{port: port, id: id, frame: frame, max_frame_bytes: max}
    Calls.Events.tool_call(state.in_flight, call)
    state
  end

  defp logged(state, port, frame) do
    peer = Enum.find(peers(state), &(&1.port == port))
    LogForwarder.take(state.log_forwarder, frame, peer && peer.os_pid)
    state
  end

  # The usual case first: there is one peer, and it has answered before.
  defp call_answered(%{peer: %{port: port, answered?: true}, next: nil} = state, port), do: state

  defp call_answered(%{peer: %{port: port} = peer} = state, port),
    do: PeerLifecycle.load_programs(%{state | peer: %{peer | answered?: true}})

  defp call_answered(state, port), do: PeerLifecycle.drained(state, port)

  # The first is logged, the rest counted: a peer that talks nonsense may do so a lot.
  defp unreadable_frame(state) do
    if state.unreadable_frames == 0 do
      text = "sent a frame without a readable id, or not readable itself; more are only counted"
      Status.log(state, state.peer || state.next, :warning, text)
    end

    %{state | unreadable_frames: state.unreadable_frames + 1}
  end

  # When the bridge ends, nothing follows.
  defp lost(%{status: :stopping} = state, which, _why) do
    case Enum.find([state.peer | state.old], &(&1 != nil and which in [&1.port, &1.os_pid])) do
      nil ->
        state

      peer ->
        in_flight = Dispatcher.lost(state.in_flight, peer.port, :died)
        %{state | in_flight: InFlight.fail_all(in_flight, :python_process_died, :held)}
    end
  end

  defp lost(state, which, why), do: PeerLifecycle.lost(state, which, why)
end
