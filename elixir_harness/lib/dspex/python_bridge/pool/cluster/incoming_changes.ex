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
      do: changes |> ProgramChanges.seen(stamp) |> deliver(from, change, body),
      else: ProgramChanges.deliver(changes, from, change, body, [])
  end

  def adopt(changes, from, {:cleanup, ids, stamp}, _body) do
    programs = changes.handle.programs
    remove = fn -> Programs.Store.remove(programs, ids, stamp) end
    changes = ProgramChanges.seen(changes, stamp)
    take_in(changes, from, Programs.Store.difference(programs, remove), stamp)
  end

  @doc "Merges the whole table of another node into this node's."
  @spec merge(ProgramChanges.t(), Programs.Store.exported()) :: ProgramChanges.result()
  def merge(changes, exported) do
    difference = Programs.Store.merge(changes.handle.programs, exported)
    take_in(changes, :nobody, difference, ProgramChanges.long_ago())
  end

  # A removal may uncover a program that was declared later.
  defp take_in(changes, from, {created, removed}, stamp) do
    cleaned = ProgramChanges.clean_peers(changes, from, removed, stamp)

    cleaned =
      Enum.reduce(
        removed,
        cleaned,
        &also(&2, fn c -> ProgramChanges.deliver_later(c, &1, stamp) end)
      )

    for {id, stamp, body} <- created, reduce: cleaned do
      result ->
        also(result, fn changes ->
          changes |> ProgramChanges.seen(stamp) |> deliver(:nobody, {:create, id, stamp}, body)
        end)
    end
  end

  defp deliver(changes, from, {:create, id, stamp} = change, body) do
    changes
    |> ProgramChanges.deliver(from, change, body)
    |> also(&ProgramChanges.deliver_later(&1, id, stamp))
  end

  defp also({changes, over}, step) do
    {changes, more} = step.(changes)
    {changes, more ++ over}
  end
end
