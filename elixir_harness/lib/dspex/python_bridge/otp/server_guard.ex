defmodule DSPex.PythonBridge.OTP.ServerGuard do
  @moduledoc false
  # Keeps the contents of requests and replies, and keys, out of what is logged and sent when a process here crashes.
  #
  # When a function raises, the runtime puts the arguments that no clause matched, the value that did not match, or the
  # exception's message into the exit reason. From there they get into the log, the supervisor's reports and to all who
  # monitor the process. What ends by `run/1`, or whose `terminate/2` is `ending/2`, has an exit reason with only the kind of
  # error and the place in the code. A process also sets the flag `:sensitive`, for its mailbox.

  require Logger

  @doc "Calls a function; if it raises, exits or throws, the calling process ends with one line in the log."
  @spec run((-> result)) :: result when result: term()
  def run(function) do
    function.()
  catch
    _kind, reason ->
      reason = strip(reason, __STACKTRACE__)
      Logger.error("a process of a Python bridge ended: #{Exception.format_exit(reason)}")
      exit(reason)
  end

  @doc "For `c:GenServer.terminate/2`: an exit in it replaces the reason of a crash."
  @spec ending(term(), (-> term())) :: :ok
  def ending(reason, function) do
    run(function)

    case reason do
      {error, [_ | _] = stacktrace} -> exit(strip(error, stacktrace))
      _in_order -> :ok
    end
  end

  @doc "For `c:GenServer.format_status/1`: the reason has no contents by then."
  @spec format_status(map()) :: map()
  def format_status(status) do
    Map.new(status, fn
      {:log, _events} -> {:log, []}
      {key, _contents} when key in [:state, :message] -> {key, :redacted}
      other -> other
    end)
  end

  # In the runtime's form, so that it is logged as usual.
  defp strip(reason, stacktrace), do: {kind(reason), stacktrace(stacktrace)}

  @doc "A stack trace without the arguments of calls."
  @spec stacktrace(Exception.stacktrace()) :: Exception.stacktrace()
  def stacktrace(stacktrace), do: Enum.map(stacktrace, &entry/1)

  defp kind(reason) when is_atom(reason), do: reason
  defp kind(%module{}), do: module
  defp kind({tag, _contents}) when is_atom(tag), do: {tag, :redacted}
  defp kind(_contents), do: :redacted

  defp entry({module, function, args, where}), do: {module, function, arity(args), place(where)}
  defp entry({function, args, where}), do: {function, arity(args), place(where)}

  defp arity(args) when is_list(args), do: length(args)
  defp arity(arity), do: arity

  # Other entries explain the error, with the arguments in them.
  defp place(where), do: Keyword.take(where, [:file, :line])
end
