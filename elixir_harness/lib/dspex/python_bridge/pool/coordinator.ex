defmodule DSPex.PythonBridge.Pool.Coordinator do
  @moduledoc false
  # The process of a pool for everything that needs an order or a memory: changes to the programs, which all peers must
  # get alike; checkouts; callers that wait until a peer can serve them; the coordinators of other nodes. Calls do not
  # go through it.
  #
  # It never waits for anything. If it crashes, its supervisor restarts it: checkouts are in a table, waiting callers
  # ask again, new changes wait for it (`DSPex.PythonBridge.Pool.CoordinatorClient`). The callers of changes that were
  # under way get `:bridge_not_running`, while the bridges go on with these.

  use GenServer
  use DSPex.PythonBridge.OTP.ServerGuard

  alias DSPex.PythonBridge.Calls.{LoadCounters, Request}
  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Pool.{Checkouts, Handle, ProgramChanges}
  alias DSPex.PythonBridge.Pool.Cluster.{IncomingChanges, Membership}
  alias DSPex.PythonBridge.Programs

  @enforce_keys [:handle, :changes, :cluster]
  # waiting: the aliases of callers, with the monitors of their processes. failed: why no peer of a slot starts.
  defstruct [:handle, :changes, :cluster, waiting: %{}, failed: %{}]

  @doc "Starts the coordinator of a pool."
  @spec start_link(Handle.t()) :: GenServer.on_start()
  def start_link(%Handle{} = handle),
    do: GenServer.start_link(__MODULE__, handle, name: Handle.coordinator(handle.name))

  @impl GenServer
  def init(%Handle{} = handle) do
    # For terminate/2.
    Process.flag(:trap_exit, true)
    # Keeps definitions in queued messages out of crash reports.
    Process.flag(:sensitive, true)
    Handle.publish(handle)
    Checkouts.restore(handle)
    changes = ProgramChanges.new(handle)
    {:ok, %__MODULE__{handle: handle, changes: changes, cluster: Membership.join(handle)}}
  end

  # The pool ends, in order or since its supervisor was killed. After a crash it goes on.
  @impl GenServer
  def terminate(reason, state) when reason in [:normal, :shutdown, :killed],
    do: Handle.withdraw(state.handle)

  def terminate(_crash, _state), do: :ok

  @impl GenServer
  def format_status(status) do
    Map.new(status, fn
      {:state, %{changes: _} = state} -> {:state, %{state | changes: :redacted}}
      {key, _with_bodies} when key in [:message, :log] -> {key, :redacted}
      other -> other
    end)
  end

  ## Checkouts

  @impl GenServer
  def handle_call({:checkout, ref}, {borrower, _tag}, state) when is_reference(ref) do
    case Checkouts.check_out(state.handle, borrower, ref) do
      nil -> {:reply, {:error, :pool_exhausted}, state}
      bridge -> {:reply, {:ok, bridge}, serves_less(state)}
    end
  end

  def handle_call({:checkin, bridge}, _from, state) do
    case Checkouts.check_in(state.handle, bridge) do
      :ok -> {:reply, :ok, serves_more(state)}
      {:error, text} -> {:reply, {:error, text}, state}
    end
  end

  def handle_call({:over, ref}, _from, state) when is_reference(ref),
    do: {:reply, :ok, over(state, ref)}

  # A definition that came with a call from another node.
  def handle_call({:adopt, {id, {_, _, _} = stamp, body}} = question, from, state)
      when is_binary(body) do
    change = {:create, id, stamp}

    if Programs.Store.change?(change),
      do:
        {:noreply, made(state, IncomingChanges.adopt(state.changes, {:call, from}, change, body))},
      else: drop({:"$gen_call", from, question}, state)
  end

  def handle_call(question, from, state), do: drop({:"$gen_call", from, question}, state)

  @impl GenServer
  def handle_cast({:over, ref}, state) when is_reference(ref), do: {:noreply, over(state, ref)}
  def handle_cast(message, state), do: drop(message, state)

  defp over(state, ref),
    do: if(Checkouts.undo(state.handle, ref), do: serves_more(state), else: state)

  ## Changes to the programs

  # The message that a bridge gets. Callers that give up are not remembered: sending to their alias does nothing then.
  @impl GenServer
  def handle_info({:request, request} = message, state) do
    if Request.valid?(request) and request.ref != nil and
         ProgramChanges.valid?(request.change, state.handle),
       do: {:noreply, made(state, ProgramChanges.ask(state.changes, request))},
       else: drop(message, state)
  end

  # A bridge has answered.
  def handle_info({ref, reply}, state) when is_reference(ref),
    do: {:noreply, made(state, ProgramChanges.answered(state.changes, ref, reply))}

  def handle_info({:DOWN, ref, :process, _bridge, _reason}, state) do
    gone = {:error, :bridge_not_running}
    {:noreply, made(state, ProgramChanges.answered(state.changes, ref, gone))}
  end

  def handle_info({:timeout, _timer, {:delivery, id}}, state),
    do: {:noreply, made(state, ProgramChanges.expired(state.changes, id))}

  ## Bridges

  def handle_info({:slot, index, :ready}, state),
    do: {:noreply, serves_more(%{state | failed: Map.delete(state.failed, index)})}

  def handle_info({:slot, index, {:failed, reason}}, state) do
    state = put_in(state.failed[index], reason)
    {:noreply, if(all_failed?(state), do: wake(state, {:not_started, reason}), else: state)}
  end

  def handle_info({:slot, index, :down}, state) do
    state = serves_less(state)
    {:noreply, made(state, ProgramChanges.down(state.changes, index))}
  end

  def handle_info({{:borrower_gone, index}, monitor, :process, _pid, _reason}, state) do
    if Checkouts.borrower_gone(state.handle, index, monitor),
      do: {:noreply, serves_more(state)},
      else: {:noreply, state}
  end

  ## Callers that wait

  # What they have tried may have changed before their message was read.
  def handle_info({:wait, ref, pid, passed, passed_nodes}, state)
      when is_reference(ref) and is_pid(pid) and length(passed) >= 0 and
             length(passed_nodes) >= 0 do
    cond do
      LoadCounters.any?(state.handle.counters, passed) or
          :ets.tab2list(state.handle.others) -- passed_nodes != [] ->
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

  def handle_info(message, state) do
    case Membership.handle_info(state.cluster, state.handle, message) do
      :unknown -> drop(message, state)
      cluster_and_events -> {:noreply, cluster(state, cluster_and_events)}
    end
  end

  defp drop(message, state) do
    ServerGuard.drop(message, __MODULE__)
    {:noreply, state}
  end

  ## Other nodes

  defp cluster(state, {cluster, events}),
    do: Enum.reduce(events, %{state | cluster: cluster}, &event/2)

  defp event({:merge, programs}, state),
    do: made(state, IncomingChanges.merge(state.changes, programs))

  defp event({:adopt, from, change, body}, state),
    do: made(state, IncomingChanges.adopt(state.changes, from, change, body))

  defp event(:serves, state), do: wake(state)
  defp event({:done, change}, state), do: reply(state, change)

  ## A change is over

  # One of this node is sent to the other nodes before its caller gets the reply.
  defp made(state, {changes, over}) do
    for change <- Enum.reverse(over), reduce: %{state | changes: changes} do
      state ->
        if ours?(change) and ProgramChanges.success?(change),
          do: cluster(state, Membership.spread(state.cluster, change)),
          else: reply(state, change)
    end
  end

  defp ours?(%{change: {:repair, _index, _change}}), do: false
  defp ours?(%{from: from}), do: from == :pool or match?({:caller, _ref}, from)

  defp reply(state, %{from: {:node, coordinator, id}}),
    do: %{state | cluster: Membership.confirm(state.cluster, coordinator, id)}

  defp reply(state, change) do
    case change.from do
      {:caller, ref} -> send(ref, {ref, change.reply})
      {:call, from} -> GenServer.reply(from, :ok)
      _nobody -> :ok
    end

    state
  end

  ## Who can serve

  defp serves_more(state),
    do: wake(%{state | cluster: Membership.announce(state.cluster, state.handle)})

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

  # Callers see it in the slots; other nodes only need to know when no peer is left.
  defp serves_less(state) do
    if LoadCounters.any?(state.handle.counters),
      do: state,
      else: %{state | cluster: Membership.announce(state.cluster, state.handle)}
  end

  defp waits_no_more(state, ref) do
    {monitor, waiting} = Map.pop(state.waiting, ref)
    if monitor, do: Process.demonitor(monitor, [:flush])
    %{state | waiting: waiting}
  end
end
