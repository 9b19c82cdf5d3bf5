defmodule DSPex.PythonBridge.Pool.Cluster do
  @moduledoc false
  # The coordinator's view of the coordinators on other nodes. They find each other by a group of `:pg`, which follows
  # nodes that come and go, and send each other:
  #
  #   * `{:hello, coordinator, serves?, programs}`: the whole table of programs, to each member that joins, and to all once
  #     an hour, since a node that dies while it sends a change may have sent it to some only
  #   * `{:serves, coordinator, serves?}`: whether a peer there can get calls, at each change
  #   * `{:change, change, body}`: one change of the programs, unconfirmed
  #
  # Sending never blocks the coordinator. A member whose connection is full gets a hello later, which includes everything
  # that was not sent.

  alias DSPex.PythonBridge.Pool.{Handle, LoadCounters}
  alias DSPex.PythonBridge.Programs.Store

  # `:pg` registers a process of that name.
  @scope __MODULE__
  @again_ms 1_000
  @copy_ms 3_600_000

  @enforce_keys [:pg]
  defstruct [:pg, members: MapSet.new(), behind: MapSet.new()]

  @typedoc """
  `pg`: the reference of `:pg` for this group. `members`: the other coordinators of the group. `behind`: those that get
  another hello.
  """
  @type t :: %__MODULE__{
          pg: reference(),
          members: MapSet.t(pid()),
          behind: MapSet.t(pid())
        }

  @doc "Joins the pool's cluster; nil if it has none."
  @spec join(Handle.t()) :: t() | nil
  def join(%Handle{settings: %{cluster: nil}}), do: nil

  def join(%Handle{settings: %{cluster: group}} = handle) do
    :erlang.send_after(@copy_ms, self(), :copy)
    :ets.delete_all_objects(handle.others)
    # The first pool of this node starts the scope for all of them; it stays.
    _started_or_already_there = :pg.start(@scope)
    {pg, present} = :pg.monitor(@scope, group)
    :ok = :pg.join(@scope, group, self())
    joined(%__MODULE__{pg: pg}, handle, present)
  end

  @doc "The nodes that have a pool of this cluster, this one included."
  @spec nodes(Handle.t()) :: [node()]
  def nodes(%Handle{settings: %{cluster: nil}}), do: [node()]

  def nodes(%Handle{settings: %{cluster: group}}) do
    others = for coordinator <- :pg.get_members(@scope, group), do: node(coordinator)
    Enum.sort(Enum.uniq([node() | others]))
  end

  @doc "Handles a message about the members; `:unknown` if it is another one."
  @spec handle_info(t() | nil, Handle.t(), term()) :: t() | :unknown
  def handle_info(nil, _handle, _message), do: :unknown

  def handle_info(%{pg: pg} = cluster, handle, {pg, :join, _group, coordinators}),
    do: joined(cluster, handle, coordinators)

  def handle_info(%{pg: pg} = cluster, handle, {pg, :leave, _group, coordinators}) do
    Enum.each(coordinators, &:ets.delete(handle.others, &1))
    gone = MapSet.new(coordinators)

    %{
      cluster
      | members: MapSet.difference(cluster.members, gone),
        behind: MapSet.difference(cluster.behind, gone)
    }
  end

  def handle_info(%{behind: behind} = cluster, handle, :greet_again),
    do: greet(%{cluster | behind: MapSet.new()}, handle, behind)

  def handle_info(cluster, handle, :copy) do
    :erlang.send_after(@copy_ms, self(), :copy)
    greet(cluster, handle, cluster.members)
  end

  def handle_info(_cluster, _handle, _message), do: :unknown

  defp joined(cluster, handle, coordinators) do
    others = Enum.reject(coordinators, &(&1 == self()))
    greet(%{cluster | members: Enum.into(others, cluster.members)}, handle, others)
  end

  @doc """
  Notes whether another node can serve calls; false if its coordinator is no member (yet). One that becomes a member is
  sent a hello, and answers it with this.
  """
  @spec note(t(), Handle.t(), pid(), boolean()) :: boolean()
  def note(%__MODULE__{} = cluster, handle, coordinator, serves?) do
    serves? = serves? and MapSet.member?(cluster.members, coordinator)

    # The number distinguishes one readiness from the next, as in DSPex.PythonBridge.Pool.LoadCounters.
    if serves?,
      do: :ets.insert(handle.others, {coordinator, System.unique_integer([:monotonic])}),
      else: :ets.delete(handle.others, coordinator)

    serves?
  end

  ## What is sent to them

  @doc "Sends the others, or one of them, whether this node can serve calls."
  @spec announce(t() | nil, Handle.t(), [pid()] | nil) :: t() | nil
  def announce(cluster, handle, coordinators \\ nil)
  def announce(nil, _handle, _coordinators), do: nil

  def announce(%__MODULE__{} = cluster, handle, coordinators) do
    serves? = LoadCounters.any?(handle.counters)
    send_all(cluster, coordinators || cluster.members, {:serves, self(), serves?})
  end

  @doc "Sends the others a change that was made here."
  @spec spread(t() | nil, Store.change(), binary()) :: t() | nil
  def spread(nil, _change, _body), do: nil

  def spread(%__MODULE__{} = cluster, change, body),
    do: send_all(cluster, cluster.members, {:change, change, body})

  defp greet(cluster, handle, coordinators) do
    serves? = LoadCounters.any?(handle.counters)
    programs = Store.export(handle.programs)
    send_all(cluster, coordinators, {:hello, self(), serves?, programs})
  end

  # A member that could not be sent to is behind; one whose node is gone will leave, or join again.
  defp send_all(cluster, coordinators, message) do
    failed =
      for coordinator <- coordinators,
          :erlang.send(coordinator, message, [:nosuspend, :noconnect]) != :ok,
          MapSet.member?(cluster.members, coordinator),
          do: coordinator

    if failed != [] and MapSet.size(cluster.behind) == 0,
      do: :erlang.send_after(@again_ms, self(), :greet_again)

    %{cluster | behind: Enum.into(failed, cluster.behind)}
  end
end
