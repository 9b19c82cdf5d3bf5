defmodule Sim.Node do
  @moduledoc """
  A node with a pool: the real coordinator and tables, and stand-ins for the bridges (`Sim.Peer`).
  """

  alias DSPex.PythonBridge.Pool.Options
  alias Sim.{Net, Peer, Runtime, World}

  @pool :sim_pool
  @group "sim"

  def pool, do: @pool
  defp module(name), do: Module.concat(World.here().prefix, name)

  @doc "Starts a node, connected to all that are there. `options`: `peers`, `service_ms`."
  def start(node, options) do
    others = Net.nodes()
    Net.put(:nodes, Enum.sort([node | others]))
    # As NTP leaves them.
    Net.put({:skew, node}, :rand.uniform(10_000) - 5_000)
    Runtime.spawn_at(node, fn -> supervise(node, options) end)
    for other <- others, do: Net.connect(node, other)
    node
  end

  @doc "Ends a node at once."
  def kill(node) do
    Net.put(:nodes, List.delete(Net.nodes(), node))
    for pid <- World.on(node), do: World.kill(pid, :killed, false)
    for other <- Net.nodes(), do: Net.disconnect(node, other)
    for other <- Net.nodes(), do: Net.put({:known, node, other}, nil)
    Net.put({:pg, node}, nil)
    for what <- [:handle, :coordinator_state], do: :ets.delete(World.here().facts, {what, node})
    :ets.match_delete(World.here().terms, {{node, :_}, :_})
    :ets.match_delete(World.here().names, {{:_, node}, :_})
  end

  # As DSPex.PythonBridge.Pool.Supervisor: the owner of the tables, which starts a coordinator that has crashed again.
  defp supervise(node, options) do
    handle = module("Pool.Handle").new(settings(options))
    World.note({:handle, node}, handle)
    module("Pool.Handle").publish(handle)
    coordinator = module("Pool.Handle").coordinator(@pool)

    for index <- 1..handle.settings.size,
        do: Peer.start(handle, index, module("Pool.Handle").bridge(handle, index), coordinator, options.service_ms)

    keep(handle, coordinator)
  end

  defp keep(handle, name) do
    pid = Runtime.spawn(fn -> serve(module("Pool.Coordinator"), handle) end)
    World.note({:lasting, pid}, true)
    Runtime.register(name, pid)
    Runtime.register(:coordinator, pid)
    monitor = Runtime.monitor(:process, pid)
    await(monitor)
    keep(handle, name)
  end

  defp await(monitor) do
    receive do
      {:DOWN, ^monitor, :process, _pid, _reason} -> :ok
    after
      0 -> Runtime.wait(:infinity) && await(monitor)
    end
  end

  ## A GenServer

  defp serve(module, argument) do
    {:ok, state} = module.init(argument)
    loop(module, state)
  end

  defp loop(module, state) do
    receive do
      :sim_report -> World.note({:coordinator_state, Runtime.node()}, state) && loop(module, state)
      message -> message |> module.handle_info(state) |> next(module)
    after
      0 -> Runtime.wait(:infinity) && loop(module, state)
    end
  end

  defp next({:noreply, state}, module), do: loop(module, state)
  defp next({:stop, reason, _state}, _module), do: exit(reason)

  defp settings(options) do
    %Options{
      name: @pool,
      size: options.peers,
      cluster: @group,
      bridge: [],
      programs: fn -> [] end,
      default_timeout: 30_000,
      max_retries: 2,
      max_frame_bytes: 16_000_000,
      journal_bytes: 0
    }
  end

  ## From the scenario

  @doc "Kills the peer of a slot."
  def kill_peer(node, index), do: World.give(bridge(node, index), :die)
  def coordinator(node), do: :ets.lookup_element(World.here().names, {:coordinator, node}, 2, nil)

  defp bridge(node, index) do
    name = module("Pool.Handle").bridge(handle(node), index)
    :ets.lookup_element(World.here().names, {name, node}, 2, nil)
  end

  def handle(node), do: World.fact({:handle, node})
  def up?(node), do: handle(node) != nil and coordinator(node) != nil
  def serves?(node), do: module("Pool.LoadCounters").any?(handle(node).counters)

  @doc "The definitions in a node's table, by id, with their stamps."
  def programs(node), do: for({id, stamp, body} <- module("Programs.Store").definitions(handle(node).programs), into: %{}, do: {id, {stamp, body}})
  def stamps(node) do
    for {id, stamp, _body} <- module("Programs.Store").definitions(handle(node).programs),
        into: %{},
        do: {id, stamp}
  end

  @doc "A call by a process of the node, as `Pool.request/4` makes it; `done` gets its result, in the scheduler's tables."
  def call(node, command, args, timeout, done) do
    caller = module("Pool.Caller")
    Runtime.spawn_at(node, fn -> done.(caller.exchange(@pool, command, args, timeout, [])) end)
  end
end
