defmodule DSPex.PythonBridge.Pool.Coordinator do
  @moduledoc """
  The process of a pool for all that needs an order or a memory: changes to the programs, which all peers
  must see alike; loans; callers that wait until something can serve them; other nodes. Calls pass it by.

  It never waits for anything. If it ends by a defect, its supervisor starts it again: loans are in a
  table, waiting callers come again by themselves, new changes wait for it
  (`DSPex.PythonBridge.Pool.CoordinatorClient`), and of those under way the caller gets `:bridge_not_running`,
  while the bridges go on with them.
  """

  use GenServer
  use DSPex.PythonBridge.OTP.ServerGuard

  alias DSPex.PythonBridge.{Programs, Protocol}
  alias DSPex.PythonBridge.Calls.{LoadCounters, Request}
  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Pool.{Checkouts, Cluster, Handle, ProgramChanges}
  alias DSPex.PythonBridge.Pool.Cluster.Membership

  require Cluster.Message

  @enforce_keys [:handle, :changes, :cluster]
  # waiting: callers' aliases, with the monitors of their processes.
  defstruct [:handle, :changes, :cluster, waiting: %{}]

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

    {:ok,
     %__MODULE__{
       handle: handle,
       changes: ProgramChanges.new(handle),
       cluster: Membership.join(handle)
     }}
  end

  # In good order, or because the supervisor was killed: the pool ends. After a defect it goes on.
  @impl GenServer
  def terminate(reason, state) when reason in [:normal, :shutdown, :killed],
    do: Handle.withdraw(state.handle)

  def terminate(_defect, _state), do: :ok

  @impl GenServer
  def format_status(status) do
    Map.new(status, fn
      {:state, %{changes: _} = state} -> {:state, %{state | changes: :redacted}}
      {key, _with_bodies} when key in [:message, :log] -> {key, :redacted}
      other -> other
    end)
  end

  ## Loans

  @impl GenServer
  def handle_call({:checkout, ref}, {borrower, _tag}, state) when is_reference(ref) do
    case Checkouts.lend(state.handle, borrower, ref) do
      nil -> {:reply, {:error, :pool_exhausted}, state}
      bridge -> {:reply, {:ok, bridge}, serves_less(state)}
    end
  end

  def handle_call({:checkin, bridge}, _from, state) do
    case Checkouts.take_back(state.handle, bridge) do
      :ok -> {:reply, :ok, serves_more(state)}
      {:error, text} -> {:reply, {:error, text}, state}
    end
  end

  ## Changes to the programs

  def handle_call({:adopt, {id, {_, _, _} = stamp, body}} = question, from, state)
      when is_binary(body) do
    change = {:create, id, stamp}

    if Programs.Store.change?(change),
      do:
        {:noreply, made(state, ProgramChanges.adopt(state.changes, {:call, from}, change, body))},
      else: drop({:"$gen_call", from, question}, state)
  end

  def handle_call(question, from, state), do: drop({:"$gen_call", from, question}, state)

  @impl GenServer
  def handle_cast({:unheard, ref}, state) when is_reference(ref) do
    if Checkouts.undo(state.handle, ref),
      do: {:noreply, serves_more(state)},
      else: {:noreply, state}
  end

  def handle_cast(message, state), do: drop(message, state)

  # As a bridge is asked. A caller that gives up is not remembered: its alias then leads nowhere.
  @impl GenServer
  def handle_info({:request, request} = message, state) do
    if Request.valid?(request) and request.ref != nil and
         ProgramChanges.asked?(request.change, state.handle),
       do: {:noreply, made(state, ProgramChanges.ask(state.changes, request))},
       else: drop(message, state)
  end

  # What bridges answer.
  def handle_info({ref, reply}, state) when is_reference(ref),
    do: {:noreply, made(state, ProgramChanges.answered(state.changes, ref, reply))}

  def handle_info({:DOWN, ref, :process, _bridge, _reason}, state) do
    gone = {:error, :bridge_not_running}
    {:noreply, made(state, ProgramChanges.answered(state.changes, ref, gone))}
  end

  def handle_info({:timeout, _timer, {:delivery, id}}, state),
    do: {:noreply, made(state, ProgramChanges.expired(state.changes, id))}

  ## Bridges

  def handle_info({:slot, _index, :ready}, state), do: {:noreply, serves_more(state)}

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

  # What they tried may have changed before their message got here.
  def handle_info({:wait, ref, pid, passed, passed_nodes}, state)
      when is_reference(ref) and is_pid(pid) and length(passed) >= 0 and
             length(passed_nodes) >= 0 do
    if LoadCounters.any?(state.handle.counters, passed) or
         :ets.tab2list(state.handle.others) -- passed_nodes != [] do
      send(ref, {ref, :changed})
      {:noreply, state}
    else
      monitor = :erlang.monitor(:process, pid, tag: {:waiter_gone, ref})
      {:noreply, put_in(state.waiting[ref], monitor)}
    end
  end

  def handle_info({:abandon, ref}, state), do: {:noreply, waits_no_more(state, ref)}

  def handle_info({{:waiter_gone, ref}, _monitor, :process, _pid, _reason}, state),
    do: {:noreply, waits_no_more(state, ref)}

  ## Other nodes

  def handle_info(message, %{cluster: %Membership{} = cluster} = state)
      when Cluster.Message.is_message(message) do
    case Cluster.Message.read(message) do
      {:ok, said, version, coordinator} ->
        cluster = Membership.heard(cluster, state.handle, coordinator, version)
        {:noreply, said(%{state | cluster: cluster}, said)}

      :unknown ->
        {:noreply, %{state | cluster: Membership.puzzled(cluster, state.handle)}}
    end
  end

  def handle_info({:timeout, _timer, {:spread, id}}, %{cluster: %Membership{}} = state),
    do: {:noreply, made_there(state, Membership.expired(state.cluster, id))}

  def handle_info({:stranger, coordinator}, %{cluster: %Membership{}} = state)
      when is_pid(coordinator),
      do:
        {:noreply,
         made_there(state, Membership.joined_by_now(state.cluster, state.handle, coordinator))}

  def handle_info(:greet_again, %{cluster: %Membership{}} = state),
    do: {:noreply, %{state | cluster: Membership.again(state.cluster, state.handle)}}

  def handle_info({pg, :join, _group, coordinators}, %{cluster: %{pg: pg}} = state),
    do:
      {:noreply, %{state | cluster: Membership.joined(state.cluster, state.handle, coordinators)}}

  def handle_info({pg, :leave, _group, coordinators}, %{cluster: %{pg: pg}} = state),
    do: {:noreply, made_there(state, Membership.left(state.cluster, state.handle, coordinators))}

  # The scope's process is gone, and with it what it knew.
  def handle_info({:scope_down, scope, :process, _, _}, %{cluster: %{scope: scope}} = state) do
    state = made_there(state, Membership.left_all(state.cluster, state.handle))
    {:noreply, %{state | cluster: Membership.join(state.handle)}}
  end

  # The scope of :pg before this one.
  def handle_info({pg, what, _group, _coordinators}, state)
      when is_reference(pg) and what in [:join, :leave],
      do: {:noreply, state}

  def handle_info(message, state), do: drop(message, state)

  defp drop(message, state) do
    ServerGuard.drop(message, __MODULE__)
    {:noreply, state}
  end

  ## What other nodes say

  defp said(state, {:hello, coordinator, name, serves?, exported}) do
    state = note_other(state, coordinator, name, serves?)
    made(state, ProgramChanges.merge(state.changes, exported))
  end

  defp said(state, {:serves, coordinator, name, serves?}),
    do: note_other(state, coordinator, name, serves?)

  defp said(state, {:change, coordinator, id, what, body}),
    do: made(state, ProgramChanges.adopt(state.changes, {:node, coordinator, id}, what, body))

  defp said(state, {:changed, id, coordinator}),
    do: made_there(state, Membership.changed(state.cluster, id, coordinator))

  ## A change is over

  defp made(state, {changes, over}),
    do: over |> Enum.reverse() |> Enum.reduce(%{state | changes: changes}, &made_here(&2, &1))

  # One of this node is made on the others, too, before anybody is told of its success.
  defp made_here(state, change) do
    if ours?(change) and success?(change),
      do: made_there(state, Membership.spread(state.cluster, change)),
      else: tell(state, change)
  end

  defp made_there(state, {cluster, over}),
    do: Enum.reduce(over, %{state | cluster: cluster}, &tell(&2, &1))

  defp ours?(%{what: {:repair, _index, _change}}), do: false
  defp ours?(%{from: from}), do: from == :pool or match?({:caller, _ref}, from)

  defp success?(%{reply: {:frame, frame}}), do: Protocol.success?(frame)
  defp success?(_error), do: false

  defp tell(state, %{from: {:node, coordinator, id}}),
    do: %{state | cluster: Membership.confirm(state.cluster, coordinator, id)}

  defp tell(state, change) do
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

  defp wake(state) do
    for {ref, monitor} <- state.waiting do
      Process.demonitor(monitor, [:flush])
      send(ref, {ref, :changed})
    end

    %{state | waiting: %{}}
  end

  # Callers see it in the slots; other nodes need only hear when nothing is left.
  defp serves_less(state) do
    if LoadCounters.any?(state.handle.counters),
      do: state,
      else: %{state | cluster: Membership.announce(state.cluster, state.handle)}
  end

  defp note_other(state, coordinator, name, serves?) do
    if Membership.note(state.handle, coordinator, name, serves?), do: wake(state), else: state
  end

  defp waits_no_more(state, ref) do
    {monitor, waiting} = Map.pop(state.waiting, ref)
    if monitor, do: Process.demonitor(monitor, [:flush])
    %{state | waiting: waiting}
  end
end
