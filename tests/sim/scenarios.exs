defmodule Sim.Scenarios do
  @moduledoc "What is simulated. Each runs in a process of its own, whose tables end with it."

  alias Sim.{Checks, Faults, Load, Net, Node, World}

  @calls %{peers: 3, service_ms: {5, 500}}
  @kinds [:peer, :peer, :peers, :link, :silence, :split, :hang, :replace, :coordinator]

  @doc "Runs a scenario: `run(:faults, nodes: 12, seed: 1)`. A map of figures, with `wrong`: what the checks have found."
  def run(name, options) do
    options = Map.new(options)
    caller = self()

    {pid, monitor} =
      spawn_monitor(fn ->
        World.new(Map.take(options, [:seed, :prefix, :program_bytes, :latency_us]))
        result = play(name, Map.merge(@calls, options))
        World.stop()
        send(caller, {:result, self(), Map.merge(result, %{events: World.counted(:events), seconds: World.now() / 1_000_000})})
      end)

    receive do
      {:result, ^pid, result} -> result
      {:DOWN, ^monitor, :process, ^pid, reason} -> %{wrong: ["the simulation ended: #{inspect(reason)}"]}
    end
  end

  defp start(options) do
    for _ <- 1..options.nodes, do: Faults.join(options)
    # All peers are up, and all nodes have met.
    World.run(5_000)
    Load.prepare(hd(Net.nodes()))
    World.run(2_000)
    Checks.all()
  end

  ## Everything at once

  defp play(:faults, options) do
    wrong = start(options)
    World.note(:faults, true)
    Load.start(%{call_ms: 100 / options.nodes, change_ms: 250, timeout: 300_000})
    Faults.start(options[:fault_ms] || 1_500, Map.put(options, :kinds, options[:kinds] || @kinds))
    World.run(options[:ms] || 30_000)
    Load.stop()
    # The longest fault is over, a silent connection given up, and its callers served.
    World.run(100_000)
    World.run((Faults.heal() - World.now()) / 1000)
    # A node that died while it sent a change may have sent it to some only.
    took = Checks.equal_after(Checks.reference(), 7_300_000)
    World.run(20_000)
    before = messages()
    World.run(60_000)
    rest = kinds(messages(), before)

    %{
      wrong: wrong ++ late(took) ++ Checks.all() ++ if(took > 60_000 or rest == %{rest | hello: 0, change: 0, serves: 0}, do: [], else: ["sent at rest: #{inspect(rest)}"]),
      equal_ms: took,
      calls: World.counted(:calls),
      elsewhere: World.counted(:served_elsewhere),
      changes: World.counted(:changes),
      faults: for({{:fault, kind}, count} <- :ets.tab2list(World.here().stats), into: %{}, do: {kind, count})
    }
  end

  ## A split in two halves, in which both go on

  defp play(:split, options) do
    wrong = start(options)
    extra(options)
    Load.start(%{call_ms: 100 / options.nodes, change_ms: 200, timeout: 60_000})
    {left, right} = Net.nodes() |> Enum.shuffle() |> Enum.split(div(options.nodes, 2))
    Faults.split(left, right)
    World.run(5_000)
    changes = World.counted(:changes)
    Load.stop()
    World.run(5_000)
    reference = Checks.reference()
    unlike = Enum.count(Net.nodes(), &(Node.stamps(&1) != reference))
    before = messages()
    cpu = cpu()
    Faults.heal(10)
    took = Checks.equal_after(reference, 1_000)
    World.run(15_000)

    %{
      wrong: wrong ++ late(took) ++ Checks.all(),
      equal_ms: took,
      changes: changes,
      unlike: unlike,
      calls: World.counted(:calls),
      messages: total(messages(), before),
      bytes: total(bytes(), %{}),
      cpu_ms: (cpu() - cpu) / options.nodes
    }
  end

  ## One change, one node more, the end of the last peer of a node: at rest

  defp play(:costs, options) do
    wrong = start(options)
    extra(options)
    node = hd(Net.nodes())

    {create, change} =
      measure(fn ->
        began = World.now()
        Load.ask(node, :create_program, %{id: "one", signature: "q -> a", options: %{text: String.duplicate("x", 900)}}, fn _ -> World.note(:replied, World.now() - began) end)
        true = World.run_until(began + 5_000_000, fn -> Enum.all?(Net.nodes(), &is_map_key(Node.stamps(&1), "one")) end)
        everywhere = World.now() - began
        World.run(5_000)
        %{everywhere_ms: everywhere / 1000, replied_ms: World.fact(:replied) / 1000}
      end)

    {join, joining} =
      measure(fn ->
        began = World.now()
        new = Faults.join(options)
        stamps = Node.stamps(node)
        true = World.run_until(began + 60_000_000, fn -> Node.handle(new) != nil and Node.stamps(new) == stamps end)
        knows = World.now() - began
        World.run(10_000)
        %{knows_ms: knows / 1000, received_bytes: World.counted({:received_bytes, new}), sent: World.counted({:sent, new, :hello})}
      end)

    {peers, _} =
      measure(fn ->
        for index <- 1..options.peers, do: Node.kill_peer(node, index)
        World.run(10_000)
        %{}
      end)

    World.run(10_000)
    %{wrong: wrong ++ Checks.all(), create: Map.merge(create, change), join: Map.merge(join, joining), peers: peers, programs: map_size(Node.stamps(node))}
  end

  # More programs than those that are called.
  defp extra(options) do
    for n <- 1..(options[:programs] || 0)//1 do
      World.in_ms(n * 20, fn -> Load.change(Enum.random(Net.nodes()), {:create, "extra-#{n}", ""}) end)
    end

    World.run((options[:programs] || 0) * 20 + 3_000)
  end

  defp measure(action) do
    {messages, bytes, cpu} = {messages(), bytes(), cpu()}
    figures = action.()
    {%{messages: kinds(messages(), messages), bytes: total(bytes(), bytes), cpu_ms: (cpu() - cpu) / length(Net.nodes())}, figures}
  end

  defp messages, do: for({{:messages, kind}, count} <- :ets.tab2list(World.here().stats), kind in [:hello, :serves, :change], into: %{}, do: {kind, count})
  defp bytes, do: for({{:bytes, kind}, count} <- :ets.tab2list(World.here().stats), kind in [:hello, :serves, :change], into: %{}, do: {kind, count})
  defp cpu, do: Enum.sum(for({{:cpu_ns, _node}, ns} <- :ets.tab2list(World.here().stats), do: ns)) / 1_000_000
  defp kinds(now, before), do: Map.new(now, fn {kind, count} -> {kind, count - Map.get(before, kind, 0)} end)
  defp total(now, before), do: now |> kinds(before) |> Map.values() |> Enum.sum()

  defp late(nil), do: ["programs are not equal in time after all is connected"]
  defp late(ms) do
    # Only a node that dies can have sent a change to some of the others.
    if ms > 60_000 and World.counted({:fault, :replace}) == 0, do: ["programs are equal only after #{round(ms / 1000)} s"], else: []
  end
end
