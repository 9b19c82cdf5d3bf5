defmodule DSPex.PythonBridge.Calls do
  @moduledoc false
  # Part of the process of a bridge: requests come in here and are answered here, each exactly once, and what a peer and
  # a caller send each other in between is passed on. Which peer gets which request, and when, is
  # `DSPex.PythonBridge.Calls.Dispatcher`'s.
  #
  # A chunk or a tool call belongs to a call at one peer: after the call has been sent to another peer, messages to or from
  # its earlier peer are ignored.

  alias DSPex.PythonBridge.{Programs, Protocol}
  alias DSPex.PythonBridge.Calls.{Dispatcher, InFlight, Journal, Request, SendQueue}
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Tools.Invocation

  @doc "Accepts a request."
  @spec accept(InFlight.t(), Request.t()) :: InFlight.t()
  def accept(%InFlight{to: nil} = in_flight, %Request{resend: :caller} = request) do
    InFlight.refuse(in_flight, request, {:died, :unsent})
    in_flight
  end

  def accept(%InFlight{next_id: id} = in_flight, %Request{} = request) do
    request = %{
      request
      | watch: watch(request, id),
        deadline: Deadline.new(request.timeout),
        change: request.change && stamped(in_flight.programs, request.change)
    }

    tap(Dispatcher.offer(in_flight, id, request), &InFlight.show_load/1)
  end

  # A caller keeps its own time, and is monitored; a cast has no caller that could.
  defp watch(%Request{pid: nil, timeout: timeout}, id),
    do: {:timer, :erlang.start_timer(timeout, self(), {:cast, id})}

  defp watch(%Request{pid: pid}, id),
    do: {:monitor, :erlang.monitor(:process, pid, tag: {:caller_down, id})}

  # In the order in which this bridge gets them.
  defp stamped(programs, {kind, ids, nil}), do: {kind, ids, Programs.Store.stamp(programs, ids)}

  @doc """
  Ends a call, by its id or the alias of its caller, that nobody waits for any longer. A request that still waits to
  be written is taken back; another is cancelled in the peer, whose reply is then dropped.
  """
  @spec abandon(InFlight.t(), pos_integer() | reference()) :: InFlight.t()
  def abandon(%InFlight{} = in_flight, ref) when is_reference(ref) do
    {id, in_flight} = InFlight.id_of(in_flight, ref)
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
  defp suspect_silence(%InFlight{to: port, observer: {_, _}} = in_flight, %Request{at: port})
       when port != nil,
       do: InFlight.silent(in_flight, true)

  defp suspect_silence(in_flight, _request), do: in_flight

  @doc """
  Sends a reply to its caller; `:nobody` if no call has this id (any longer), or it is a change of the programs that is
  at another peer by now.
  """
  @spec deliver(InFlight.t(), SendQueue.transport(), pos_integer(), binary()) ::
          {:ok, InFlight.t()} | :nobody
  def deliver(%InFlight{} = in_flight, port, id, frame) do
    case Map.get(in_flight.calls, id) do
      nil ->
        :nobody

      %Request{change: change, at: at} when change != nil and at != port ->
        :nobody

      request ->
        {_request, in_flight} = InFlight.take_out(in_flight, id)
        if request.change, do: note_change(in_flight, request.change, request.body, frame)
        InFlight.answer(request, {:frame, frame})

        # It may be at another peer by now, which need not go on.
        if request.at == port,
          do: {:ok, Dispatcher.answered(in_flight, request)},
          else: {:ok, Dispatcher.withdraw(in_flight, id, request)}
    end
  end

  # Before the caller has its reply.
  defp note_change(in_flight, change, body, frame) do
    if Protocol.success?(frame) do
      Programs.Store.apply_change(in_flight.programs, change, body)
      InFlight.notify(in_flight, {:changed, change, body})
    end
  end

  ## Between a request and its reply

  @doc "Sends a chunk to its caller; `:nobody` if no caller takes it (any longer)."
  @spec chunk(InFlight.t(), SendQueue.transport(), pos_integer(), binary()) ::
          :ok | :nobody
  def chunk(%InFlight{calls: calls}, port, id, frame) do
    case Map.get(calls, id) do
      %Request{at: ^port, stream?: true, ref: ref} ->
        # DSPex.PythonBridge.Client.StreamProxy waits for it, and for what comes below.
        send(ref, {ref, :chunk, frame})
        :ok

      _none ->
        :nobody
    end
  end

  @doc "Keeps an entry of a run's journal, and sends it to the caller; `:nobody` if the run has none (any longer)."
  @spec journal(InFlight.t(), SendQueue.transport(), pos_integer(), binary()) ::
          {:ok, InFlight.t()} | :nobody
  def journal(%InFlight{calls: calls} = in_flight, port, id, entry) do
    case Map.get(calls, id) do
      %Request{at: ^port, journal: %Journal{} = journal, ref: ref} = request ->
        send(ref, {ref, :journal, entry})
        {:ok, InFlight.put(in_flight, id, %{request | journal: Journal.add(journal, entry)})}

      _none ->
        :nobody
    end
  end

  @doc "Passes a tool call to the caller that has the tools, or refuses it."
  @spec tool_call(InFlight.t(), Invocation.t()) :: :ok
  def tool_call(%InFlight{calls: calls}, %Invocation{id: id, port: port} = tool_call) do
    case Map.get(calls, id) do
      %Request{at: ^port, tools?: true, ref: ref} -> send(ref, {ref, :tool_call, tool_call})
      %Request{at: ^port} -> Invocation.refuse(tool_call, :not_given)
      _none -> Invocation.refuse(tool_call, :over)
    end

    :ok
  end

  @doc """
  Makes a call one that is not resent: a tool begins that must not be called twice. `:over` if the call is no longer at
  this peer, so that the tool must not begin for it.
  """
  @spec bind(InFlight.t(), SendQueue.transport(), pos_integer()) :: {:ok | :over, InFlight.t()}
  def bind(%InFlight{calls: calls} = in_flight, port, id) do
    case Map.get(calls, id) do
      %Request{at: ^port} = request ->
        journal = Journal.drop(request.journal)
        request = %{request | body: "", journal: journal, resend: :tool_begun}
        {:ok, InFlight.put(in_flight, id, request)}

      _none ->
        {:over, in_flight}
    end
  end

  @doc """
  Sends the result of a tool to the peer that called it, if that still has the call of this id (nil: in any case).
  """
  @spec tool_result(InFlight.t(), SendQueue.transport(), pos_integer() | nil, binary()) ::
          InFlight.t()
  def tool_result(%InFlight{} = in_flight, port, id, frame) do
    if id == nil or match?(%Request{at: ^port}, Map.get(in_flight.calls, id)),
      do: Dispatcher.control(in_flight, port, frame),
      else: in_flight
  end
end
