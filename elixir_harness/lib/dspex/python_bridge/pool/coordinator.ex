defmodule DSPex.PythonBridge.Pool.Coordinator do
  @moduledoc false
  # The process of a pool for what needs an order or a memory: bridges and nodes that have to hear of a change to the
  # programs; callers that wait until a peer can serve them; the coordinators of other nodes. Calls do not go through it.
  #
  # A change is an ordinary call to one peer, whose bridge puts it into the pool's table and reports it here before it
  # answers the caller. The other bridges then get what the table has of the programs in question, which is the change
  # with the latest stamp, so all peers end with the same definitions, in whatever order they get them.
  #
  # It never waits for anything. If it crashes, its supervisor restarts it, and its callers ask again.

  use GenServer
  use DSPex.PythonBridge.OTP.ServerGuard

  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.OTP.{Ask, Deadline, ServerGuard}
  alias DSPex.PythonBridge.Pool.{Cluster, Handle}
  alias DSPex.PythonBridge.{Programs, Protocol}

  # How often a coordinator that is being restarted is looked for.
  @restart_ms 5
  # No `create_program` is longer on its way to a peer and back.
  @recent_ms 600_000

  @enforce_keys [:handle, :cluster]
  # waiting: the aliases of callers, with the monitors of their processes. failed: why no peer of a slot starts. recent:
  # the ids of programs that bridges were given lately, and those of the time before; `:all` for any.
  defstruct [:handle, :cluster, waiting: %{}, failed: %{}, recent: {%{}, %{}}]

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

  @doc """
  Waits, at most until the deadline, until the other bridges and nodes have been sent a change of these programs that a
  bridge has reported to `coordinator`. One that was restarted since sends what the table has.
  """
  @spec settle(atom(), Deadline.t(), pid() | nil, :all | [Programs.Store.id()]) :: :ok
  def settle(pool, deadline, coordinator, ids) do
    with :down <- ask(pool, deadline, &{:settle, &1, coordinator, ids}),
         coordinator when coordinator != nil <- find(pool, deadline),
         do: settle(pool, deadline, nil, ids),
         else: (_settled_or_late -> :ok)
  end

  @doc "The process; nil if there is none by the deadline, or the pool has ended."
  @spec find(atom(), Deadline.t()) :: pid() | nil
  def find(pool, deadline) do
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
  Asks the coordinator of another node for a bridge of its pool, as `DSPex.PythonBridge.Calls.LoadCounters.pick/3`, with the
  readiness of its slot. nil if it has none, or has not answered in `timeout` ms: its node may hang, or have left. Only the
  question is waited for, so such a node does nothing when it wakes.
  """
  @spec pick_there(pid(), [slot], :least_busy | :longest_up, timeout()) ::
          {:ok, pid(), slot} | nil
        when slot: {LoadCounters.index(), since :: non_neg_integer()}
  def pick_there(coordinator, passed, preference, timeout) do
    ref = :erlang.alias([:reply])
    message = {:pick, ref, passed, preference}
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
    :erlang.send_after(@recent_ms, self(), :forget_recent)
    {:ok, %__MODULE__{handle: handle, cluster: Cluster.join(handle)}}
  end

  @impl GenServer
  defdelegate format_status(status), to: DSPex.PythonBridge.Bridge.Redaction

  # The pool ends, in order or since its supervisor was killed. After a crash it goes on.
  @impl GenServer
  def terminate(reason, state) when reason in [:normal, :shutdown, :killed],
    do: Handle.withdraw(state.handle)

  def terminate(_crash, _state), do: :ok

  ## Changes to the programs

  # From the bridge of a slot, whose peer has made the change. The peer has it last, unless the bridge was given another one
  # of that program since it sent this one.
  @impl GenServer
  def handle_info({:changed, index, {:create, id, stamp} = change, body}, state) do
    case Programs.Store.get(state.handle.programs, id) do
      {^stamp, _body} ->
        state = give(state, [id], if(recent?(state, id), do: nil, else: index))
        {:noreply, %{state | cluster: Cluster.spread(state.cluster, change, body)}}

      # A later change counts, which goes its own way.
      _other ->
        {:noreply, give(state, [id])}
    end
  end

  def handle_info({:changed, _index, {:cleanup, ids, _stamp} = change, body}, state) do
    state = give(state, ids)
    {:noreply, %{state | cluster: Cluster.spread(state.cluster, change, body)}}
  end

  # Other nodes have got it from the new coordinator's hello.
  def handle_info({:settle, ref, coordinator, ids}, state) do
    state = if coordinator == self(), do: state, else: give(state, ids)
    send(ref, {ref, :ok})
    {:noreply, state}
  end

  # Another node has made it.
  def handle_info({:change, {:create, id, stamp}, body}, state) do
    later? = Programs.Store.put(state.handle.programs, id, stamp, body)
    {:noreply, if(later?, do: give(state, [id]), else: state)}
  end

  def handle_info({:change, {:cleanup, ids, stamp}, _body}, state) do
    Programs.Store.remove(state.handle.programs, ids, stamp)
    {:noreply, give(state, ids)}
  end

  def handle_info({:hello, coordinator, serves?, exported}, %{cluster: %Cluster{}} = state) do
    {created, removed} = Programs.Store.merge(state.handle.programs, exported)
    state = give(state, removed ++ for({id, _stamp, _body} <- created, do: id))
    cluster = Cluster.announce(state.cluster, state.handle, [coordinator])
    {:noreply, note(%{state | cluster: cluster}, coordinator, serves?)}
  end

  def handle_info(:forget_recent, %{recent: {recent, _before}} = state) do
    :erlang.send_after(@recent_ms, self(), :forget_recent)
    {:noreply, %{state | recent: {%{}, recent}}}
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

  def handle_info({:pick, ref, passed, preference}, %{handle: handle} = state) do
    # The asker's node may hang.
    :erlang.send(ref, {ref, pick(handle, passed, preference)}, [:nosuspend, :noconnect])
    {:noreply, state}
  end

  # What they have tried may have changed before their message was read.
  def handle_info({:wait, ref, pid, passed, passed_nodes}, %{handle: handle} = state)
      when is_reference(ref) and is_pid(pid) and length(passed) >= 0 and
             length(passed_nodes) >= 0 do
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
      :unknown ->
        ServerGuard.drop(message, __MODULE__)
        {:noreply, state}

      cluster ->
        {:noreply, %{state | cluster: cluster}}
    end
  end

  ## What bridges are given

  # What the table has of these programs, to all bridges, or to all but that of a slot.
  defp give(state, ids, but \\ nil)
  defp give(state, [], _but), do: state

  defp give(%{handle: handle, recent: {recent, before}} = state, ids, but) do
    messages = messages(handle.programs, ids)

    for index <- LoadCounters.indexes(handle.counters),
        index != but,
        bridge = Process.whereis(Handle.bridge(handle, index)),
        message <- messages,
        do: send(bridge, message)

    recent = for id <- List.wrap(ids), into: recent, do: {id, true}
    %{state | recent: {recent, before}}
  end

  defp messages(programs, :all) do
    created = for definition <- Programs.Store.definitions(programs), do: created(definition)
    [cleaned(:all, %{}) | created]
  end

  defp messages(programs, ids) do
    found = for id <- ids, do: {id, Programs.Store.get(programs, id)}
    removed = for {id, nil} <- found, do: id
    cleaned = if removed == [], do: [], else: [cleaned(removed, %{program_ids: removed})]
    cleaned ++ for({id, {stamp, body}} <- found, do: created({id, stamp, body}))
  end

  defp created({id, stamp, body}), do: {:changed, {:create, id, stamp}, body}

  defp cleaned(ids, args) do
    {:ok, body} = Protocol.encode_body(:cleanup, args)
    {:changed, {:cleanup, ids, Programs.Store.stamp()}, body}
  end

  # Any program may have been removed lately if all were.
  defp recent?(%{recent: {recent, before}}, id) do
    Enum.any?([id, :all], &(is_map_key(recent, &1) or is_map_key(before, &1)))
  end

  ## Who can serve

  defp pick(%Handle{counters: counters} = handle, passed, preference) do
    index = LoadCounters.pick(counters, LoadCounters.still(counters, passed), preference)
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
