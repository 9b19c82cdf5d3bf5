defmodule DSPex.PythonBridge.Caller do
  @moduledoc false
  # What other nodes call here: its name and function stay, since they may run another version
  # (`DSPex.PythonBridge.Calls.NodeMessage`).

  @doc "As `DSPex.PythonBridge.Client.Caller.find/1`."
  @spec find(term()) :: {:ok, pid() | {atom(), node()}} | {:error, DSPex.PythonBridge.Error.t()}
  defdelegate find(server), to: DSPex.PythonBridge.Client.Caller
end
