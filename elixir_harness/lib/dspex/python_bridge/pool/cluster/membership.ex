defmodule DSPex.PythonBridge.Pool.Cluster.Membership do
  @moduledoc false
  # The coordinator's view of the coordinators on other nodes. They find each other by a group of `:pg`, which follows
  # nodes that come and go, and exchange the messages of `DSPex.PythonBridge.Pool.Cluster.Message`.
  #
  # Sending never blocks the coordinator. A node whose connection is full gets a whole hello later, which includes
  # everything that was not sent.

  alias DSPex.PythonBridge.Programs
  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.Pool.{Broadcast, Handle}
  alias DSPex.PythonBridge.Pool.Cluster.{Confirmations, Message}

  require Logger
  require Message

  # Scopes are processes of that name, so this is not the name of the pool's module, which is a pool's name. It must
  # not change with the name of this module: nodes with other versions of this code find each other by it.
  @scope DSPex.PythonBridge.Pool.Cluster
  @again_ms 1_000
  # How often one of the others, at random, gets a whole hello: a node that dies while it sends a change may have sent it
  # to some of the others only.
  @compare_ms 60_000
  # :pg may report that a coordinator has joined after its hello has come, but not by this much.
  @stranger_ms 10_000

  @enforce_keys [:group, :scope, :pg]
  defstruct [:group, :scope, :pg, members: MapSet.new(), behind: MapSet.new(), waits: %{}] ++
              [older: %{}, strangers: %{}, warned?: false, compare: nil]

  @typedoc """
  `scope`: the monitor of the process of `:pg`; `pg`: its reference for this group. `members`: the other coordinators
  of the group. `behind`: those that get another hello. `waits`: changes that others are making. `older`: the
  message versions of those that use an older one. `strangers`: timers of those that have sent something and are not
  members. `warned?`: an unknown message was logged. `compare`: the timer of the next hello to one of the members.
  """
  @type t :: %__MODULE__{
          group: atom() | String.t(),
          scope: reference(),
          pg: reference(),
          members: MapSet.t(pid()),
          behind: MapSet.t(pid()),
          waits: Confirmations.t(),
          older: %{pid() => Message.version()},
          strangers: %{pid() => reference()},
          warned?: boolean(),
          compare: reference() | nil
        }
  @typedoc """
  What the coordinator has to do: take in changes of another node, wake callers since another node can serve, reply to
  the caller of a change that is done.
  """
  @type event ::
          {:merge, Programs.Store.exported()}
          | {:adopt, from :: {:node, pid(), integer()}, Programs.Store.change(), binary()}
          | :serves
          | {:done, Broadcast.over()}

  @doc "Joins the pool's cluster; nil if it has none."
  @spec join(Handle.t()) :: t() | nil
  def join(%Handle{settings: %{cluster: nil}}), do: nil

  def join(%Handle{settings: %{cluster: group}} = handle) do
    :ets.delete_all_objects(handle.others)
    # The first pool of this node starts the scope for all of them; it stays.
    _started_or_already_there = :pg.start(@scope)
    scope = :erlang.monitor(:process, @scope, tag: :scope_down)
    {pg, present} = :pg.monitor(@scope, group)
    :ok = :pg.join(@scope, group, self())
    compare_later(joined(%__MODULE__{group: group, scope: scope, pg: pg}, handle, present))
  end

  defp compare_later(cluster),
    do: %{cluster | compare: :erlang.start_timer(@compare_ms, self(), :compare)}

  @doc "The nodes that have a pool of this cluster, this one included."
  @spec nodes(Handle.t()) :: [node()]
  def nodes(%Handle{settings: %{cluster: nil}}), do: [node()]

  def nodes(%Handle{settings: %{cluster: group}}) do
    others = for coordinator <- :pg.get_members(@scope, group), do: node(coordinator)
    Enum.sort(Enum.uniq([node() | others]))
  rescue
    # The process of the scope is being restarted.
    ArgumentError -> [node()]
  end

  @doc "Handles a message to the coordinator; `:unknown` if it is not one of a cluster."
  @spec handle_info(t() | nil, Handle.t(), term()) :: {t(), [event()]} | :unknown
  def handle_info(nil, _handle, _message), do: :unknown

  def handle_info(cluster, handle, message) when Message.is_message(message) do
    case Message.read(message) do
      {:ok, message, version, coordinator} ->
        cluster |> heard(handle, coordinator, version) |> received(handle, message)

      :unknown ->
        {warn(cluster, handle), []}
    end
  end

  def handle_info(cluster, _handle, {:timeout, _timer, {:spread, id}}),
    do: done(cluster, Confirmations.expired(cluster.waits, id))

  def handle_info(cluster, handle, {:stranger, coordinator}) when is_pid(coordinator) do
    cluster = %{cluster | strangers: Map.delete(cluster.strangers, coordinator)}

    if MapSet.member?(cluster.members, coordinator),
      do: {cluster, []},
      else: left(cluster, handle, [coordinator])
  end

  def handle_info(%{behind: behind} = cluster, handle, :greet_again),
    do: {greet(%{cluster | behind: MapSet.new()}, handle, behind), []}

  def handle_info(%{compare: timer} = cluster, handle, {:timeout, timer, :compare}),
    do: {cluster |> greet(handle, Enum.take_random(cluster.members, 1)) |> compare_later(), []}

  # Of an earlier scope.
  def handle_info(cluster, _handle, {:timeout, _timer, :compare}), do: {cluster, []}

  def handle_info(%{pg: pg} = cluster, handle, {pg, :join, _group, coordinators}),
    do: {joined(cluster, handle, coordinators), []}

  def handle_info(%{pg: pg} = cluster, handle, {pg, :leave, _group, coordinators}),
    do: left(cluster, handle, coordinators)

  # The process of the scope is gone, and with it all groups.
  def handle_info(%{scope: scope} = cluster, handle, {:scope_down, scope, :process, _, _}) do
    {_cluster, events} = left(cluster, handle, MapSet.to_list(cluster.members))
    {join(handle), events}
  end

  # Of an earlier scope.
  def handle_info(cluster, _handle, {pg, change, _group, _coordinators})
      when is_reference(pg) and change in [:join, :leave],
      do: {cluster, []}

  def handle_info(_cluster, _handle, _message), do: :unknown

  ## Who is there

  defp joined(cluster, handle, coordinators) do
    others = Enum.reject(coordinators, &(&1 == self()))
    members = Enum.into(others, cluster.members)
    greet(%{cluster | members: members}, handle, others)
  end

  defp left(cluster, handle, coordinators) do
    Enum.each(coordinators, &:ets.delete(handle.others, &1))
    gone = MapSet.new(coordinators)
    members = MapSet.difference(cluster.members, gone)
    behind = MapSet.difference(cluster.behind, gone)
    older = Map.drop(cluster.older, coordinators)
    cluster = %{cluster | members: members, behind: behind, older: older}
    done(cluster, Confirmations.gone(cluster.waits, coordinators))
  end

  # A member that uses an older version than was assumed has not understood its hello: it gets another. One that is
  # not a member is about to join, and is greeted then; or it has left, and is forgotten by a timer.
  defp heard(cluster, handle, coordinator, version) do
    member? = MapSet.member?(cluster.members, coordinator)
    cluster = if member?, do: cluster, else: stranger(cluster, coordinator)

    if version == version(cluster, coordinator) do
      cluster
    else
      cluster = %{cluster | older: Map.put(cluster.older, coordinator, version)}
      if member?, do: greet(cluster, handle, [coordinator]), else: cluster
    end
  end

  defp stranger(%{strangers: strangers} = cluster, coordinator)
       when is_map_key(strangers, coordinator),
       do: cluster

  defp stranger(%{strangers: strangers} = cluster, coordinator) do
    timer = :erlang.send_after(@stranger_ms, self(), {:stranger, coordinator})
    %{cluster | strangers: Map.put(strangers, coordinator, timer)}
  end

  defp version(cluster, coordinator), do: Map.get(cluster.older, coordinator, Message.version())

  ## What they send

  defp received(cluster, handle, {:hello, coordinator, name, serves?, programs}),
    do: {cluster, note(handle, coordinator, name, serves?) ++ [{:merge, programs}]}

  defp received(cluster, handle, {:serves, coordinator, name, serves?}),
    do: {cluster, note(handle, coordinator, name, serves?)}

  defp received(cluster, _handle, {:change, coordinator, id, change, body}),
    do: {cluster, [{:adopt, {:node, coordinator, id}, change, body}]}

  defp received(cluster, _handle, {:changed, id, coordinator}),
    do: done(cluster, Confirmations.confirmed(cluster.waits, id, coordinator))

  # The number distinguishes one readiness from the next, as in DSPex.PythonBridge.Calls.LoadCounters.
  defp note(handle, coordinator, name, true) do
    :ets.insert(handle.others, {coordinator, System.unique_integer([:monotonic]), name})
    [:serves]
  end

  defp note(handle, coordinator, _name, false) do
    :ets.delete(handle.others, coordinator)
    []
  end

  defp done(cluster, {waits, done}), do: {%{cluster | waits: waits}, Enum.map(done, &{:done, &1})}

  # Most likely from a newer version of this code.
  defp warn(%{warned?: true} = cluster, _handle), do: cluster

  defp warn(cluster, handle) do
    Logger.warning(
      "pool #{inspect(handle.name)}: a message of its cluster is not understood and ignored, as all such " <>
        "will be; messages up to version #{Message.version()} are understood here"
    )

    %{cluster | warned?: true}
  end

  ## What is sent to them

  @doc "Sends the others whether this node can serve calls."
  @spec announce(t() | nil, Handle.t()) :: t() | nil
  def announce(nil, _handle), do: nil

  def announce(%__MODULE__{} = cluster, handle) do
    serves? = LoadCounters.any?(handle.counters)
    send_all(cluster, cluster.members, {:serves, self(), handle.name, serves?})
  end

  @doc """
  Sends the others a change that was made here. It is done when all of them have confirmed it, or have gone, or after
  some seconds.
  """
  @spec spread(t() | nil, Broadcast.over()) :: {t() | nil, [event()]}
  def spread(nil, change), do: {nil, [{:done, change}]}

  def spread(%__MODULE__{members: members} = cluster, change) do
    if MapSet.size(members) == 0 do
      {cluster, [{:done, change}]}
    else
      cluster =
        send_all(cluster, members, {:change, self(), change.id, change.change, change.body})

      open = MapSet.difference(cluster.members, cluster.behind)
      done(cluster, Confirmations.add(cluster.waits, change, open))
    end
  end

  @doc "Confirms to another coordinator that a change of its node has been made here."
  @spec confirm(t() | nil, pid(), integer()) :: t() | nil
  def confirm(nil, _coordinator, _id), do: nil

  def confirm(cluster, coordinator, id),
    do: send_all(cluster, [coordinator], {:changed, id, self()})

  defp greet(cluster, handle, coordinators) do
    serves? = LoadCounters.any?(handle.counters)
    programs = Programs.Store.export(handle.programs)
    send_all(cluster, coordinators, {:hello, self(), handle.name, serves?, programs})
  end

  # A member that could not be sent to is behind; one whose node is gone will leave, or be greeted anew. One that is
  # not a member is greeted when it joins.
  defp send_all(cluster, coordinators, message) do
    failed =
      for coordinator <- coordinators,
          message = Message.pack(message, version(cluster, coordinator)),
          :erlang.send(coordinator, message, [:nosuspend, :noconnect]) != :ok,
          MapSet.member?(cluster.members, coordinator),
          do: coordinator

    if failed != [] and MapSet.size(cluster.behind) == 0,
      do: :erlang.send_after(@again_ms, self(), :greet_again)

    %{cluster | behind: Enum.into(failed, cluster.behind)}
  end
end
