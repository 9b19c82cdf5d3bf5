defmodule Sim.World do
  @moduledoc """
  The scheduler: simulated time, and processes of which one runs at a time.

  Each simulated process is a process of this BEAM with its own mailbox. It runs until it waits (`Sim.Runtime.wait/1`); then the
  next event is taken: a message that arrives, a timer, a start, an action of the scenario. So the tables below have one writer at a
  time, and a seed gives the same run again. Computing takes no simulated time.
  """

  alias Sim.Net

  @tables [:events, :procs, :names, :monitors, :watched, :aliases, :timers, :net, :stats, :terms, :facts]

  @doc """
  Makes the calling process the scheduler of a new world. `options`: `seed`; `prefix`, of the modules under test
  (`Sim.Instrument`); `latency_us`; `bytes_per_us`, of each node's network.
  """
  def new(options) do
    tables = Map.new(@tables -- [:events, :watched], &{&1, :ets.new(&1, [:public])})
    bags = Map.new([:watched], &{&1, :ets.new(&1, [:public, :bag])})
    defaults = %{seed: 1, prefix: Sim.Of, latency_us: 400, bytes_per_us: 125, scheduler: self()}
    world = defaults |> Map.merge(tables) |> Map.merge(bags) |> Map.merge(Map.new(options))
    world = Map.put(world, :events, :ets.new(:events, [:public, :ordered_set]))
    for counter <- [:now, :seq, :serial, :unique], do: :ets.insert(world.facts, {counter, 0})
    enter(world, :outside)
    world
  end

  @doc "Makes a process part of a world: its code finds the world and its node."
  def enter(world, node) do
    Process.put(:sim, world)
    Process.put(:sim_node, node)
    serial = :ets.update_counter(world.facts, :serial, 1)
    :rand.seed(:exsss, {world.seed, serial, 0})
    serial
  end

  def here, do: Process.get(:sim)
  def now, do: fact(:now)
  def fact(key, default \\ nil), do: :ets.lookup_element(here().facts, key, 2, default)
  def note(key, value), do: :ets.insert(here().facts, {key, value})
  def count(key, by \\ 1), do: :ets.update_counter(here().stats, key, by, {key, 0})
  def counted(key), do: :ets.lookup_element(here().stats, key, 2, 0)

  ## Events

  @doc "Adds an event; those of one time are ordered by the process they are for. Returns its key."
  def at(time, order \\ 0, event) do
    key = {time, order, :ets.update_counter(here().facts, :seq, 1)}
    :ets.insert(here().events, {key, event})
    key
  end

  @doc "Runs a function in the scheduler after some simulated ms."
  def in_ms(ms, action), do: at(now() + round(ms * 1000), {:act, action})

  def cancel(nil), do: :ok
  def cancel(key), do: :ets.delete(here().events, key)

  @doc "Lets `ms` of simulated time pass."
  def run(ms), do: run_until(now() + round(ms * 1000), fn -> false end)

  @doc "Lets time pass until `done?`, which is asked after each ms that has events, at most until `limit` (µs); gives whether it is."
  def run_until(limit, done?), do: done?.() or loop(limit, done?, now())

  defp loop(limit, done?, asked) do
    case :ets.first(here().events) do
      {time, _order, _seq} when time > asked + 1000 ->
        if done?.(), do: true, else: loop(limit, done?, time)

      {time, _order, _seq} = key when time <= limit ->
        [{_key, event}] = :ets.take(here().events, key)
        note(:now, time)
        count(:events)
        handle(event)
        loop(limit, done?, asked)

      _nothing_before ->
        note(:now, limit)
        done?.()
    end
  end

  defp handle({:act, action}), do: action.()
  defp handle({:timer, ref, pid, message}), do: (:ets.delete(here().timers, ref) && give(pid, message))
  defp handle({:arrive, from, to, epoch, event}), do: Net.arrive(from, to, epoch, event)
  defp handle({:message, pid, message}), do: give(pid, message)
  defp handle({:nodedown, at, gone, epoch}), do: Net.nodedown(at, gone, epoch)
  defp handle({:nodeup, at, other, epoch}), do: Net.nodeup(at, other, epoch)

  defp handle({:alias, ref, message}) do
    with [{_ref, pid, mode}] <- :ets.lookup(here().aliases, ref) do
      if mode == :reply_demonitor, do: Sim.Runtime.forget(ref)
      if mode == :reply, do: Sim.Runtime.unalias(ref)
      give(pid, message)
    end
  end

  defp handle({:down, ref, reason}) do
    with [{_ref, watcher, target, tag, _mode}] <- :ets.lookup(here().monitors, ref) do
      Sim.Runtime.forget(ref)
      give(watcher, {tag, ref, :process, target, reason})
    end
  end

  defp handle({:start, pid}) do
    with [{_pid, node, _serial, :new, _, _, _} = row] <- :ets.lookup(here().procs, pid) do
      unless held?(node, {:start, pid}) do
        Process.monitor(pid)
        resume(row, :start)
      end
    end
  end

  defp handle({:wake, pid, number}) do
    with [{_pid, node, _serial, :waiting, ^number, _key, _trap} = row] <- :ets.lookup(here().procs, pid),
         do: held?(node, {:wake, pid, number}) || resume(row, :timeout)
  end

  defp handle({:exit, pid, from, reason}) do
    with [{_pid, node, _serial, status, _no, _key, trap?}] when status != :dead <- :ets.lookup(here().procs, pid) do
      cond do
        held?(node, {:exit, pid, from, reason}) -> :held
        reason == :kill -> kill(pid, :killed)
        trap? -> give(pid, {:EXIT, from, reason})
        reason == :normal -> :ignored
        true -> kill(pid, reason)
      end
    end
  end

  defp handle({:pg, node, message}), do: Sim.Pg.received(node, message)

  def dispatch(event), do: handle(event)

  @doc "Puts a message into a mailbox; the process goes on if it waits."
  def give(pid, message) do
    case :ets.lookup(here().procs, pid) do
      [{_pid, node, _serial, status, _no, _key, _trap} = row] when status != :dead ->
        unless held?(node, {:message, pid, message}) do
          send(pid, message)
          if status == :waiting, do: resume(row, :again)
        end

      _gone ->
        :gone
    end
  end

  # A node that hangs handles its events later, in their order.
  defp held?(node, event), do: Net.frozen?(node) and Net.later(node, event)

  ## Processes

  def node_of(pid), do: :ets.lookup_element(here().procs, pid, 2, nil)
  def serial_of(pid), do: :ets.lookup_element(here().procs, pid, 3, 0)
  def alive?(pid), do: :ets.lookup_element(here().procs, pid, 4, :dead) != :dead
  def on(node), do: :ets.select(here().procs, [{{:"$1", node, :_, :"$2", :_, :_, :_}, [{:"/=", :"$2", :dead}], [:"$1"]}])

  defp resume({pid, node, serial, _status, number, key, trap?}, what) do
    cancel(key)
    :ets.insert(here().procs, {pid, node, serial, :running, number + 1, nil, trap?})
    began = System.monotonic_time()
    send(pid, {:sim_go, what})

    receive do
      {:waits, ^pid, deadline} ->
        worked(node, pid, began)
        key = is_integer(deadline) && at(max(deadline, now()), serial, {:wake, pid, number + 1})
        :ets.update_element(here().procs, pid, [{4, :waiting}, {6, key || nil}])

      {:DOWN, _ref, :process, ^pid, reason} ->
        worked(node, pid, began)
        ended(pid, node, reason)
    end
  end

  defp worked(node, pid, began) do
    if :ets.lookup_element(here().names, {:coordinator, node}, 2, nil) == pid,
      do: count({:cpu_ns, node}, System.convert_time_unit(System.monotonic_time() - began, :native, :nanosecond))
  end

  @doc "Ends a process that waits."
  def kill(pid, reason, signals? \\ true) do
    node = node_of(pid)

    # One that was started has a monitor.
    if :ets.lookup_element(here().procs, pid, 4) == :new, do: Process.monitor(pid)
    Process.exit(pid, :kill)
    receive(do: ({:DOWN, _ref, :process, ^pid, _killed} -> :ok))

    if signals?, do: ended(pid, node, reason), else: forget(pid, node)
  end

  defp ended(pid, node, reason) do
    if crash?(reason), do: note(:crashes, [{node, reason} | fact(:crashes, [])])
    forget(pid, node)
    Sim.Pg.ended(node, pid)

    for {_pid, _node, ref, _watcher, there} <- :ets.lookup(here().watched, pid),
        do: Net.transmit(node, there, :signal, 40, {:down, ref, reason})
  end

  # Others may still ask for the node of a coordinator.
  defp forget(pid, node) do
    cancel(:ets.lookup_element(here().procs, pid, 6))

    if :ets.match_delete(here().names, {{:_, node}, pid}) && fact({:lasting, pid}),
      do: :ets.update_element(here().procs, pid, [{4, :dead}, {6, nil}]),
      else: :ets.delete(here().procs, pid)
  end

  defp crash?(reason), do: reason not in [:normal, :shutdown, :killed, :noproc, :noconnection, :vanished] and not match?({:ok, _}, reason)

  @doc "Ends all processes of this world."
  def stop do
    for {pid, _, _, _, _, _, _} <- :ets.tab2list(here().procs), do: Process.exit(pid, :kill)
    :ok
  end
end
