defmodule Sim.Faults do
  @moduledoc "What happens to nodes and connections, and its mending."

  alias Sim.{Net, Node, World}

  @doc "Closes all connections between two groups of nodes."
  def split(left, right), do: for(a <- left, b <- right, do: Net.disconnect(a, b))

  @doc "Connects all nodes, within `ms`, as a library does that polls; gives when the last connection is made."
  def heal(ms \\ 200) do
    nodes = Net.nodes()
    for a <- nodes, b <- nodes, a < b, do: World.in_ms(:rand.uniform(ms), fn -> Net.connect(a, b) end)
    World.now() + ms * 1000
  end

  @doc "A fault at random intervals, until `Sim.Load.stop/0`. Each ends by itself; only `heal/1` connects what was closed."
  def start(mean_ms, options) do
    World.in_ms(-mean_ms * :math.log(1 - :rand.uniform()), fn ->
      if World.fact(:load) do
        kind = Enum.random(options.kinds)
        # Between two that are replaced one node may be alone.
        unless kind in [:link, :silence, :split] and length(Net.nodes()) < 2 do
          World.count({:fault, kind})
          fault(kind, options)
        end

        start(mean_ms, options)
      end
    end)
  end

  defp fault(:peer, _options), do: kill_peers(Enum.random(Net.nodes()), 1)
  defp fault(:peers, _options), do: with(node = Enum.random(Net.nodes()), do: kill_peers(node, peers(node)))

  defp fault(:link, _options) do
    [a, b] = Enum.take_random(Net.nodes(), 2)
    Net.disconnect(a, b)
    World.in_ms(:rand.uniform(3_000), fn -> Net.connect(a, b) end)
  end

  # Packets are dropped: it heals in time, or is given up.
  defp fault(:silence, _options) do
    [a, b] = Enum.take_random(Net.nodes(), 2)
    Net.silence(a, b)
    World.in_ms(Enum.random([500, 5_000, 90_000]), fn -> Net.unsilence(a, b) && Net.connect(a, b) end)
  end

  defp fault(:split, _options) do
    {left, right} = Net.nodes() |> Enum.shuffle() |> Enum.split(:rand.uniform(length(Net.nodes()) - 1))
    split(left, right)
    World.in_ms(:rand.uniform(10_000), &heal/0)
  end

  defp fault(:hang, _options) do
    node = Enum.random(Net.nodes())

    unless Net.frozen?(node) or not has_programs?(node) or Enum.count(Net.nodes(), &Net.frozen?/1) > length(Net.nodes()) / 3 do
      Net.freeze(node)
      World.in_ms(Enum.random([300, 5_000, 90_000]), fn -> unless Net.dead?(node), do: Net.thaw(node) && World.in_ms(200, &heal/0) end)
    end
  end

  # One goes, and another one comes. Never alone: it would have no programs.
  defp fault(:replace, options) do
    case Enum.reject(Net.nodes(), &Net.frozen?/1) do
      [_, _ | _] = nodes -> Node.kill(Enum.random(nodes)) && join_later(options)
      _few -> :ok
    end
  end

  defp fault(:coordinator, _options) do
    node = Enum.random(Net.nodes())
    with pid when pid != nil <- Node.coordinator(node), false <- Net.frozen?(node), do: World.kill(pid, :killed)
  end

  defp join_later(options) do
    World.in_ms(:rand.uniform(2_000), fn -> if Enum.all?(Net.nodes(), &Net.frozen?/1), do: join_later(options), else: join(options) end)
  end

  @doc "Starts another node."
  def join(options), do: Node.start(:"n#{World.count(:nodes_started) |> Integer.to_string() |> String.pad_leading(4, "0")}", options)

  # Before that it has not met another node.
  defp has_programs?(node), do: Node.up?(node) and is_map_key(Node.stamps(node), hd(Sim.Load.stable()))

  defp peers(node), do: if(handle = Node.handle(node), do: handle.settings.size, else: 0)
  defp kill_peers(_node, 0), do: :ok
  defp kill_peers(node, n), do: if(Node.up?(node), do: for(index <- Enum.take_random(1..peers(node), n), do: Node.kill_peer(node, index)))
end
