defmodule DSPex.PythonBridge.Telemetry.Metadata do
  @moduledoc false
  # What the events of several kinds have in common.

  @doc "What can be said of a reason: an exception may have contents of a call."
  @spec reason(term()) :: atom()
  def reason(%module{} = error) when is_exception(error), do: module
  def reason(reason) when is_atom(reason), do: reason
  def reason(reason) when is_tuple(reason) and is_atom(elem(reason, 0)), do: elem(reason, 0)
  def reason(_contents), do: :other

  @doc "The name of a process, if it has one, as in its own events."
  @spec name(term()) :: term()
  def name({name, node}) when node == node(), do: name

  def name(pid) when is_pid(pid) and node(pid) == node() do
    case Process.info(pid, :registered_name) do
      {:registered_name, name} when is_atom(name) -> name
      _none -> pid
    end
  end

  def name(server), do: server
end
