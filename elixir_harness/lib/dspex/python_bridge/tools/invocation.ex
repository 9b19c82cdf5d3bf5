defmodule DSPex.PythonBridge.Tools.Invocation do
  @moduledoc false
  # One call of a tool by a peer, from its frame to the frame of the result, in a process of its own.
  #
  # Whatever the function does, there is one answer: its result, or an error message. The peer shows the message to its
  # LM, so it is short and has no stack trace.

  alias DSPex.PythonBridge.{Error, Protocol}
  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Tools.FunctionHolder

  # Of an error message.
  @max_text 500
  @max_name 80

  @enforce_keys [:port, :id, :frame, :max_frame_bytes]
  defstruct [:port, :id, :frame, :max_frame_bytes]

  @typedoc """
  `port`: of the peer that calls, the only one that gets the result. `id`: of the call that it runs; with nil the
  result is sent even if that is over.
  """
  @type t :: %__MODULE__{
          port: port(),
          id: pos_integer() | nil,
          frame: binary(),
          max_frame_bytes: pos_integer()
        }
  @typedoc "The message to the bridge: the frame of a result, or that the call could not be read."
  @type answer :: {:tool_result, port(), pos_integer() | nil, binary()} | :unreadable_frame
  @typedoc "Takes the arguments, a map with string keys."
  @type tool :: (map() -> term())
  @type bridge :: pid() | {atom(), node()}

  @doc """
  Calls the function, in the calling process, and sends the answer to the proxy that started it.
  """
  @spec run(t(), holder :: pid(), {proxy :: pid(), callers :: [pid()]}) :: :ok
  def run(%__MODULE__{} = call, holder, {proxy, callers}) do
    Process.put(:"$callers", callers)
    answer = ServerGuard.run(fn -> answer(call, &apply_tool({holder, proxy}, &1, &2)) end)
    send(proxy, {:answered, self(), answer})
    :ok
  end

  defp apply_tool({holder, proxy}, name, args) do
    case FunctionHolder.fetch(holder, proxy, name) do
      {:ok, function} ->
        outcome(function, args)

      {:error, names} ->
        names = Enum.join(names, ", ")
        {:error, "tool #{brief(name)}: it was not given in :tools, which has #{names}"}

      :over ->
        {:error, over(name)}
    end
  end

  @doc "Answers a call whose process has ended without an answer."
  @spec fail(t(), bridge(), reason :: term()) :: :ok
  def fail(%__MODULE__{} = call, bridge, reason),
    do: answer_aside(call, bridge, fn _name, _args -> {:error, caught(:exit, reason, [])} end)

  @doc """
  Answers, for the bridge, a tool call that no process makes: the run was called without `:tools`, or is over.
  """
  @spec refuse(t(), :not_given | :over) :: :ok
  def refuse(%__MODULE__{} = call, why) do
    answer_aside(%{call | id: nil}, self(), fn name, _args ->
      if why == :over,
        do: {:error, over(name)},
        else: {:error, "tool #{brief(name)}: :tools was not given for this call"}
    end)
  end

  defp over(name), do: "tool #{brief(name)}: the call that it belongs to is over"

  # In a process of its own: frames may be large.
  defp answer_aside(call, bridge, make) do
    spawn(fn -> ServerGuard.run(fn -> send(bridge, answer(call, make)) end) end)
    :ok
  end

  ## From frame to frame

  @spec answer(t(), (String.t(), map() -> {:ok, term()} | {:error, String.t()})) :: answer()
  defp answer(%__MODULE__{} = call, make) do
    case Protocol.decode_tool_call(call.frame) do
      {:ok, call_id, name, args} ->
        {:tool_result, call.port, call.id, result_frame(call, call_id, name, make.(name, args))}

      {:error, call_id, text} ->
        {:ok, frame} = Protocol.encode_tool_result(call_id, {:error, text})
        {:tool_result, call.port, call.id, frame}

      {:error, _reason} ->
        :unreadable_frame
    end
  end

  defp result_frame(%__MODULE__{max_frame_bytes: max}, call_id, name, result) do
    case Protocol.encode_tool_result(call_id, result) do
      {:ok, frame} when byte_size(frame) <= max -> frame
      {:ok, frame} -> error_frame(call_id, name, too_large(byte_size(frame), max))
      {:error, %Error{message: text}} -> error_frame(call_id, name, text)
    end
  end

  defp too_large(size, max), do: "result: its frame has #{size} bytes; max_frame_bytes is #{max}"

  defp error_frame(call_id, name, text) do
    {:ok, frame} =
      Protocol.encode_tool_result(call_id, {:error, "tool #{brief(name)}: #{one_line(text)}"})

    frame
  end

  ## From what a function does to a result

  # An exception must not end this process: it would be logged, with the arguments.
  defp outcome(function, args) do
    case function.(args) do
      {:ok, term} -> {:ok, term}
      {:error, reason} -> {:error, text(reason)}
      term -> {:ok, term}
    end
  catch
    kind, reason -> {:error, caught(kind, reason, __STACKTRACE__)}
  end

  # A string is meant for the LM as it is.
  defp text(reason) when is_binary(reason), do: reason
  defp text(reason) when is_exception(reason), do: one_line(Exception.message(reason))
  defp text(reason), do: one_line(inspect(reason))

  # Messages of exceptions and inspections are user code, too.
  defp caught(kind, reason, stacktrace) do
    one_line(shown(kind, reason, stacktrace))
  catch
    _kind, _reason -> "#{kind}: a reason that cannot be shown"
  end

  defp shown(:error, reason, stacktrace) do
    error = Exception.normalize(:error, reason, stacktrace)
    "#{inspect(error.__struct__)}: #{Exception.message(error)}"
  end

  defp shown(:throw, value, _stacktrace), do: "throw: #{inspect(value)}"

  # The exit reason of a process that raised has a stack trace, and that of a failed call its arguments: neither is for
  # an LM.
  defp shown(:exit, {error, stack}, _stacktrace) when is_exception(error) and is_list(stack),
    do: shown(:error, error, stack)

  defp shown(:exit, {reason, {module, function, args}}, _stacktrace)
       when is_atom(module) and is_atom(function) and is_list(args),
       do: shown(:exit, reason, [])

  defp shown(:exit, {reason, [{_module, _function, _args, _where} | _]}, _stacktrace),
    do: shown(:exit, reason, [])

  defp shown(:exit, reason, _stacktrace), do: "exit: #{inspect(reason)}"

  defp one_line(text, max \\ @max_text) do
    text
    # First, since it may be very long.
    |> binary_part(0, min(byte_size(text), 4 * max))
    |> String.replace_invalid()
    |> String.replace(~r/[[:space:][:cntrl:]]+/u, " ")
    |> String.slice(0, max)
  end

  defp brief(name), do: one_line(name, @max_name)
end
