defmodule DSPex.PythonBridge.Calls.Events do
  @moduledoc false
  # What a peer and a caller send each other between a request and its reply. All of it belongs to a call at one
  # peer: after the call has been sent to another peer, messages to or from its earlier peer are ignored.

  alias DSPex.PythonBridge.{Calls, Protocol}
  alias DSPex.PythonBridge.Calls.{Dispatcher, InFlight, Request}
  alias DSPex.PythonBridge.Tools.Invocation

  @doc "Sends a chunk to its caller; `:nobody` if no caller takes it (any longer)."
  @spec chunk(InFlight.t(), port(), pos_integer(), binary()) :: {:ok, InFlight.t()} | :nobody
  def chunk(%InFlight{calls: calls} = in_flight, port, id, frame) do
    case Calls.Table.get(calls, id) do
      %Request{at: ^port, stream?: true} = request ->
        # DSPex.PythonBridge.Client.StreamProxy waits for it, and for the tool calls below.
        send(request.ref, {request.ref, :chunk, frame})

        {:ok, note_chunk(in_flight, id, request, frame)}

      _none ->
        :nobody
    end
  end

  # After the first one that cannot be taken back the others are not looked at.
  defp note_chunk(in_flight, _id, %Request{streamed?: true}, _frame), do: in_flight

  defp note_chunk(in_flight, id, request, frame) do
    cond do
      not Protocol.repeatable?(frame) ->
        replace(in_flight, id, %{without_body(request) | streamed?: true})

      request.told? ->
        in_flight

      true ->
        replace(in_flight, id, %{request | told?: true})
    end
  end

  @doc "Tells the caller of a call that is sent again, if it has been sent something."
  @spec restarted(Request.t()) :: :ok
  def restarted(%Request{told?: false}), do: :ok

  def restarted(%Request{ref: ref}) do
    send(ref, {ref, :chunk, Protocol.restarted_chunk()})
    :ok
  end

  # It is not sent again, so only a change of the programs needs the body.
  defp without_body(%Request{change: nil} = request), do: %{request | body: ""}
  defp without_body(request), do: request

  defp replace(%InFlight{calls: calls} = in_flight, id, request),
    do: %{in_flight | calls: Calls.Table.replace(calls, id, request)}

  @doc "Passes a tool call to the caller that has the tools, or refuses it."
  @spec tool_call(InFlight.t(), Invocation.t()) :: :ok
  def tool_call(%InFlight{calls: calls}, %Invocation{id: id, port: port} = tool_call) do
    case Calls.Table.get(calls, id) do
      %Request{at: ^port, tools?: true, ref: ref} ->
        send(ref, {ref, :tool_call, tool_call})

      %Request{at: ^port} ->
        Invocation.refuse(tool_call, :not_given)

      _none ->
        Invocation.refuse(tool_call, :over)
    end

    :ok
  end

  @doc """
  Makes a call one that is not sent again: a tool begins that must not be called twice. `:over` if the call is no longer at
  this peer, so that the tool must not begin for it.
  """
  @spec bind(InFlight.t(), port(), pos_integer()) :: {:ok | :over, InFlight.t()}
  def bind(%InFlight{calls: calls} = in_flight, port, id) do
    case Calls.Table.get(calls, id) do
      %Request{at: ^port} = request ->
        {:ok, replace(in_flight, id, %{without_body(request) | bound?: true})}

      _none ->
        {:over, in_flight}
    end
  end

  @doc """
  Sends the result of a tool to the peer that called it, if that still has the call of this id (nil: in any case).
  """
  @spec tool_result(InFlight.t(), port(), pos_integer() | nil, binary()) :: InFlight.t()
  def tool_result(%InFlight{} = in_flight, port, id, frame) do
    if id == nil or match?(%Request{at: ^port}, Calls.Table.get(in_flight.calls, id)),
      do: Dispatcher.control(in_flight, port, frame, id),
      else: in_flight
  end
end
