defmodule DSPex.PythonBridge.Caller do
  @moduledoc false
  # What other nodes call here: its name and the function `find/1` stay, since they may run another version.

  alias DSPex.PythonBridge.Error

  @another_node_ms 5_000

  @doc "As `DSPex.PythonBridge.Client.Caller.find/1`."
  @spec find(term()) :: {:ok, pid() | {atom(), node()}} | {:error, Error.t()}
  defdelegate find(server), to: DSPex.PythonBridge.Client.Caller

  @doc """
  As `find/1`, and for a process of another node that node is asked, within 5 s: one of another kind may end by a message
  that it does not know, or never answer.
  """
  @spec find_anywhere(term()) :: {:ok, pid() | {atom(), node()}} | {:error, Error.t()}
  def find_anywhere(server) do
    case find(server) do
      {:ok, {name, node} = far} -> find_there(node, name, far)
      {:ok, pid} when node(pid) != node() -> find_there(node(pid), pid, pid)
      here_or_not -> here_or_not
    end
  end

  # A node of an older version does not have the function: then it is not checked.
  defp find_there(node, server, as_given) do
    :erpc.call(node, __MODULE__, :find, [server], @another_node_ms)
  catch
    :error, {:exception, :undef, [{__MODULE__, :find, _, _} | _]} ->
      {:ok, as_given}

    :error, {:erpc, _unreachable} ->
      {:error, Error.not_running(:bridge, server)}
  end
end
