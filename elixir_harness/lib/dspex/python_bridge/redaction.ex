defmodule DSPex.PythonBridge.Redaction do
  @moduledoc """
  What crash reports and `:sys.get_status/1` may show of a bridge's process: how it is, never what
  passes through it. (Secrets among the options are not in the state as such: see
  `DSPex.PythonBridge.Options`.)
  """

  @doc "For `c:GenServer.format_status/1`."
  @spec format_status(GenServer.format_status()) :: GenServer.format_status()
  def format_status(status) do
    Map.new(status, fn
      {:state, %{traffic: _} = state} -> {:state, %{state | traffic: :redacted}}
      {:message, message} -> {:message, message(message)}
      {:log, log} -> {:log, Enum.map(log, &log_event/1)}
      other -> other
    end)
  end

  defp message({:request, ref, pid, timeout, _body}), do: {:request, ref, pid, timeout, :redacted}
  defp message({port, {:data, _frame}}) when is_port(port), do: {port, {:data, :redacted}}
  defp message(message), do: message

  # The events of :sys.log/2.
  defp log_event({:in, message}), do: {:in, message(message)}
  defp log_event({:in, message, state}), do: {:in, message(message), state}
  defp log_event(_event), do: :redacted
end
