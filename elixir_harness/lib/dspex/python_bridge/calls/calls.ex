defmodule DSPex.PythonBridge.Calls do
  @moduledoc false
  # Part of the process of a bridge: requests come in here and are answered here, each exactly once. Which peer
  # gets which request, and when, is `DSPex.PythonBridge.Calls.Dispatcher`'s; what is sent between a request and its
  # reply is `DSPex.PythonBridge.Calls.Events`'.

  alias DSPex.PythonBridge.{Calls, Programs, Protocol}
  alias DSPex.PythonBridge.Calls.{Dispatcher, InFlight, Request}
  alias DSPex.PythonBridge.OTP.Deadline

  @doc "Accepts a request."
  @spec accept(InFlight.t(), Request.t()) :: InFlight.t()
  def accept(%InFlight{to: nil} = in_flight, %Request{retry: :pool} = request),
    do: InFlight.refuse(in_flight, request, {:died, :unsent})

  def accept(%InFlight{next_id: id} = in_flight, %Request{} = request) do
    request = %{
      request
      | watch: watch(request, id),
        deadline: Deadline.new(request.timeout),
        change: request.change && stamped(request.change),
        at: Dispatcher.free_peer(in_flight, request),
        told?: false,
        streamed?: false,
        bound?: false
    }

    tap(Dispatcher.offer(in_flight, id, request), &InFlight.show_load/1)
  end

  # A caller keeps its own time, and is monitored; a cast has no caller that could.
  defp watch(%Request{pid: nil, timeout: timeout}, id),
    do: {:timer, :erlang.start_timer(timeout, self(), {:cast, id})}

  defp watch(%Request{pid: pid}, id),
    do: {:monitor, :erlang.monitor(:process, pid, tag: {:caller_down, id})}

  # In the order in which this bridge gets them, unless a pool has stamped them.
  defp stamped({kind, ids, nil}), do: {kind, ids, Programs.Store.stamp()}
  defp stamped(change), do: change

  @doc """
  Ends a call, by its id or the alias of its caller, that nobody waits for any longer. A request that still waits to
  be written is taken back; another is cancelled in the peer, whose reply is then dropped.
  """
  @spec abandon(InFlight.t(), pos_integer() | reference()) :: InFlight.t()
  def abandon(%InFlight{} = in_flight, ref) when is_reference(ref) do
    {id, calls} = Calls.Table.id_of(in_flight.calls, ref)
    in_flight = %{in_flight | calls: calls}
    # Without one the reply was sent first; the alias has ended.
    if id, do: abandon(in_flight, id), else: in_flight
  end

  def abandon(%InFlight{} = in_flight, id) do
    case InFlight.take_out(in_flight, id) do
      {nil, in_flight} ->
        in_flight

      {request, in_flight} ->
        in_flight |> suspect_silence(request) |> Dispatcher.withdraw(id, request)
    end
  end

  # A peer that hangs would look idle, since each abandoned call is counted out. A peer that works sends
  # something soon, if only the reply to the cancel.
  defp suspect_silence(
         %InFlight{slot: {_counters, _index, _coordinator, monitor}, to: port} = in_flight,
         %Request{at: port}
       )
       when port != nil do
    GenServer.cast(monitor, :unanswered)
    show_silence(in_flight, true)
  end

  defp suspect_silence(in_flight, _request), do: in_flight

  @doc "Ends the suspicion of silence: the peer that serves has sent something."
  @spec heard(InFlight.t()) :: InFlight.t()
  def heard(%InFlight{slot: {_counters, _index, _coordinator, monitor}} = in_flight) do
    GenServer.cast(monitor, :heard)
    show_silence(in_flight, false)
  end

  defp show_silence(in_flight, silent?),
    do: tap(%{in_flight | silent?: silent?}, &InFlight.show_load/1)

  @doc """
  Sends a reply to its caller; `:nobody` if no call has this id (any longer), or it is a change of the programs that is
  at another peer by now.
  """
  @spec deliver(InFlight.t(), port(), pos_integer(), binary()) :: {:ok, InFlight.t()} | :nobody
  def deliver(%InFlight{} = in_flight, port, id, frame) do
    case Calls.Table.get(in_flight.calls, id) do
      nil ->
        :nobody

      %Request{change: change, at: at} when change != nil and at != port ->
        :nobody

      request ->
        {_request, in_flight} = InFlight.take_out(in_flight, id)
        if request.change, do: note_change(in_flight, request.change, request.body, frame)
        InFlight.answer(request, {:frame, frame})
        {:ok, Dispatcher.answered(in_flight, request)}
    end
  end

  @doc "Makes the serving peer follow a change that another one has made and that the store has."
  @spec follow(InFlight.t(), Programs.Store.change(), binary()) :: InFlight.t()
  def follow(%InFlight{} = in_flight, {:create, _id, _stamp}, body),
    do: Dispatcher.tell(in_flight, Programs.Definition.lazy(body))

  def follow(%InFlight{} = in_flight, {:cleanup, _ids, _stamp}, body),
    do: Dispatcher.tell(in_flight, body)

  defp note_change(in_flight, change, body, frame) do
    if Protocol.success?(frame),
      do: Programs.Store.apply_change(in_flight.programs, change, body)
  end
end
