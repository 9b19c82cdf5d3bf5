defmodule DSPex.PythonBridge.Pool.Cluster.IncomingChanges do
  @moduledoc false
  # Changes to the programs that other nodes have made: into the table of this node, and from there to its peers.

  alias DSPex.PythonBridge.Programs
  alias DSPex.PythonBridge.Pool.ProgramChanges

  @doc "Makes a change of another node here; it is over at once if this node has a later one."
  @spec adopt(ProgramChanges.t(), ProgramChanges.from(), Programs.Store.change(), binary()) ::
          ProgramChanges.result()
  def adopt(changes, from, {:create, id, stamp} = change, body) do
    if Programs.Store.put(changes.handle.programs, id, stamp, body),
      do: changes |> ProgramChanges.seen(stamp) |> ProgramChanges.deliver(from, change, body),
      else: ProgramChanges.deliver(changes, from, change, body, [])
  end

  def adopt(changes, from, {:cleanup, ids, stamp}, _body) do
    programs = changes.handle.programs
    before = ids(programs)
    Programs.Store.remove(programs, ids, stamp)
    removed = before -- ids(programs)
    changes |> ProgramChanges.seen(stamp) |> ProgramChanges.clean_peers(from, removed, stamp)
  end

  defp ids(programs), do: for({id, _stamp, _body} <- Programs.Store.definitions(programs), do: id)

  @doc "Merges the whole table of another node into this node's."
  @spec merge(ProgramChanges.t(), Programs.Store.exported()) :: ProgramChanges.result()
  def merge(changes, exported) do
    {created, removed} = Programs.Store.merge(changes.handle.programs, exported)
    cleaned = ProgramChanges.clean_peers(changes, :nobody, removed, ProgramChanges.long_ago())

    for {id, stamp, body} <- created, reduce: cleaned do
      {changes, over} ->
        changes = ProgramChanges.seen(changes, stamp)
        {changes, more} = ProgramChanges.deliver(changes, :nobody, {:create, id, stamp}, body)
        {changes, more ++ over}
    end
  end
end
