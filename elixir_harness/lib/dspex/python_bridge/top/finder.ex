defmodule DSPex.PythonBridge.Top.Finder do
  @moduledoc """
  The bridges of this node: those of pools, of supervisors, and bare ones, with a name or without.

  There is no list of them to keep, and they hide their own process dictionaries. But the definitions of
  programs are in a table of `DSPex.PythonBridge.Programs.Store`, which belongs to a bridge or to the
  supervisor that it is linked to, and beside each bridge runs its `DSPex.PythonBridge.Bridge.LogForwarder`, a
  child of its own that has its name in its label. Looking costs about a microsecond for each table of
  the node and for each call in flight (more where its caller is running), and no process is sent anything.
  """

  alias DSPex.PythonBridge.Programs
  alias DSPex.PythonBridge.Bridge.LogForwarder
  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.Pool.Handle

  @typedoc "`server` is what the functions of `DSPex.PythonBridge.Bridge` take; the rest is text."
  @type found :: %{
          server: pid() | atom(),
          bridge: String.t(),
          pool: String.t() | nil,
          number: pos_integer() | nil
        }

  @doc "All bridges, in the order of their names, the members of a pool in that of their numbers."
  @spec bridges() :: [found()]
  def bridges do
    owners()
    |> Enum.flat_map(&bridges_of/1)
    |> Enum.uniq_by(& &1.server)
    |> Enum.sort_by(&{&1.pool || &1.bridge, &1.number})
  end

  # A table that has gone meanwhile has no owner.
  defp owners do
    for table <- :ets.all(),
        :ets.info(table, :name) == Programs.Store,
        owner when is_pid(owner) <- [:ets.info(table, :owner)],
        uniq: true,
        do: owner
  end

  defp bridges_of(owner) do
    case Handle.fetch(owner) do
      nil ->
        for pid <- [owner | linked(owner)], name = name(pid), do: found(pid, name)

      handle ->
        for index <- LoadCounters.indexes(handle.counters) do
          name = Handle.bridge(handle, index)
          %{found(name, name) | pool: inspect(handle.name), number: index}
        end
    end
  end

  defp found(server, name), do: %{server: server, bridge: inspect(name), pool: nil, number: nil}

  defp linked(pid) do
    case Process.info(pid, :links) do
      {:links, links} -> Enum.filter(links, &local?/1)
      nil -> []
    end
  end

  # As it is registered, or its pid; nil: it is no bridge.
  defp name(pid) do
    with {:monitored_by, watchers} <- Process.info(pid, :monitored_by) do
      Enum.find_value(watchers, fn watcher ->
        local?(watcher) and Process.info(watcher, :parent) == {:parent, pid} and label(watcher)
      end)
    end
  end

  # OTP 26 has no function that reads a label.
  defp label(pid) do
    with {:dictionary, dictionary} <- Process.info(pid, :dictionary),
         {_key, {LogForwarder, name}} <- List.keyfind(dictionary, :"$process_label", 0),
         do: name,
         else: (_other -> nil)
  end

  defp local?(pid), do: is_pid(pid) and node(pid) == node()
end
