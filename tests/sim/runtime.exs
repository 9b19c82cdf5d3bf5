defmodule Sim.Runtime do
  @moduledoc """
  What the modules under test call in place of the runtime (`Sim.Instrument`). It works on the tables of the world, in the process
  that calls it: no other one runs.
  """

  import Kernel, except: [node: 0, node: 1, send: 2, spawn: 1]

  alias Sim.{Net, Pg, World}

  ## Waiting

  def deadline(:infinity), do: :infinity
  def deadline(ms), do: World.now() + ms * 1000

  @doc "Waits for any message, or the deadline."
  def wait(deadline) do
    Kernel.send(World.here().scheduler, {:waits, self(), deadline})
    receive(do: ({:sim_go, what} -> what))
  end

  def sleep(ms), do: sleep_until(deadline(ms))
  defp sleep_until(deadline), do: with(:again <- wait(deadline), do: sleep_until(deadline))

  ## Time and numbers

  def monotonic_time, do: World.now() * 1000
  def monotonic_time(unit), do: System.convert_time_unit(World.now(), :microsecond, unit)
  def system_time(:microsecond), do: Net.clock(node())
  def unique_integer(_options), do: :ets.update_counter(World.here().facts, :unique, 1)

  # By node: pids are others in each run.
  def random([{pid, _} | _] = rows) when is_pid(pid), do: rows |> Enum.sort_by(&node(elem(&1, 0))) |> Enum.random()
  def random(list), do: Enum.random(list)

  def start_timer(ms, pid, message) do
    ref = make_ref()
    timer(ms, pid, {:timeout, ref, message}, ref)
  end

  def send_after(ms, pid, message), do: timer(ms, pid, message, make_ref())

  defp timer(ms, pid, message, ref) do
    key = World.at(World.now() + ms * 1000, World.serial_of(pid), {:timer, ref, pid, message})
    :ets.insert(World.here().timers, {ref, key})
    ref
  end

  def cancel_timer(ref, _options \\ []) do
    with [{_ref, key}] <- :ets.take(World.here().timers, ref), do: World.cancel(key)
    :ok
  end

  ## Nodes and names

  def node, do: Process.get(:sim_node)
  def node(pid), do: World.node_of(pid) || node()
  def whereis(name), do: :ets.lookup_element(World.here().names, {name, node()}, 2, nil)
  def register(name, pid), do: :ets.insert(World.here().names, {{name, node()}, pid})
  def is_process_alive(pid), do: World.alive?(pid)

  def persistent_term_put(key, value), do: :ets.insert(World.here().terms, {{node(), key}, value}) && :ok
  def persistent_term_get(key, default), do: :ets.lookup_element(World.here().terms, {node(), key}, 2, default)
  def persistent_term_erase(key), do: :ets.delete(World.here().terms, {node(), key})

  def pg_start(_scope), do: Pg.start(node())
  def pg_monitor(_scope, _group), do: Pg.monitor(node(), self())
  def pg_join(_scope, _group, pid), do: Pg.join(node(), pid)
  def pg_get_members(_scope, _group), do: Pg.members(node())

  ## Messages

  def send(ref, message) when is_reference(ref) do
    with [{_ref, pid, _mode}] <- :ets.lookup(World.here().aliases, ref),
         do: Net.transmit(node(), node(pid), :reply, 60, {:alias, ref, message})

    message
  end

  def send(pid, message) when is_pid(pid), do: deliver(node(), pid, message) && message
  def send(port, message), do: Kernel.send(port, message)

  @doc "`:noconnect`, as the runtime has it: without a connection none is made. `:nosuspend`: one that is busy is not waited for."
  def send(ref, message, [:nosuspend, :noconnect]) when is_reference(ref), do: send(ref, message) && :ok

  def send(pid, message, [:nosuspend, :noconnect]) do
    there = World.node_of(pid)

    cond do
      there == node() -> deliver(node(), pid, message) && :ok
      there == nil or not Net.known?(node(), there) -> :noconnect
      Net.busy?(node(), there) -> :nosuspend
      true -> deliver(node(), pid, message) && :ok
    end
  end

  def deliver(from, pid, message) do
    to = World.node_of(pid)
    if from == to, do: Net.transmit(from, to, nil, 0, {:message, pid, message}), else: over_net(from, to, pid, message)
    true
  end

  defp over_net(from, to, pid, message),
    do: Net.transmit(from, to, class(message), :erlang.external_size(message), {:message, pid, message})

  defp class(message) when is_tuple(message) and elem(message, 0) in [:hello, :serves, :change], do: elem(message, 0)
  defp class(_other), do: :other

  @doc "An alias without a monitor, which ends with the first reply."
  def alias([:reply]) do
    ref = make_ref()
    :ets.insert(World.here().aliases, {ref, self(), :reply})
    ref
  end

  def unalias(ref), do: :ets.delete(World.here().aliases, ref)

  ## Processes

  def process_flag(:trap_exit, trap?), do: :ets.update_element(World.here().procs, self(), {7, trap?})
  def process_flag(_other, _value), do: true

  def spawn(fun), do: spawn_at(node(), fun)
  def spawn_at(node, fun) do
    world = World.here()

    pid =
      Kernel.spawn(fn ->
        receive(do: ({:sim_go, :start} -> :ok))
        Process.put(:sim, world)
        Process.put(:sim_node, node)
        :rand.seed(:exsss, {world.seed, :ets.lookup_element(world.procs, self(), 3), 0})
        # The runtime would log what ends it.
        try do
          fun.()
        catch
          :exit, reason -> exit(reason)
          kind, reason -> exit({kind, reason, __STACKTRACE__})
        end
      end)

    serial = :ets.update_counter(world.facts, :serial, 1)
    :ets.insert(world.procs, {pid, node, serial, :new, 0, nil, false})
    World.at(World.now(), serial, {:start, pid})
    pid
  end

  def exit(pid, reason), do: Net.transmit(node(), World.node_of(pid), :signal, 40, {:exit, pid, self(), reason}) && true

  def monitor(:process, target), do: monitor(:process, target, [])

  def monitor(:process, scope, tag: tag) when is_atom(scope) do
    ref = make_ref()
    Pg.watch(node(), ref, self(), tag)
    ref
  end

  def monitor(:process, target, options) do
    ref = make_ref()
    world = World.here()
    :ets.insert(world.monitors, {ref, self(), target, options[:tag] || :DOWN, options[:alias]})
    if options[:alias], do: :ets.insert(world.aliases, {ref, self(), options[:alias]})
    there = World.node_of(target)

    cond do
      not World.alive?(target) -> Net.transmit(node(), node(), nil, 0, {:down, ref, :noproc})
      there != node() and not Net.known?(node(), there) -> Net.transmit(node(), node(), nil, 0, {:down, ref, :noconnection})
      true -> :ets.insert(world.watched, {target, there, ref, self(), node()})
    end

    ref
  end

  def demonitor(ref, options \\ []) do
    forget(ref)
    if :flush in options, do: receive(do: ({_, ^ref, _, _, _} -> true), after: (0 -> true)), else: true
  end

  @doc "Removes a monitor and its alias."
  def forget(ref) do
    :ets.delete(World.here().aliases, ref)

    with [{_ref, _watcher, target, _tag, _mode}] <- :ets.take(World.here().monitors, ref),
         do: :ets.match_delete(World.here().watched, {target, :_, ref, :_, :_})
  end

  @doc "A node has lost another one: its monitors fire."
  def lost(here, there) do
    for {_target, ^there, ref, _watcher, ^here} <- :ets.tab2list(World.here().watched),
        do: Net.transmit(here, here, nil, 0, {:down, ref, :noconnection})
  end
end
