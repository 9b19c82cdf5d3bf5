defmodule DSPex.PythonBridge.Stub.Reply do
  @moduledoc false
  # What a stub sends in a peer's place, as the peer would write it: the frames of `DSPex.PythonBridge.Protocol`.

  alias DSPex.PythonBridge.{Error, Protocol}
  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.Protocol.Payload

  @typedoc "The result of a command, with strings as keys, and the metadata of a run."
  @type result :: {:ok, term(), map()} | {:error, Error.t()}

  @doc "The reply to the request with this id. `meta`: the metadata of all replies; nil if the request asked for none."
  @spec new(pos_integer(), result(), map() | nil) :: Request.reply()
  # It comes from a bridge.
  def new(_id, {:error, %Error{type: :python_process_died}}, _meta),
    do: {:error, :python_process_died}

  def new(id, {:error, %Error{} = error}, meta),
    do: {:frame, frame(id, Map.put(failure(error), "success", false), meta, error.meta || %{})}

  def new(id, {:ok, result, own}, meta),
    do: {:frame, frame(id, %{"success" => true, "result" => result}, meta, own)}

  defp frame(id, reply, meta, own) do
    reply = if meta, do: Map.put(reply, "meta", Map.merge(meta, own)), else: reply
    {success, rest} = Map.pop!(reply, "success")
    ~s({"id":#{id},"success":#{success},) <> tail(rest)
  end

  @doc "The keys of an error in a reply, or in a result of a list."
  @spec failure(Error.t()) :: map()
  def failure(%Error{type: type, message: message, retryable: retryable}) do
    error = %{"error" => message, "error_type" => type}

    if type == :lm_error or retryable != Error.new(type, message).retryable,
      do: Map.put(error, "retryable", retryable),
      else: error
  end

  @doc "The frame of a chunk; raises `ArgumentError` for one without a JSON form."
  @spec chunk(pos_integer(), map()) :: binary()
  def chunk(id, chunk), do: ~s({"id":#{id},) <> tail(%{"stream" => chunk})

  @doc "The frame of a tool call; raises `ArgumentError` for arguments without a JSON form."
  @spec tool_call(pos_integer(), Protocol.id(), String.t(), map()) :: binary()
  def tool_call(id, call_id, name, args) do
    call = %{"call_id" => call_id, "name" => name, "args" => args}
    ~s({"id":#{id},) <> tail(%{"tool_call" => call})
  end

  defp tail(%{} = rest) do
    case Payload.encode(rest, "stub") do
      {:ok, json} -> json |> IO.iodata_to_binary() |> after_brace()
      {:error, error} -> raise ArgumentError, error.message
    end
  end

  defp after_brace("{" <> tail), do: tail
end
