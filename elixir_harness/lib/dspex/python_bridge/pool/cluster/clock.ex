defmodule DSPex.PythonBridge.Pool.Cluster.Clock do
  @moduledoc false
  # A Lamport clock for the stamps of changes to the programs: each stamp is later than all stamps that this node has
  # seen, whatever the system clocks of the nodes show. A change that is made after another one was received wins over it.

  alias DSPex.PythonBridge.Programs

  @typedoc "The greatest time of a stamp that was seen, in µs; 0 at first."
  @type t :: integer()

  @doc "A stamp for a change that is made now."
  @spec stamp(t()) :: {Programs.Store.stamp(), t()}
  def stamp(clock) do
    {time, count, node} = Programs.Store.stamp()
    stamp = {max(time, clock + 1), count, node}
    {stamp, seen(clock, stamp)}
  end

  @doc "Takes in the stamp of a change that was made elsewhere."
  @spec seen(t(), Programs.Store.stamp()) :: t()
  def seen(clock, {time, _count, _node}), do: max(time, clock)
end
