defmodule DSPex.PythonBridge.Tools.Invocation do
  @moduledoc """
  One call of a tool by a peer, from its frame to the frame of the result, in a process of its own.

  Whatever the function does, there is one answer: its result, or a text that says what came in place
  of one. The peer shows the text to its LM, so it is short and has no stack trace.
  """

  alias DSPex.PythonBridge.{Error, Protocol}
  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Tools.FunctionHolder

  # Of what was raised, thrown or exited with.
  @max_text 500
  @max_name 80

  @enforce_keys [:port, :id, :frame, :max_frame_bytes]
  defstruct [:port, :id, :frame, :max_frame_bytes]

  @typedoc """
  `port`: of the peer that calls, the only one that is to get the result. `id`: of the call that it
  executes; nil: the result is to be sent whether that is over or not.
  """
  @type t :: %__MODULE__{
          port: port(),
          id: pos_integer() | nil,
          frame: binary(),
          max_frame_bytes: pos_integer()
        }
  @typedoc "For the bridge: the frame of a result, or that there is none."
  @type answer :: {:tool_result, port(), pos_integer() | nil, binary()} | :unreadable_frame
  @typedoc "Takes the arguments, a map with string keys."
  @type tool :: (map() -> term())
  @type bridge :: pid() | {atom(), node()}

  @doc """
  Calls the function, in the calling process, and sends the answer to `host`, the process that started this
  one.
  """
  @spec run(t(), holder :: pid(), {host :: pid(), callers :: [pid()]}) :: :ok
  def run(%__MODULE__{} = call, holder, {host, callers}) do
    Process.put(:"$callers", callers)
    answer = ServerGuard.run(fn -> answer(call, &apply_tool(holder, &1, &2)) end)
    send(host, {:answered, self(), answer})
    :ok
  end

  defp apply_tool(holder, name, args) do
    case FunctionHolder.fetch(holder, name) do
      {:ok, function} ->
        outcome(function, args)

      {:error, names} ->
        names = Enum.join(names, ", ")
        {:error, "tool #{brief(name)}: it was not given in :tools, which has #{names}"}

      :over ->
        {:error, over(name)}
    end
  end

  @doc "Answers a call whose process has ended without doing so."
  @spec fail(t(), bridge(), reason :: term()) :: :ok
  def fail(%__MODULE__{} = call, bridge, reason),
    do: answer_aside(call, bridge, fn _name, _args -> {:error, caught(:exit, reason, [])} end)

  @doc """
  For the bridge: answers a call that has nobody to make it, because the execute was called without
  `:tools`, or is over.
  """
  @spec refuse(t(), :not_given | :over) :: :ok
  def refuse(%__MODULE__{} = call, :not_given) do
    answer_aside(%{call | id: nil}, self(), fn name, _args ->
      {:error, "tool #{brief(name)}: :tools was not given for this call"}
    end)
  end

  def refuse(%__MODULE__{} = call, :over) do
    answer_aside(%{call | id: nil}, self(), fn name, _args ->
      {:error, over(name)}
    end)
  end

  defp over(name), do: "tool #{brief(name)}: the call that it belongs to is over"

  # Not in the process that found it out: frames may be large.
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

  # Whatever it raises, throws or exits with is no end of this process, so that nothing is logged: the
  # arguments would be, too.
  defp outcome(function, args) do
    case function.(args) do
      {:ok, term} -> {:ok, term}
      {:error, reason} -> {:error, text(reason)}
      term -> {:ok, term}
    end
  catch
    kind, reason -> {:error, caught(kind, reason, __STACKTRACE__)}
  end

  # A text is the function's own, meant as it is.
  defp text(reason) when is_binary(reason), do: reason
  defp text(reason) when is_exception(reason), do: one_line(Exception.message(reason))
  defp text(reason), do: one_line(inspect(reason))

  # What is shown here is code of the host's, too: an exception's message, an inspection.
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

  # What a process ends with that was raised in, or called another in vain, has its stack trace in it, or
  # the arguments of that call: not for an LM's eyes.
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
    # Before anything looks at all of it.
    |> binary_part(0, min(byte_size(text), 4 * max))
    |> String.replace_invalid()
    |> String.replace(~r/[[:space:][:cntrl:]]+/u, " ")
    |> String.slice(0, max)
  end

  defp brief(name), do: one_line(name, @max_name)
end
