defmodule DSPex.PythonBridge.Pool.Coordinator do
  @moduledoc false
  # The process of a pool for what needs a memory: nodes that have to hear of a change to the programs; callers that wait until a peer can serve them; the coordinators of other nodes. Calls do not go through it.
  #
  # A change is an ordinary call to one peer, whose bridge puts it into the pool's table, and tells all bridges
  # of the pool and this process before it answers the caller. Each bridge then sends its peer what the table has of the
  # programs in question, which is the change with the latest stamp, so all peers end with the same definitions, in
  # whatever order they are told.
  #
  # It never waits for anything. If it crashes, its supervisor restarts it, and its callers ask again.

  use GenServer

  alias DSPex.PythonBridge.OTP.{Ask, Deadline, ServerGuard}
  alias DSPex.PythonBridge.Pool.{Cluster, Handle, LoadCounters}
  alias DSPex.PythonBridge.Programs

  # How often a coordinator that is being restarted is looked for.
  @restart_ms 5

  @enforce_keys [:handle, :cluster]
  # waiting: the aliases of callers, with the monitors of their processes. failed: why no peer of a slot starts.
  defstruct [:handle, :cluster, waiting: %{}, failed: %{}]

  @doc "Starts the coordinator of a pool."
  @spec start_link(Handle.t()) :: GenServer.on_start()
  def start_link(%Handle{} = handle),
    do: GenServer.start_link(__MODULE__, handle, name: Handle.coordinator(handle.name))

  ## For callers

  @doc """
  Waits until a slot that is not among `passed`, or a node that is not among `passed_nodes`, can serve calls. `:timeout` at
  the deadline; `:gone` if the coordinator has ended meanwhile, but not before it can be asked again.
  """
  @spec wait(atom(), Deadline.t(), list(), list()) ::
          :changed | {:not_started, String.t()} | :timeout | :gone
  def wait(pool, deadline, passed, passed_nodes) do
    message = &{:wait, &1, self(), passed, passed_nodes}

    case ask(pool, deadline, message) do
      {:ok, answer} ->
        answer

      {:timeout, ref} ->
        with pid when pid != nil <- Process.whereis(Handle.coordinator(pool)),
             do: send(pid, {:abandon, ref})

        :timeout

      :down ->
        find(pool, deadline)
        if Deadline.left(deadline) == 0, do: :timeout, else: :gone
    end
  end

  # nil if there is none by the deadline, or the pool has ended.
  defp find(pool, deadline) do
    with nil <- Process.whereis(Handle.coordinator(pool)) do
      left = Deadline.left(deadline)

      # An atom is greater than any number.
      if left > 0 and Handle.fetch(pool) != nil do
        Process.sleep(min(@restart_ms, left))
        find(pool, deadline)
      end
    end
  end

  defp ask(pool, deadline, message) do
    case find(pool, deadline) do
      nil -> :down
      coordinator -> Ask.ask(coordinator, Deadline.left(deadline), message)
    end
  end

  @doc """
  Asks the coordinator of another node for a bridge of its pool, as `DSPex.PythonBridge.Pool.LoadCounters.pick/2`, with the
  readiness of its slot. nil if it has none, or has not answered in `timeout` ms: its node may hang, or have left. Only the
  question is waited for, so such a node does nothing when it wakes.
  """
  @spec pick_there(pid(), [slot], timeout()) ::
          {:ok, pid(), slot} | nil
        when slot: {LoadCounters.index(), since :: non_neg_integer()}
  def pick_there(coordinator, passed, timeout) do
    ref = :erlang.alias([:reply])
    message = {:pick, ref, passed}
    sent = :erlang.send(coordinator, message, [:nosuspend, :noconnect])

    receive do
      {^ref, answer} -> answer
    after
      if(sent == :ok, do: timeout, else: 0) ->
        :erlang.unalias(ref)

        # The answer may have come between the two.
        receive do
          {^ref, answer} -> answer
        after
          0 -> nil
        end
    end
  end

  ## The process

  @impl GenServer
  def init(%Handle{} = handle) do
    # For terminate/2.
    Process.flag(:trap_exit, true)
    # Keeps queued messages, which have the callers' contents, out of crash reports.
    Process.flag(:sensitive, true)
    Handle.publish(handle)
    {:ok, %__MODULE__{handle: handle, cluster: Cluster.join(handle)}}
  end

  @impl GenServer
  defdelegate format_status(status), to: ServerGuard

  # The pool ends, in order or since its supervisor was killed. After a crash it goes on.
  @impl GenServer
  def terminate(reason, state) do
    ServerGuard.ending(reason, fn ->
      if reason in [:normal, :shutdown, :killed], do: Handle.withdraw(state.handle)
    end)
  end

  @impl GenServer
  def handle_call(_stray, _from, state), do: {:reply, {:error, :unknown_call}, state}

  @impl GenServer
  def handle_cast(_stray, state), do: {:noreply, state}

  ## Changes to the programs

  # From a bridge, whose peer has made the change. A later change of it goes its own way.
  @impl GenServer
  def handle_info({:changed, {kind, ids, stamp} = change, body}, %{handle: handle} = state) do
    if kind == :cleanup or match?({^stamp, _body}, Programs.Store.get(handle.programs, ids)),
      do: {:noreply, %{state | cluster: Cluster.spread(state.cluster, change, body)}},
      else: {:noreply, state}
  end

  # Another node has made it.
  def handle_info({:change, {_kind, ids, _stamp} = change, body}, %{handle: handle} = state) do
    Programs.Store.apply_change(handle.programs, change, body)
    Handle.tell_bridges(handle, ids)
    {:noreply, state}
  end

  def handle_info({:hello, coordinator, serves?, exported}, %{cluster: %Cluster{}} = state) do
    Handle.tell_bridges(state.handle, Programs.Store.merge(state.handle.programs, exported))
    cluster = Cluster.announce(state.cluster, state.handle, [coordinator])
    {:noreply, note(%{state | cluster: cluster}, coordinator, serves?)}
  end

  ## Bridges

  def handle_info({:slot, index, :ready}, state),
    do: {:noreply, serves_more(%{state | failed: Map.delete(state.failed, index)})}

  def handle_info({:slot, index, {:failed, reason}}, state) do
    state = put_in(state.failed[index], reason)
    {:noreply, if(all_failed?(state), do: wake(state, {:not_started, reason}), else: state)}
  end

  # Callers see it in the slots; other nodes only need to know when no peer is left.
  def handle_info({:slot, _index, :down}, state) do
    if LoadCounters.any?(state.handle.counters),
      do: {:noreply, state},
      else: {:noreply, %{state | cluster: Cluster.announce(state.cluster, state.handle)}}
  end

  ## Callers

  def handle_info({:pick, ref, passed}, %{handle: handle} = state) do
    # The asker's node may hang.
    :erlang.send(ref, {ref, pick(handle, passed)}, [:nosuspend, :noconnect])
    {:noreply, state}
  end

  # What they have tried may have changed before their message was read.
  def handle_info({:wait, ref, pid, passed, passed_nodes}, %{handle: handle} = state) do
    cond do
      LoadCounters.any?(handle.counters, passed) or
          :ets.tab2list(handle.others) -- passed_nodes != [] ->
        send(ref, {ref, :changed})
        {:noreply, state}

      all_failed?(state) ->
        send(ref, {ref, {:not_started, hd(Map.values(state.failed))}})
        {:noreply, state}

      true ->
        monitor = :erlang.monitor(:process, pid, tag: {:waiter_gone, ref})
        {:noreply, put_in(state.waiting[ref], monitor)}
    end
  end

  def handle_info({:abandon, ref}, state), do: {:noreply, waits_no_more(state, ref)}

  def handle_info({{:waiter_gone, ref}, _monitor, :process, _pid, _reason}, state),
    do: {:noreply, waits_no_more(state, ref)}

  ## Other nodes

  def handle_info({:serves, coordinator, serves?}, %{cluster: %Cluster{}} = state),
    do: {:noreply, note(state, coordinator, serves?)}

  def handle_info(message, state) do
    case Cluster.handle_info(state.cluster, state.handle, message) do
      :unknown -> {:noreply, state}
      cluster -> {:noreply, %{state | cluster: cluster}}
    end
  end

  ## Who can serve

  defp pick(%Handle{counters: counters} = handle, passed) do
    index = LoadCounters.pick(counters, LoadCounters.still(counters, passed))
    bridge = index && Process.whereis(Handle.bridge(handle, index))
    if bridge, do: {:ok, bridge, {index, LoadCounters.ready_since(counters, index)}}
  end

  defp note(state, coordinator, serves?) do
    if Cluster.note(state.cluster, state.handle, coordinator, serves?),
      do: wake(state),
      else: state
  end

  defp serves_more(state),
    do: wake(%{state | cluster: Cluster.announce(state.cluster, state.handle)})

  # Neither a peer here starts, nor does another node serve.
  defp all_failed?(%{handle: handle, failed: failed}),
    do: map_size(failed) == tuple_size(handle.bridges) and :ets.info(handle.others, :size) == 0

  defp wake(state, answer \\ :changed) do
    for {ref, monitor} <- state.waiting do
      Process.demonitor(monitor, [:flush])
      send(ref, {ref, answer})
    end

    %{state | waiting: %{}}
  end

  defp waits_no_more(state, ref) do
    {monitor, waiting} = Map.pop(state.waiting, ref)
    if monitor, do: Process.demonitor(monitor, [:flush])
    %{state | waiting: waiting}
  end
end
