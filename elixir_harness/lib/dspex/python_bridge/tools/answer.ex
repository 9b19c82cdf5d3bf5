defmodule DSPex.PythonBridge.Tools.Answer do
  @moduledoc false
  # What a peer gets for a tool call: the frame of a result, or of an error message. The peer shows the message to its
  # LM, so it is short and has no stack trace.
  #
  # A remembered answer is kept as the frame that was sent: binaries of its size are not copied between processes.

  alias DSPex.PythonBridge.{Error, Protocol}
  alias DSPex.PythonBridge.Telemetry.Metadata

  # Of an error message.
  @max_text 500
  @max_name 80

  @enforce_keys [:frame, :call_id, :result]
  defstruct [:frame, :call_id, :result]

  @type t :: %__MODULE__{frame: binary(), call_id: Protocol.id(), result: :ok | :error}
  @typedoc "What a function has made: a term, or the message of an error."
  @type result :: {:ok, term()} | {:error, String.t()}
  @typedoc "The function has ended the whole run: the peer gets no answer, and the caller this text."
  @type end_of_run :: {:end_run, String.t()}
  @type kind :: :error | :exit | :throw

  @doc "The answer with a function's result, of at most `max` bytes: with an error message if it is larger."
  @spec new(Protocol.id(), String.t(), result(), pos_integer()) :: t()
  def new(call_id, name, {kind, _value} = result, max) do
    case Protocol.encode_tool_result(call_id, result) do
      {:ok, frame} when byte_size(frame) <= max ->
        %__MODULE__{frame: frame, call_id: call_id, result: kind}

      {:ok, frame} ->
        text = "result: its frame has #{byte_size(frame)} bytes; max_frame_bytes is #{max}"
        error(call_id, about(name, text))

      {:error, %Error{message: text}} ->
        error(call_id, about(name, text))
    end
  end

  @doc "The answer with an error message, which has a JSON form."
  @spec error(Protocol.id(), String.t()) :: t()
  def error(call_id, text) do
    {:ok, frame} = Protocol.encode_tool_result(call_id, {:error, text})
    %__MODULE__{frame: frame, call_id: call_id, result: :error}
  end

  @doc "The same answer to another call."
  @spec to(t(), Protocol.id()) :: t()
  def to(%__MODULE__{} = answer, call_id) do
    frame = Protocol.readdress_tool_result(answer.frame, answer.call_id, call_id)
    %{answer | frame: frame, call_id: call_id}
  end

  @doc "An error message about a tool."
  @spec about(String.t(), String.t()) :: String.t()
  def about(name, text), do: "tool #{one_line(name, @max_name)}: #{one_line(text)}"

  @doc "A string of one line, which is valid UTF-8 and not long."
  @spec one_line(binary(), pos_integer()) :: String.t()
  def one_line(text, max \\ @max_text) do
    text
    # First, since it may be very long.
    |> binary_part(0, min(byte_size(text), 4 * max))
    |> String.replace_invalid()
    |> String.replace(~r/[[:space:][:cntrl:]]+/u, " ")
    |> String.slice(0, max)
  end

  ## What a function does

  @doc """
  Calls a function: its result, and whether it returned, or else what it raised. That must not end this process: it would be
  logged, with the arguments.
  """
  @spec of((-> term())) ::
          {result() | end_of_run(), :returned | {kind(), term(), Exception.stacktrace()}}
  def of(function) do
    case function.() do
      {:ok, term} -> {{:ok, term}, :returned}
      {:error, reason} -> {{:error, text(reason)}, :returned}
      term -> {{:ok, term}, :returned}
    end
  catch
    :throw, {__MODULE__, :end_run, text} ->
      {{:end_run, text}, :returned}

    kind, reason ->
      {{:error, message(kind, reason, __STACKTRACE__)}, {kind, reason, __STACKTRACE__}}
  end

  @doc "Ends the run whose tool's function calls this, for `DSPex.PythonBridge.Durable`."
  @spec end_run(String.t()) :: no_return()
  def end_run(text), do: throw({__MODULE__, :end_run, text})

  # A string is meant for the LM as it is.
  defp text(reason) when is_binary(reason), do: reason
  defp text(reason) when is_exception(reason), do: one_line(Exception.message(reason))
  defp text(reason), do: one_line(inspect(reason))

  # It calls user code: messages, inspections.
  defp message(kind, reason, stacktrace) do
    one_line(shown(kind, reason, stacktrace))
  catch
    _kind, _reason -> "#{kind}: a reason that cannot be shown"
  end

  defp shown(:error, reason, stacktrace) do
    error = Exception.normalize(:error, reason, stacktrace)
    "#{inspect(error.__struct__)}: #{Exception.message(error)}"
  end

  defp shown(:throw, value, _stacktrace), do: "throw: #{inspect(value)}"

  defp shown(:exit, reason, _stacktrace) do
    case cause(reason) do
      error when is_exception(error) -> shown(:error, error, [])
      reason -> ended(reason)
    end
  end

  @doc "The message of a process that was ended from outside. It calls no user code."
  @spec ended(term()) :: String.t()
  def ended(reason), do: "exit: #{inspect(Metadata.reason(cause(reason)))}"

  # The exit reason of a process that raised has a stack trace, and that of a failed call its arguments: neither is for
  # an LM.
  defp cause({reason, [_ | _]}), do: cause(reason)
  defp cause({reason, {module, _function, _args}}) when is_atom(module), do: cause(reason)
  defp cause(reason), do: reason
end
