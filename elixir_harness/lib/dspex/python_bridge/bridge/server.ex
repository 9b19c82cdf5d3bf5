defmodule DSPex.PythonBridge.Bridge.Server do
  @moduledoc false
  # The process of a bridge: it owns the ports of its peers and routes frames by id. Its interface is
  # `DSPex.PythonBridge.Bridge`.
  #
  # It never waits: requests and replies pass through `DSPex.PythonBridge.Calls`, whose writes do not block; callers
  # encode and decode, the reaper kills, `DSPex.PythonBridge.Bridge.LogForwarder` logs what peers log. How peers
  # start, follow one another and end is in `DSPex.PythonBridge.Bridge.PeerLifecycle`.

  use GenServer

  alias DSPex.PythonBridge.{Calls, Options, Programs, Protocol, Telemetry}
  alias DSPex.PythonBridge.Bridge.{LogForwarder, Peer, PeerLifecycle, State, Status}
  alias DSPex.PythonBridge.Calls.{Dispatcher, InFlight, Journal, Request}
  alias DSPex.PythonBridge.OS.Reaper
  alias DSPex.PythonBridge.OTP.{Deadline, Registry, ServerGuard}
  alias DSPex.PythonBridge.Tools.Invocation

  # Frames from this size on are collected at once: an idle bridge may not have another garbage collection for long.
  # A collection costs far less than such a frame.
  @big_bytes 1_000_000

  # With hundreds of calls at once, a heap of this size (160 KB) takes 6 % of the CPU off each: it is collected less often.
  @heap_words 20_000

  # The longest head that Protocol.request_frame/3 puts before a body.
  @head_bytes 64

  # How often, and after which time each, a start looks again whether the name of a bridge that is left behind is free.
  @tries 200
  @try_ms 5

  # Of a peer: see `DSPex.PythonBridge.Bridge.Peer`.
  defguardp is_transport(term) when is_port(term) or is_pid(term)

  @doc "Kills and replaces a peer that does not react; its calls are sent again. For the monitor."
  @spec replace(GenServer.server()) :: :ok
  def replace(bridge), do: GenServer.cast(bridge, :replace)

  @doc "Starts the process of a bridge."
  @spec start_link(Options.t()) :: GenServer.on_start()
  def start_link(%Options{name: name} = options) do
    start_link(options, if(name, do: [name: name], else: []), @tries)
  end

  # A bridge whose starter has exited, such as the test before this one, gives its name back as soon as it hears of that.
  defp start_link(options, opts, tries) do
    with {:error, {:already_started, bridge}} = taken <-
           GenServer.start_link(__MODULE__, options, opts) do
      if tries > 0 and node(bridge) == node() and left_behind?(Process.info(bridge, :parent)) do
        Process.sleep(@try_ms)
        start_link(options, opts, tries - 1)
      else
        taken
      end
    end
  end

  defp left_behind?({:parent, starter}), do: is_pid(starter) and not Process.alive?(starter)
  defp left_behind?(nil), do: true

  @impl GenServer
  def init(%Options{} = options) do
    Process.flag(:trap_exit, true)
    Process.flag(:min_heap_size, @heap_words)

    # Else a node that hangs, and does not take the replies to its calls, would suspend this process.
    Process.flag(:async_dist, true)
    name = State.name(options)
    programs = if options.store == nil, do: declared(options, name), else: options.store
    entry = Map.take(options, [:default_timeout, :journal_bytes])
    Registry.put(:bridge, self(), Map.merge(entry, %{name: name, programs: programs}))
    # Keeps queued messages, which have the callers' contents, out of crash reports.
    Process.flag(:sensitive, true)

    Telemetry.look_once()
    in_flight = InFlight.new(options, programs)
    InFlight.notify(in_flight, :start)

    state = %State{
      options: options,
      reaper: Reaper.start(self()),
      log_forwarder: LogForwarder.start(name),
      to_load: Programs.Store.declared_ids(programs),
      in_flight: in_flight
    }

    {:ok, state, {:continue, :open}}
  end

  defp declared(options, name),
    do: Programs.Declared.store(options.programs.(), {:bridge, name}, options.max_frame_bytes)

  @impl GenServer
  def handle_continue(:open, state), do: {:noreply, PeerLifecycle.open(state)}

  @impl GenServer
  def handle_call(:get_status, _from, state), do: {:reply, Status.status(state), state}

  # For a peer of `DSPex.PythonBridge.Stub`, whose answers depend on who calls.
  def handle_call({:caller, id}, _from, state) do
    request = state.in_flight.calls[id]
    {:reply, request && request.pid, state}
  end

  def handle_call(:restart, from, state), do: {:noreply, PeerLifecycle.restart(state, from)}
  def handle_call(_stray, _from, state), do: {:reply, {:error, :unknown_call}, state}

  @impl GenServer
  def handle_cast(:replace, state), do: {:noreply, PeerLifecycle.replace(state)}
  def handle_cast(_stray, state), do: {:noreply, state}

  # The two hot paths come first. This clause only matches until the peer is heard again.
  @impl GenServer
  def handle_info(
        {port, {:data, _frame}} = message,
        %{in_flight: %{silent?: true, to: port}} = state
      ),
      do: handle_info(message, %{state | in_flight: InFlight.silent(state.in_flight, false)})

  def handle_info({port, {:data, frame}}, %{options: %{max_frame_bytes: max}} = state)
      when is_transport(port) and byte_size(frame) > max do
    case Protocol.route(frame) do
      {:reply, id} ->
        text = "the reply has #{byte_size(frame)} bytes; max_frame_bytes is #{max}"
        state |> reply_came(port, id, Protocol.refusal_frame(id, text)) |> noreply(frame)

      _others ->
        state |> unreadable_frame() |> noreply(frame)
    end
  end

  def handle_info({port, {:data, frame}}, state) when is_transport(port) do
    case Protocol.route(frame) do
      {:reply, id} -> state |> reply_came(port, id, frame) |> noreply(frame)
      {:stream, id} -> state |> chunk_came(port, id, frame) |> noreply(frame)
      {:journal, id} -> state |> journaled(port, id, frame) |> noreply(frame)
      {:tool_call, id} -> state |> tool_called(port, id, frame) |> noreply(frame)
      :log -> state |> logged(port, frame) |> noreply(frame)
      :none -> state |> unreadable_frame() |> noreply(frame)
    end
  end

  def handle_info({:request, %Request{} = request}, state),
    do: state |> request_came(request) |> noreply(request.body)

  # A bridge with the same store has made a change.
  def handle_info({:changed, ids}, state),
    do: {:noreply, %{state | in_flight: Dispatcher.follow(state.in_flight, ids)}}

  def handle_info({:tool_result, port, id, frame}, state) do
    in_flight = Calls.tool_result(state.in_flight, port, id, frame)
    noreply(%{state | in_flight: in_flight}, frame)
  end

  def handle_info({:bind, port, id, ref}, state) do
    {answer, in_flight} = Calls.bind(state.in_flight, port, id)
    send(ref, {ref, answer})
    {:noreply, %{state | in_flight: in_flight}}
  end

  # From a caller, or a tool, that could not decode a chunk or a tool call.
  def handle_info(:unreadable_frame, state), do: {:noreply, unreadable_frame(state)}

  # The caller's timeout has passed; the caller has died; a cast had no reply in time.
  def handle_info({:abandon, ref}, state), do: abandon(state, ref)

  def handle_info({{:caller_down, id}, _ref, :process, _pid, _reason}, state),
    do: abandon(state, id)

  def handle_info({:timeout, _timer, {:cast, id}}, state), do: abandon(state, id)

  # Whatever has killed the reaper: another watches the same peers.
  def handle_info({:DOWN, _monitor, :process, reaper, _reason}, %{reaper: reaper} = state) do
    reaper = Reaper.start(self())
    for peer <- State.peers(state), do: Reaper.watch(reaper, peer.os_pid)
    {:noreply, %{state | reaper: reaper}}
  end

  # The writer of a send queue has written.
  def handle_info({:DOWN, monitor, :process, _pid, _reason}, state),
    do: {:noreply, %{state | in_flight: Dispatcher.written(state.in_flight, monitor)}}

  def handle_info({:timeout, timer, :trial}, state),
    do: {:noreply, %{state | in_flight: Dispatcher.trial_over(state.in_flight, timer)}}

  def handle_info({:timeout, timer, what}, %{timer: timer} = state),
    do: {:noreply, PeerLifecycle.timer_fired(%{state | timer: nil}, what)}

  # A timer that was cancelled too late.
  def handle_info({:timeout, _timer, _what}, state), do: {:noreply, state}

  def handle_info({:drain_timeout, port}, state),
    do: {:noreply, PeerLifecycle.drain_timeout(state, port)}

  # A death shows as an exit status, as an exit of the port (:epipe, when something was still to be written), or
  # both, in either order. The first removes the peer; the second matches no peer's port any longer.
  def handle_info({port, {:exit_status, code}}, state) when is_transport(port),
    do: {:noreply, PeerLifecycle.lost(state, port, "exit status #{code}")}

  # A process is the one in the place of a port, or has linked itself to the bridge. (The parent's exit never gets here.)
  def handle_info({:EXIT, port_or_process, _reason}, state),
    do: {:noreply, PeerLifecycle.lost(state, port_or_process, "its port closed")}

  # A child of the peer holds its output open, so the port does not report its end.
  def handle_info({:peer_gone, os_pid}, state),
    do: {:noreply, PeerLifecycle.lost(state, os_pid, "it is gone")}

  def handle_info(_stray, state), do: {:noreply, state}

  ## The end

  # In a normal shutdown, calls that the peer has are answered first. Then the peer sees end of input and may leave;
  # what has not left soon is killed before this process ends, since the BEAM may stop next, and a full pipe would keep
  # it from that.
  @impl GenServer
  def terminate(reason, state), do: ServerGuard.ending(reason, fn -> finish(reason, state) end)

  defp finish(reason, state) do
    # First: whoever starts the next one does not wait for this one's end.
    give_back(state.options.name)
    peers = State.peers(state)
    state = if normal?(reason), do: finish_calls(state), else: state
    Enum.each(peers, &Peer.close/1)
    InFlight.fail_all(state.in_flight, :bridge_not_running, :all)
    Registry.delete(:bridge, self())
    Reaper.finish(state.reaper)
    # Others may have ended while calls were finished.
    for peer <- State.peers(state), do: Status.down(state, peer, :stopped)
  end

  defp give_back(nil), do: :ok
  defp give_back({:global, name}), do: :global.unregister_name(name)
  defp give_back({:via, registry, name}), do: registry.unregister_name(name)
  defp give_back(name), do: if(Process.whereis(name) == self(), do: Process.unregister(name))

  defp normal?(reason), do: reason in [:normal, :shutdown] or match?({:shutdown, _}, reason)

  defp finish_calls(state) do
    in_flight = InFlight.fail_all(state.in_flight, :bridge_not_running, :held)
    # From now on no peer starts or takes over, and calls of a peer that dies are not sent again.
    state = %{state | status: :stopping, in_flight: in_flight, timer: nil}
    state |> PeerLifecycle.give_up_next() |> finish_calls(Deadline.new(state.options.drain_ms))
  end

  defp finish_calls(state, deadline) do
    if InFlight.pending(state.in_flight) == 0 do
      state
    else
      receive do
        {:"$gen_call", from, question} ->
          # Other callers receive the end of the bridge.
          if question == :get_status, do: GenServer.reply(from, Status.status(state))
          finish_calls(state, deadline)

        message ->
          message |> handle_info(state) |> elem(1) |> finish_calls(deadline)
      after
        Deadline.left(deadline) -> state
      end
    end
  end

  @impl GenServer
  defdelegate format_status(status), to: ServerGuard

  ## Requests

  defp request_came(state, request) do
    max = state.options.max_frame_bytes
    room = max - @head_bytes - byte_size(request.body)
    request = %{request | journal: Journal.fit(request.journal, room)}
    size = byte_size(request.body) + Journal.bytes(request.journal)

    cond do
      state.status == :stopping ->
        refuse(state, request, :bridge_not_running)

      state.status == :failed and request.resend != :caller ->
        refuse(state, request, {:not_started, state.last_error})

      request.change == nil and InFlight.pending(state.in_flight) >= state.options.max_pending ->
        refuse(state, request, :overloaded)

      size + @head_bytes > max ->
        refuse(state, request, {:too_large, size, max})

      true ->
        %{state | in_flight: Calls.accept(state.in_flight, request)}
    end
  end

  defp refuse(state, request, failure) do
    InFlight.refuse(state.in_flight, request, failure)
    state
  end

  # Hibernation collects everything, even the message just handled.
  defp noreply(state, bytes) when byte_size(bytes) < @big_bytes, do: {:noreply, state}
  defp noreply(state, _big), do: {:noreply, state, :hibernate}

  defp abandon(state, id_or_ref) do
    state = %{state | in_flight: Calls.abandon(state.in_flight, id_or_ref)}
    {:noreply, Enum.reduce(state.old, state, &PeerLifecycle.drained(&2, &1.port))}
  end

  ## Replies

  defp reply_came(state, port, id, frame) do
    case Calls.deliver(state.in_flight, port, id, frame) do
      {:ok, in_flight} ->
        PeerLifecycle.drained(%{state | in_flight: in_flight}, port)

      :nobody ->
        case PeerLifecycle.own_reply(state, port, id, frame) do
          {:ok, state} -> state
          # Too late, a second one, or never asked for.
          :nobody -> %{state | late_replies: state.late_replies + 1}
        end
    end
  end

  defp chunk_came(state, port, id, frame) do
    case Calls.chunk(state.in_flight, port, id, frame) do
      :ok -> state
      :nobody -> %{state | late_replies: state.late_replies + 1}
    end
  end

  defp journaled(state, port, id, frame) do
    with entry when entry != nil <- Protocol.journal_entry(frame),
         {:ok, in_flight} <- Calls.journal(state.in_flight, port, id, entry) do
      %{state | in_flight: in_flight}
    else
      nil -> unreadable_frame(state)
      :nobody -> %{state | late_replies: state.late_replies + 1}
    end
  end

  defp tool_called(state, port, id, frame) do
    max = state.options.max_frame_bytes
    call = %Invocation{port: port, id: id, frame: frame, max_frame_bytes: max}
    Calls.tool_call(state.in_flight, call)
    state
  end

  defp logged(state, port, frame) do
    peer = Enum.find(State.peers(state), &(&1.port == port))
    log_forwarder = LogForwarder.take(state.log_forwarder, frame, peer && peer.os_pid)
    %{state | log_forwarder: log_forwarder}
  end

  # The first is logged, the rest counted: a peer may send many.
  defp unreadable_frame(state) do
    if state.unreadable_frames == 0 do
      text =
        "sent a frame without a readable id, too large, or not readable itself; more are only counted"

      Status.log(state, state.peer || state.next, :warning, text)
    end

    %{state | unreadable_frames: state.unreadable_frames + 1}
  end
end
