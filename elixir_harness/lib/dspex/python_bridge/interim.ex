defmodule DSPex.PythonBridge.Interim do
  @moduledoc """
  What a peer and a caller have to say to each other between a request and its reply: part of
  `DSPex.PythonBridge.Traffic`.

  All of it belongs to a call at a peer. A call that has been sent to another peer since is begun anew
  there, and what its first peer says, or is told, is about nothing any more.
  """

  alias DSPex.PythonBridge.{Calls, Dispatch, ToolCall, Traffic}
  alias DSPex.PythonBridge.Calls.Call

  @doc """
  Hands a chunk to its caller; `:nobody` if there is none (any more). From the first chunk on the call
  cannot be begun anew.
  """
  @spec chunk(Traffic.t(), port(), pos_integer(), binary()) :: {:ok, Traffic.t()} | :nobody
  def chunk(%Traffic{calls: calls} = traffic, port, id, frame) do
    case Calls.get(calls, id) do
      %Call{at: ^port, stream?: true} = call ->
        # What the receive in DSPex.PythonBridge.Relay waits for, as in the next function.
        send(call.ref, {call.ref, :chunk, frame})

        if call.retry == :never,
          do: {:ok, traffic},
          else: {:ok, %{traffic | calls: Calls.replace(calls, id, %{call | retry: :never})}}

      _none ->
        :nobody
    end
  end

  @doc "Has a tool called, or the peer told why it is not."
  @spec tool_call(Traffic.t(), ToolCall.t()) :: :ok
  def tool_call(%Traffic{calls: calls}, %ToolCall{id: id, port: port} = tool_call) do
    case Calls.get(calls, id) do
      %Call{at: ^port, tools?: true, ref: ref} -> send(ref, {ref, :tool_call, tool_call})
      %Call{at: ^port} -> ToolCall.refuse(tool_call, :not_given)
      _none -> ToolCall.refuse(tool_call, :over)
    end

    :ok
  end

  @doc """
  Sends the result of a tool to the peer that asked for it, if that still has the call of this id (nil:
  in any case). To another peer the same `call_id` may mean another tool.
  """
  @spec tool_result(Traffic.t(), port(), pos_integer() | nil, binary()) :: Traffic.t()
  def tool_result(%Traffic{} = traffic, port, id, frame) do
    if id == nil or match?(%Call{at: ^port}, Calls.get(traffic.calls, id)),
      do: Dispatch.control(traffic, port, frame),
      else: traffic
  end
end
