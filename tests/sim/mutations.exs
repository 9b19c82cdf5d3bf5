defmodule Sim.Mutations do
  @moduledoc """
  Defects that the simulation has to find: a piece of the source, what it is replaced by, and the seed of a run of `:faults` on
  three nodes that shows it.
  """

  def all do
    [
      {"no hello when nodes meet", "Pool.Cluster", "greet(%{cluster | members: Enum.into(others, cluster.members)}, handle, others)",
       "then(handle, fn _ -> %{cluster | members: Enum.into(others, cluster.members)} end)", 14},
      {"a hello is not merged", "Pool.Coordinator", "Handle.tell_bridges(state.handle, Programs.Store.merge(state.handle.programs, exported))",
       "Handle.tell_bridges(state.handle, then(exported, fn _ -> [] end))", 1},
      {"tombstones are ignored", "Programs.Store", "if stamp < removed_at(table, id) do", "if stamp == removed_at(table, id) do", 3},
      {"calls are sent to nodes that have left", "Pool.Cluster", "Enum.each(coordinators, &:ets.delete(handle.others, &1))",
       "then(handle, fn _ -> :ok end)", 1},
      {"a call whose node vanishes is not resent", "Pool.Route", "when gone in [{:died, :unsent}, :replaced, :bridge_not_running],", "when gone in [{:died, :unsent}, :replaced],", 5}
    ]
  end

  @doc "What the run finds with a defect."
  def run({name, module, text, replacement, seed}) do
    prefix = Sim.Instrument.load(Module.concat(Sim.Mutant, "#{:erlang.phash2(name)}"), {module, text, replacement})
    Sim.Scenarios.run(:faults, nodes: 3, seed: seed, prefix: prefix)
  end
end
