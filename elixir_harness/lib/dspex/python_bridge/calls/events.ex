defmodule DSPex.PythonBridge.Calls.Events do
  @moduledoc """
  What a peer and a caller have to say to each other between a request and its reply: part of
  `DSPex.PythonBridge.Calls.InFlight`.

  All of it belongs to a call at a peer. A call that has been sent to another peer since is begun anew
  there, and what its first peer says, or is told, is about nothing any more.
  """

  alias DSPex.PythonBridge.Calls
  alias DSPex.PythonBridge.Calls.{Dispatcher, InFlight, SendQueue}
  alias DSPex.PythonBridge.Calls.Table.Call
  alias DSPex.PythonBridge.Tools.Invocation

  @doc "Hands a chunk to its caller; `:nobody` if there is none (any more)."
  @spec chunk(InFlight.t(), port(), pos_integer(), binary()) :: {:ok, InFlight.t()} | :nobody
  def chunk(%InFlight{calls: calls} = in_flight, port, id, frame) do
    case Calls.Table.get(calls, id) do
      %Call{at: ^port, stream?: true} = call ->
        # What the receive in DSPex.PythonBridge.Client.StreamProxy waits for, as in the next function.
        send(call.ref, {call.ref, :chunk, frame})

        if call.begun?,
          do: {:ok, in_flight},
          else: {:ok, %{in_flight | calls: Calls.Table.replace(calls, id, begun(call))}}

      _none ->
        :nobody
    end
  end

  # It is not sent again, so that only a change of the programs has any use for the body.
  defp begun(%Call{what: nil} = call), do: %{call | begun?: true, body: ""}
  defp begun(call), do: %{call | begun?: true}

  @doc "Has a tool called, or the peer told why it is not."
  @spec tool_call(InFlight.t(), Invocation.t()) :: :ok
  def tool_call(%InFlight{calls: calls}, %Invocation{id: id, port: port} = tool_call) do
    case Calls.Table.get(calls, id) do
      %Call{at: ^port, tools?: true, ref: ref} -> send(ref, {ref, :tool_call, tool_call})
      %Call{at: ^port} -> Invocation.refuse(tool_call, :not_given)
      _none -> Invocation.refuse(tool_call, :over)
    end

    :ok
  end

  @doc """
  Sends the result of a tool to the peer that asked for it, if that still has the call of this id (nil:
  in any case).
  """
  @spec tool_result(InFlight.t(), port(), pos_integer() | nil, binary()) :: InFlight.t()
  def tool_result(%InFlight{} = in_flight, port, id, frame) do
    if id == nil or match?(%Call{at: ^port}, Calls.Table.get(in_flight.calls, id)),
      do: Dispatcher.control(in_flight, port, frame, id),
      else: in_flight
  end

  @doc """
  A call is over: results of its tools that still wait to be written interest nobody. The calling process
  is sent `{:dropped, bytes}` if there were any.
  """
  @spec over(InFlight.t(), pos_integer(), Call.t()) :: InFlight.t()
  def over(%InFlight{send_queues: send_queues} = in_flight, id, %Call{tools?: true, at: port})
      when is_map_key(send_queues, port) do
    {bytes, send_queue} = SendQueue.drop_about(Map.fetch!(send_queues, port), id)
    if bytes > 0, do: send(self(), {:dropped, bytes})
    %{in_flight | send_queues: %{send_queues | port => send_queue}}
  end

  def over(in_flight, _id, _call), do: in_flight
end
