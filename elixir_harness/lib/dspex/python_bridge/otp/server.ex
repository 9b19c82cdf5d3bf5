defmodule DSPex.PythonBridge.OTP.Server do
  @moduledoc false
  # What a term is that was given as a server: a bridge, or a pool. A stub is a pool.

  alias DSPex.PythonBridge.OTP.Registry

  @type address :: pid() | {atom(), node()}

  @doc """
  `{:pool, handle}` for a pool of this node. A process of another node is taken for a bridge: only its own node can tell.
  Any term may be given; one that is no server, or whose process has ended, is `:none`.
  """
  @spec find(term()) :: {:bridge, address()} | {:pool, handle :: struct()} | :none
  def find(server) do
    case whereis(server) do
      nil ->
        :none

      pid when is_pid(pid) and node(pid) == node() ->
        cond do
          Registry.get(:bridge, pid) != nil or begins?(pid) -> {:bridge, pid}
          handle = Process.alive?(pid) && Registry.get(:pool, pid) -> {:pool, handle}
          true -> :none
        end

      elsewhere ->
        {:bridge, elsewhere}
    end
  end

  # A bridge has its name before it runs and registers itself: until then its initial call shows what it is. That is
  # hidden when it is `:sensitive`: if it has just done so, the last look finds it.
  defp begins?(pid) do
    :proc_lib.translate_initial_call(pid) ==
      {:"Elixir.DSPex.PythonBridge.Bridge.Server", :init, 1} or
      Registry.get(:bridge, pid) != nil
  end

  @doc "The process of a server, of whatever kind; nil if there is none."
  @spec whereis(term()) :: address() | nil
  def whereis(pid) when is_pid(pid), do: pid
  def whereis(name) when is_atom(name), do: Process.whereis(name)

  def whereis(server) do
    case GenServer.whereis(server) do
      {_name, _node} = address -> if Node.alive?(), do: address
      pid_or_nil -> pid_or_nil
    end
  catch
    # A registry is user code, and the term may be no name: it may raise, exit or throw.
    _kind, _reason -> nil
  end
end
