defmodule DSPex.PythonBridge.Server do
  @moduledoc """
  The process of a bridge: it owns one port, routes frames by id, and starts the peer again when
  it dies. Its interface is `DSPex.PythonBridge.Bridge`; this module is for reading.

  It never waits for anything: requests and replies pass through `DSPex.PythonBridge.Traffic`, whose
  writes do not block; encoding and decoding are the callers' work, killing is the reaper's.

  A peer is `:starting` until it answers a first ping, which the bridge sends itself; calls queue
  until then. A peer that dies is replaced after a delay (`DSPex.PythonBridge.Backoff`). After
  `max_retries` early deaths in a row, of peers that had answered no call and were not up for some
  seconds, the bridge gives up: all calls are answered, the state is `:failed` for 5 s, then the
  process stops, for its supervisor to begin anew. Those 5 s are what keeps a machine without a
  working Python from bringing its host down: they stay within any supervisor's intensity of
  restarts (3 in 5 s where nothing is said).
  """

  use GenServer

  alias DSPex.PythonBridge.{Backoff, Caller, Options, Peer, Protocol, Reaper, Redaction, Report}
  alias DSPex.PythonBridge.Traffic

  @failed_ms 5_000
  # Frames from this size on are not left to the next garbage collection: in a bridge with nothing to
  # do it may never come, and they would stay. Collecting costs far less than such a frame.
  @big_bytes 1_000_000

  @enforce_keys [:options, :label, :reaper, :backoff]
  defstruct [
    :options,
    :label,
    :reaper,
    :backoff,
    :peer,
    :timer,
    :last_error,
    status: :starting,
    traffic: %Traffic{},
    opened: 0,
    big?: false,
    late_replies: 0,
    unreadable_frames: 0
  ]

  @impl GenServer
  def init(%Options{} = options) do
    Process.flag(:trap_exit, true)
    # Keeps the queued messages, which have what callers sent in them, out of crash reports.
    Process.flag(:sensitive, true)
    Caller.remember_defaults(self(), options)

    state = %__MODULE__{
      options: options,
      label: inspect(options.name || self()),
      reaper: Reaper.start(self()),
      backoff: Backoff.new(options.max_retries)
    }

    {:ok, state, {:continue, :open}}
  end

  @impl GenServer
  def handle_continue(:open, state), do: {:noreply, open(state)}

  @impl GenServer
  def handle_call(:get_status, _from, state), do: {:reply, Report.status(state), state}

  def handle_call(:restart, _from, state) do
    Report.log(state, :info, "replaced on request")
    {:reply, :ok, open(%{drop_peer(state) | backoff: Backoff.reset(state.backoff)})}
  end

  # The two hot paths first.
  @impl GenServer
  def handle_info({port, {:data, frame}}, %{peer: %{port: port}} = state) do
    case Protocol.route(frame) do
      {:reply, id} -> state |> reply_came(id, frame) |> noreply(frame)
      :none -> state |> unreadable_frame() |> noreply(frame)
    end
  end

  def handle_info({:request, ref, pid, timeout, body}, state) do
    cond do
      state.status == :failed ->
        refuse(state, ref, :python_process_died, body)

      Traffic.pending(state.traffic) >= state.options.max_pending ->
        refuse(state, ref, :overloaded, body)

      not Traffic.fits?(state.traffic, timeout, body, state.options.max_frame_bytes) ->
        refuse(state, ref, {:too_large, byte_size(body), state.options.max_frame_bytes}, body)

      true ->
        traffic = Traffic.accept(state.traffic, ref, pid, timeout, body)
        noreply(%{state | traffic: traffic}, body)
    end
  end

  # The caller's timeout passed; the caller died; nobody answered a cast.
  def handle_info({:abandon, ref}, state), do: abandon(state, ref)

  def handle_info({{:caller_down, id}, _ref, :process, _pid, _reason}, state),
    do: abandon(state, id)

  def handle_info({:timeout, _timer, {:cast, id}}, state), do: abandon(state, id)

  # The outbox's helper has written.
  def handle_info({:DOWN, monitor, :process, _pid, _reason}, state),
    do: collect(%{state | traffic: Traffic.written(state.traffic, monitor)})

  def handle_info(:collect, state), do: collect(state)

  def handle_info({:timeout, timer, what}, %{timer: timer} = state),
    do: timer_fired(what, %{state | timer: nil})

  # A death shows as an exit status, as an exit of the port (:epipe, when something was still to be
  # written), or both, in either order. The first ends the peer's time here; the second no longer
  # matches its port.
  def handle_info({port, {:exit_status, code}}, %{peer: %{port: port}} = state),
    do: {:noreply, peer_lost(state, "exit status #{code}")}

  def handle_info({:EXIT, port, reason}, %{peer: %{port: port}} = state),
    do: {:noreply, peer_lost(state, "its port closed: #{inspect(reason)}")}

  # A child of the peer's holds its output open, so that the port tells nothing.
  def handle_info({:peer_gone, os_pid}, %{peer: %{os_pid: os_pid}} = state),
    do: {:noreply, peer_lost(state, "it is gone")}

  # A process linked to this one that is not its parent (the parent's exit never gets here).
  def handle_info({:EXIT, pid, reason}, state) when is_pid(pid) and reason != :normal,
    do: {:stop, reason, state}

  def handle_info(_stale, state), do: {:noreply, state}

  # The peer sees end of input and may leave; what has not left soon is ended before this process
  # is, since the BEAM itself may be about to stop. One that does not read would never see the end
  # of input, and would keep the BEAM from stopping.
  @impl GenServer
  def terminate(_reason, %{peer: peer} = state) do
    if peer && Peer.blocked?(peer), do: Reaper.kill_all(state.reaper)
    if peer, do: Peer.close(peer)
    Traffic.fail_all(state.traffic, :bridge_not_running)
    Caller.forget_defaults(self())
    Reaper.finish(state.reaper)
  end

  @impl GenServer
  defdelegate format_status(status), to: Redaction

  ## Requests

  defp refuse(state, ref, failure, body) do
    Traffic.refuse(ref, failure)
    noreply(state, body)
  end

  # Hibernation is a collection that spares nothing, not even the message just handled.
  defp noreply(state, bytes) when byte_size(bytes) < @big_bytes, do: {:noreply, state}
  defp noreply(state, _big), do: {:noreply, %{state | big?: true}, :hibernate}

  # Again when a big request that had to queue may have been written: once, not for every frame.
  defp collect(%{big?: true} = state) do
    if Traffic.all_written?(state.traffic),
      do: {:noreply, %{state | big?: false}, :hibernate},
      else: {:noreply, state}
  end

  defp collect(state), do: {:noreply, state}

  defp abandon(state, id_or_ref),
    do: {:noreply, %{state | traffic: Traffic.abandon(state.traffic, id_or_ref)}}

  ## Replies

  defp reply_came(state, id, frame) do
    case Traffic.deliver(state.traffic, id, frame) do
      {:ok, traffic} ->
        %{state | traffic: traffic}

      :nobody when id == state.peer.ping_id and state.peer.up_at == nil ->
        peer_up(state)

      # Too late, twice, or never asked for.
      :nobody ->
        %{state | late_replies: state.late_replies + 1}
    end
  end

  # The first is logged, the rest counted: a peer that talks nonsense may do so a lot.
  defp unreadable_frame(state) do
    if state.unreadable_frames == 0,
      do: Report.log(state, :warning, "sent a frame without a readable id; more are only counted")

    %{state | unreadable_frames: state.unreadable_frames + 1}
  end

  ## The peer's life

  defp open(state) do
    case Peer.open(state.options) do
      {:ok, peer} ->
        Reaper.watch(state.reaper, peer.os_pid)
        {ping_id, traffic} = Traffic.attach(state.traffic, peer.port)
        peer = %{peer | ping_id: ping_id}

        state = %{state | peer: peer, traffic: traffic, opened: state.opened + 1}
        set_timer(state, state.options.start_timeout, :start_timeout)

      {:error, text} ->
        peer_lost(state, text)
    end
  end

  defp peer_up(state) do
    Report.log(state, :debug, "up after #{Peer.uptime_ms(state.peer)} ms")
    if state.big?, do: send(self(), :collect)
    state = %{state | status: :running, peer: Peer.up(state.peer), last_error: nil}
    %{cancel_timer(state) | traffic: Traffic.release(state.traffic)}
  end

  defp peer_lost(state, why) do
    state = %{state | last_error: why}

    of_use? = state.peer != nil and Peer.of_use?(state.peer, state.traffic.answered)

    case Backoff.died(state.backoff, not of_use?) do
      {:retry, delay, backoff} ->
        Report.death(state, :warning, "next attempt in #{delay} ms")
        set_timer(%{drop_peer(state) | backoff: backoff}, delay, :open)

      :give_up ->
        Report.death(state, :error, "given up")
        give_up(state)
    end
  end

  defp give_up(state) do
    state = drop_peer(state)
    traffic = Traffic.fail_all(state.traffic, :python_process_died)
    state = %{state | status: :failed, traffic: traffic}
    set_timer(state, @failed_ms, :stop)
  end

  # Ends the peer's time here: in flight fails, what was not written stays for the next peer.
  defp drop_peer(state) do
    if state.peer do
      Peer.close(state.peer)
      Reaper.kill(state.reaper, state.peer.os_pid)
    end

    state = %{cancel_timer(state) | traffic: Traffic.detach(state.traffic)}
    %{state | status: :restarting, peer: nil}
  end

  ## Time: a peer's life has one thing to wait for at a time

  defp timer_fired(:open, state), do: {:noreply, open(state)}

  defp timer_fired(:start_timeout, state) do
    why = "no answer to its first ping within #{state.options.start_timeout} ms"
    {:noreply, peer_lost(state, why)}
  end

  defp timer_fired(:stop, state),
    do: {:stop, {:shutdown, {:python_cannot_start, state.last_error}}, state}

  defp set_timer(state, ms, what),
    do: %{cancel_timer(state) | timer: :erlang.start_timer(ms, self(), what)}

  defp cancel_timer(%{timer: nil} = state), do: state

  defp cancel_timer(%{timer: timer} = state) do
    :erlang.cancel_timer(timer, async: true, info: false)
    %{state | timer: nil}
  end
end
