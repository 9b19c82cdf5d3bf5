defmodule DSPex.PythonBridge.Pool.Cluster.Membership do
  @moduledoc """
  What a coordinator knows of the coordinators on other nodes, and tells them. They find each other by a group
  of `:pg`, which follows nodes that come and go, and speak by the messages of
  `DSPex.PythonBridge.Pool.Cluster.Message`.

  Nothing is sent that would hold the coordinator up. To a node whose connection takes no more, the hello is
  sent again until it does, which makes up for all else that did not get through.
  """

  alias DSPex.PythonBridge.Programs
  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.Pool.{Cluster, Handle}

  require Logger

  # Not that of the pool's module, which is a pool's name: scopes are processes of that name. It stays as it
  # is, whatever this module is called: nodes of other versions of this code are found by it.
  @scope DSPex.PythonBridge.Pool.Cluster
  @again_ms 1_000
  # A change waits so long for other nodes to have made it, too.
  @longest_wait_ms 3_000
  # The news that a coordinator has joined comes by :pg, at times after its hello, but not so long.
  @stranger_ms 10_000

  @enforce_keys [:group, :scope, :pg]
  defstruct [:group, :scope, :pg, members: MapSet.new(), behind: MapSet.new(), waits: %{}] ++
              [older: %{}, strangers: %{}, puzzled?: false]

  @typedoc """
  `scope`: the monitor of `:pg`'s process; `pg`: its reference for this group. `members`: coordinators of the
  group but this one. `behind`: those that get another hello. `waits`: changes that others are making.
  `older`: the versions of those that speak an older one. `strangers`: timers of those that have spoken and
  are not members. `puzzled?`: something was not understood.
  """
  @type t :: %__MODULE__{
          group: atom() | String.t(),
          scope: reference(),
          pg: reference(),
          members: MapSet.t(pid()),
          behind: MapSet.t(pid()),
          waits: %{pos_integer() => map()},
          older: %{pid() => Cluster.Message.version()},
          strangers: %{pid() => reference()},
          puzzled?: boolean()
        }

  @doc "Joins the pool's cluster; nil if it has none."
  @spec join(Handle.t()) :: t() | nil
  def join(%Handle{settings: %{cluster: nil}}), do: nil

  def join(%Handle{settings: %{cluster: group}} = handle) do
    :ets.delete_all_objects(handle.others)
    # Whoever needs the scope first starts it, for all pools of this node; it stays.
    _started_or_already_there = :pg.start(@scope)
    scope = :erlang.monitor(:process, @scope, tag: :scope_down)
    {pg, present} = :pg.monitor(@scope, group)
    :ok = :pg.join(@scope, group, self())
    joined(%__MODULE__{group: group, scope: scope, pg: pg}, handle, present)
  end

  @doc "The nodes that have a pool of this cluster, this one included."
  @spec nodes(Handle.t()) :: [node()]
  def nodes(%Handle{settings: %{cluster: nil}}), do: [node()]

  def nodes(%Handle{settings: %{cluster: group}}) do
    others = for coordinator <- :pg.get_members(@scope, group), do: node(coordinator)
    Enum.sort(Enum.uniq([node() | others]))
  rescue
    # The scope's process is being started again.
    ArgumentError -> [node()]
  end

  ## Who is there

  @doc "Coordinators have joined: each is told all that is known here."
  @spec joined(t(), Handle.t(), [pid()]) :: t()
  def joined(%__MODULE__{} = cluster, handle, coordinators) do
    others = Enum.reject(coordinators, &(&1 == self()))
    members = Enum.into(others, cluster.members)
    greet(%{cluster | members: members}, handle, others)
  end

  @doc "Coordinators have left, or their nodes are out of reach."
  @spec left(t(), Handle.t(), [pid()]) :: {t(), done :: [map()]}
  def left(%__MODULE__{} = cluster, handle, coordinators) do
    Enum.each(coordinators, &:ets.delete(handle.others, &1))
    gone = MapSet.new(coordinators)
    members = MapSet.difference(cluster.members, gone)
    behind = MapSet.difference(cluster.behind, gone)
    older = Map.drop(cluster.older, coordinators)
    cluster = %{cluster | members: members, behind: behind, older: older}

    Enum.reduce(coordinators, {cluster, []}, fn coordinator, {cluster, done} ->
      Enum.reduce(Map.keys(cluster.waits), {cluster, done}, fn id, {cluster, done} ->
        {cluster, more} = changed(cluster, id, coordinator)
        {cluster, more ++ done}
      end)
    end)
  end

  @doc "As `left/3`, for all of them."
  @spec left_all(t(), Handle.t()) :: {t(), done :: [map()]}
  def left_all(%__MODULE__{} = cluster, handle),
    do: left(cluster, handle, MapSet.to_list(cluster.members))

  @doc """
  Another coordinator has spoken in this version. One that turns out to be of an older one has not understood
  what it was told, and is greeted again. One that is not of the group is about to join, and then greeted, or
  has left: what it said is forgotten if it does not join, at `{:stranger, coordinator}`, which comes to the calling
  process.
  """
  @spec heard(t(), Handle.t(), pid(), Cluster.Message.version()) :: t()
  def heard(%__MODULE__{older: older} = cluster, handle, coordinator, version) do
    member? = MapSet.member?(cluster.members, coordinator)
    cluster = if member?, do: cluster, else: stranger(cluster, coordinator)

    cond do
      version == version(cluster, coordinator) ->
        cluster

      member? ->
        greet(%{cluster | older: Map.put(older, coordinator, version)}, handle, [coordinator])

      true ->
        %{cluster | older: Map.put(older, coordinator, version)}
    end
  end

  defp stranger(%{strangers: strangers} = cluster, coordinator)
       when is_map_key(strangers, coordinator),
       do: cluster

  defp stranger(%{strangers: strangers} = cluster, coordinator) do
    timer = :erlang.send_after(@stranger_ms, self(), {:stranger, coordinator})
    %{cluster | strangers: Map.put(strangers, coordinator, timer)}
  end

  @doc "A coordinator that was not of the group when it spoke should have joined by now."
  @spec joined_by_now(t(), Handle.t(), pid()) :: {t(), done :: [map()]}
  def joined_by_now(%__MODULE__{} = cluster, handle, coordinator) do
    cluster = %{cluster | strangers: Map.delete(cluster.strangers, coordinator)}

    if MapSet.member?(cluster.members, coordinator),
      do: {cluster, []},
      else: left(cluster, handle, [coordinator])
  end

  defp version(cluster, coordinator),
    do: Map.get(cluster.older, coordinator, Cluster.Message.version())

  @doc "Something was said that is not understood here, by a coordinator of a newer version as it seems."
  @spec puzzled(t(), Handle.t()) :: t()
  def puzzled(%__MODULE__{puzzled?: true} = cluster, _info), do: cluster

  def puzzled(%__MODULE__{} = cluster, handle) do
    Logger.warning(
      "pool #{inspect(handle.name)}: a message of its cluster is not understood and ignored, as all such " <>
        "will be; messages up to version #{Cluster.Message.version()} are understood here"
    )

    %{cluster | puzzled?: true}
  end

  @doc "What another coordinator has said of itself; whether calls can be sent there."
  @spec note(Handle.t(), pid(), atom(), boolean()) :: boolean()
  # The number tells one readiness from the next, as in DSPex.PythonBridge.Calls.LoadCounters.
  def note(handle, coordinator, name, true),
    do: :ets.insert(handle.others, {coordinator, System.unique_integer([:monotonic]), name})

  def note(handle, coordinator, _name, false) do
    :ets.delete(handle.others, coordinator)
    false
  end

  @doc "Tells the others whether calls can be sent here."
  @spec announce(t() | nil, Handle.t()) :: t() | nil
  def announce(nil, _info), do: nil

  def announce(%__MODULE__{} = cluster, handle),
    do:
      tell(
        cluster,
        cluster.members,
        {:serves, self(), handle.name, LoadCounters.any?(handle.counters)}
      )

  @doc "Greets those again that could not be told something."
  @spec again(t(), Handle.t()) :: t()
  def again(%__MODULE__{behind: behind} = cluster, handle),
    do: greet(%{cluster | behind: MapSet.new()}, handle, behind)

  defp greet(cluster, handle, coordinators) do
    hello =
      {:hello, self(), handle.name, LoadCounters.any?(handle.counters),
       Programs.Store.export(handle.programs)}

    tell(cluster, coordinators, hello)
  end

  ## Changes to the programs

  @doc """
  Has the others make a change that was made here. It is done, and given back, when all of them have
  told that they have, or have gone, or at the latest after some seconds.
  """
  @spec spread(t() | nil, map()) :: {t() | nil, done :: [map()]}
  def spread(nil, over), do: {nil, [over]}

  def spread(%__MODULE__{} = cluster, over) do
    if MapSet.size(cluster.members) == 0 do
      {cluster, [over]}
    else
      cluster =
        tell(cluster, cluster.members, {:change, self(), over.id, over.what, over.body})

      timer = :erlang.start_timer(wait_ms(over.deadline), self(), {:spread, over.id})
      asked = MapSet.difference(cluster.members, cluster.behind)
      settle(cluster, Map.merge(over, %{asked: asked, timer: timer}))
    end
  end

  defp wait_ms(:infinity), do: @longest_wait_ms

  # What is left to the caller, and a little less: it should hear of its success.
  defp wait_ms(deadline) do
    left = deadline - System.monotonic_time(:millisecond)
    min(max(left - div(left, 10), 0), @longest_wait_ms)
  end

  @doc "Another coordinator has made the change."
  @spec changed(t(), pos_integer(), pid()) :: {t(), done :: [map()]}
  def changed(%__MODULE__{waits: waits} = cluster, id, coordinator) do
    case waits do
      %{^id => over} -> settle(cluster, %{over | asked: MapSet.delete(over.asked, coordinator)})
      _done -> {cluster, []}
    end
  end

  @doc "The change has waited long enough."
  @spec expired(t(), pos_integer()) :: {t(), done :: [map()]}
  def expired(%__MODULE__{waits: waits} = cluster, id) do
    case waits do
      %{^id => over} -> settle(cluster, %{over | asked: MapSet.new()})
      _done -> {cluster, []}
    end
  end

  defp settle(cluster, %{id: id} = over) do
    if MapSet.size(over.asked) == 0 do
      :erlang.cancel_timer(over.timer, async: true, info: false)
      {%{cluster | waits: Map.delete(cluster.waits, id)}, [over]}
    else
      {%{cluster | waits: Map.put(cluster.waits, id, over)}, []}
    end
  end

  @doc "Tells one other coordinator that a change of its has been made here."
  @spec confirm(t() | nil, pid(), pos_integer()) :: t() | nil
  def confirm(nil, _coordinator, _id), do: nil
  def confirm(cluster, coordinator, id), do: tell(cluster, [coordinator], {:changed, id, self()})

  ## Messages

  # A member that could not be told is behind; one whose node is gone will leave, or greet anew. One that is not
  # a member is greeted when it joins, if ever.
  defp tell(cluster, coordinators, message) do
    failed =
      for coordinator <- coordinators,
          not told?(coordinator, Cluster.Message.pack(message, version(cluster, coordinator))),
          MapSet.member?(cluster.members, coordinator),
          do: coordinator

    if failed != [] and MapSet.size(cluster.behind) == 0,
      do: :erlang.send_after(@again_ms, self(), :greet_again)

    %{cluster | behind: Enum.into(failed, cluster.behind)}
  end

  defp told?(coordinator, message),
    do: :erlang.send(coordinator, message, [:nosuspend, :noconnect]) == :ok
end
