defmodule DSPex.PythonBridge.Tools.Outcome do
  @moduledoc false
  # What a function does, as a result: whatever that is, it is a term or one message of an error.

  alias DSPex.PythonBridge.Telemetry.Metadata
  alias DSPex.PythonBridge.Tools.Answer

  @type t :: {Answer.result(), how()}
  @typedoc "Whether the function returned, or else what it raised."
  @type how :: :returned | {kind(), reason :: term(), Exception.stacktrace()}
  @type kind :: :error | :exit | :throw

  @doc "Calls a function. An exception must not end this process: it would be logged, with the arguments."
  @spec of((-> term())) :: t()
  def of(function) do
    case function.() do
      {:ok, term} -> {{:ok, term}, :returned}
      {:error, reason} -> {{:error, text(reason)}, :returned}
      term -> {{:ok, term}, :returned}
    end
  catch
    kind, reason ->
      {{:error, message(kind, reason, __STACKTRACE__)}, {kind, reason, __STACKTRACE__}}
  end

  # A string is meant for the LM as it is.
  defp text(reason) when is_binary(reason), do: reason
  defp text(reason) when is_exception(reason), do: Answer.one_line(Exception.message(reason))
  defp text(reason), do: Answer.one_line(inspect(reason))

  @doc "The message of what was raised, thrown, or exited with. It calls user code: messages, inspections."
  @spec message(kind(), term(), Exception.stacktrace()) :: String.t()
  def message(kind, reason, stacktrace) do
    Answer.one_line(shown(kind, reason, stacktrace))
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
