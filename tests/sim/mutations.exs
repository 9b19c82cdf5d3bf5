defmodule Sim.Mutations do
  @moduledoc """
  Defects that the simulation has to find: a piece of the source, what it is replaced by, and the seed of a run of `:faults` on
  three nodes that shows it. The last three were real.
  """

  def all do
    [
      {"no hello when nodes meet", "Pool.Cluster.Membership", "greet(%{cluster | members: members}, handle, others)",
       "then(handle, fn _ -> %{cluster | members: members} end)", 1},
      {"a hello is not merged", "Pool.Cluster.IncomingChanges", "difference = Programs.Store.merge(changes.handle.programs, exported)",
       "difference = then(exported, fn _ -> {[], []} end)", 1},
      {"tombstones are ignored", "Programs.Store", "do: stamp < removed_at(table, id)", "do: stamp == removed_at(table, id)", 1},
      {"calls are sent to nodes that have left", "Pool.Cluster.Membership", "Enum.each(coordinators, &:ets.delete(handle.others, &1))",
       "then(handle, fn _ -> :ok end)", 1},
      {"a call whose node vanishes is not made again", "Pool.Cluster.RemoteCall", ":vanished ->\n        {:again, passed}",
       ":vanished ->\n        timeout()", 1},
      {"what an undone cleanup has removed is not given back", "Pool.ProgramChanges", "deliver(changes, from, {:create, id, stamp}, body)\n    {changes, more ++ over}",
       "deliver(changes, from, {:create, id, stamp}, body, [])\n    {changes, more ++ over}", 42},
      {"a removal during a creation is forgotten", "Pool.Broadcast", "from != :replied and match?", "from != nil and match?", 90},
      {"no hello from time to time", "Pool.Cluster.Membership", "Enum.take_random(cluster.members, 1)", "Enum.take_random(cluster.members, 0)", 1}
    ]
  end

  @doc "What the run finds with a defect."
  def run({name, module, text, replacement, seed}) do
    prefix = Sim.Instrument.load(Module.concat(Sim.Mutant, "#{:erlang.phash2(name)}"), {module, text, replacement})
    Sim.Scenarios.run(:faults, nodes: 3, seed: seed, prefix: prefix)
  end
end
