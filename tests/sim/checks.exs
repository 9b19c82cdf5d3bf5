defmodule Sim.Checks do
  @moduledoc "What must hold when all is connected again and nothing is under way. Each gives a list of what does not."

  alias Sim.{Load, Net, Node, World}

  @doc "What all tables must have become: of each program the change with the latest stamp, of all that the nodes have."
  def reference do
    rows = for node <- Net.nodes(), {key, stamp, _body} <- table(node), do: {key, stamp}
    latest = Enum.reduce(rows, %{}, fn {key, stamp}, acc -> Map.update(acc, key, stamp, &max(&1, stamp)) end)
    all = Map.get(latest, :removed_all)

    for {{:program, id}, stamp} <- latest, stamp > Map.get(latest, {:removed, id}), all == nil or stamp > all, into: %{}, do: {id, stamp}
  end

  defp table(node) do
    store = Module.concat(World.here().prefix, Programs.Store)
    store.export(Node.handle(node).programs)
  end

  @doc "Lets time pass until all nodes have these programs; gives the ms that it took, or nil if it takes longer than `limit_ms`."
  def equal_after(reference, limit_ms) do
    began = World.now()
    # Each node is looked at until it has them: later it may only lose them by another change.
    equal? = fn -> World.note(:unequal, Enum.drop_while(World.fact(:unequal), &(Node.stamps(&1) == reference))) && World.fact(:unequal) == [] end
    World.note(:unequal, Net.nodes())
    if World.run_until(began + limit_ms * 1000, equal?), do: (World.now() - began) / 1000
  end

  @doc "All checks."
  def all do
    for node <- Net.nodes(), do: World.give(Node.coordinator(node), :sim_report)


    Enum.concat([
      tables(),
      peers(),
      acknowledged(),
      routes(),
      for(node <- Net.nodes(), text <- rest(node), do: "#{node}: #{text}"),
      for(crash <- World.fact(:crashes, []), do: "a process crashed: #{inspect(crash)}"),
      for({number, node} <- Load.open(), do: "call #{number} of #{node} was lost"),
      for({node, type} <- World.fact(:failed_calls, []), do: "a call of #{node} failed: #{type}")
    ])
  end

  defp tables do
    reference = reference()
    for node <- Net.nodes(), Node.stamps(node) != reference, do: "#{node} has other programs: #{difference(Node.stamps(node), reference)}"
  end

  defp difference(map, other) do
    ids = for id <- Map.keys(Map.merge(map, other)), map[id] != other[id], do: {id, map[id], other[id]}
    inspect(Enum.take(ids, 3))
  end

  defp peers do
    for node <- Net.nodes(), index <- 1..Node.handle(node).settings.size do
      bodies = Map.new(Node.programs(node), fn {id, {_stamp, body}} -> {id, body} end)
      peer = World.fact({:peer, node, index})
      if peer != bodies, do: "peer #{index} of #{node} has other programs than its table: #{differing(peer, bodies)}"
    end
    |> Enum.reject(&is_nil/1)
  end

  defp differing(peer, bodies), do: inspect(for id <- Map.keys(Map.merge(peer, bodies)), peer[id] != bodies[id], do: {id, peer[id] != nil, bodies[id] != nil})

  defp acknowledged do
    for {id, outcome} <- Load.expected(), node <- Net.nodes(), not as_expected?(Node.programs(node)[id], outcome),
        do: "#{node}: an acknowledged change of #{id} was lost"
  end

  defp as_expected?(program, :removed), do: program == nil
  defp as_expected?(nil, _tag), do: false
  defp as_expected?({_stamp, body}, tag), do: String.contains?(body, "\"#{tag}\"")

  # Each node knows of exactly the others that serve.
  defp routes do
    serving = for node <- Net.nodes(), Node.serves?(node), do: Node.coordinator(node)

    for node <- Net.nodes(),
        known = for({pid, _since} <- :ets.tab2list(Node.handle(node).others), do: pid),
        Enum.sort(known) != Enum.sort(serving -- [Node.coordinator(node)]),
        do: "#{node} sends calls to #{inspect(Enum.map(known, &World.node_of/1))}"
  end

  defp rest(node) do
    %{cluster: cluster} = state = World.fact({:coordinator_state, node})
    handle = Node.handle(node)
    processes = length(World.on(node)) - handle.settings.size - 2
    busy = for index <- 1..handle.settings.size, do: Module.concat(World.here().prefix, Pool.LoadCounters).busy(handle.counters, index)

    Enum.concat([
      unless_is(MapSet.size(cluster.members), length(Net.nodes()) - 1, "members"),
      unless_is(MapSet.size(cluster.behind), 0, "members that are behind"),
      unless_is(map_size(state.waiting), 0, "callers that wait"),
      unless_is(processes, 0, "processes left"),
      unless_is(Enum.sum(busy), 0, "calls counted")
    ])
  end

  defp unless_is(value, value, _what), do: []
  defp unless_is(value, expected, what), do: ["#{value} #{what}, expected #{expected}"]
end
