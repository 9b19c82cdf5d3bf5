defmodule DSPex.PythonBridge.Pool.ProgramChanges do
  @moduledoc false
  # `create_program` and `cleanup`, which hold for all peers of the pool. The coordinator's process uses it. Changes that
  # other nodes have made come through `DSPex.PythonBridge.Pool.Cluster.IncomingChanges`.
  #
  # Each change gets a stamp that orders it after all earlier ones. A cleanup removes its programs from the table at
  # once, so that no peer is given them any more; a bridge puts a definition there when its peer has acknowledged it.
  #
  # A change goes on when its caller stops waiting, so that the peers stay alike. A definition that some peers took and
  # others refused is replaced by the one before, or removed if there was none; a cleanup that no peer made is undone.

  alias DSPex.PythonBridge.{Programs, Protocol}
  alias DSPex.PythonBridge.Calls.{LoadCounters, Request}
  alias DSPex.PythonBridge.Pool.{Broadcast, Handle}
  alias DSPex.PythonBridge.Pool.Cluster.Clock

  # Of removals that the table has already, each with a stamp of its own.
  @long_ago {0, 0, :nobody}

  @enforce_keys [:handle, :broadcast]
  defstruct [:handle, :broadcast, clock: 0, undo: %{}]

  @typedoc """
  Who gets the outcome: a caller (its alias), a caller of `GenServer.call/3`, another node's coordinator with its number
  for the change, the pool itself, which made a change for all nodes, or nobody.
  """
  @type from ::
          {:caller, reference()}
          | {:call, GenServer.from()}
          | {:node, pid(), integer()}
          | :pool
          | :nobody
  @typedoc "`undo`: the definitions before a change that is under way, by its stamp."
  @type t :: %__MODULE__{
          handle: Handle.t(),
          broadcast: Broadcast.t(),
          clock: Clock.t(),
          undo: %{Programs.Store.stamp() => [Programs.Store.definition()]}
        }
  @type result :: {t(), [Broadcast.over()]}

  @doc "No change is under way."
  @spec new(Handle.t()) :: t()
  def new(%Handle{pid: pid} = handle),
    do: %__MODULE__{handle: handle, broadcast: Broadcast.new(pid)}

  @doc "The stamp for removals that the table has already."
  @spec long_ago() :: Programs.Store.stamp()
  def long_ago, do: @long_ago

  @doc "Whether a term is a change for `ask/2`: requests come from anywhere."
  @spec valid?(term(), Handle.t()) :: boolean()
  def valid?({:repair, index, id}, handle),
    do: is_integer(index) and index in LoadCounters.indexes(handle.counters) and is_binary(id)

  def valid?({_kind, _ids, nil} = change, _handle), do: Programs.Store.change?(change)
  def valid?(_other, _handle), do: false

  @doc """
  A caller asks for a change, or for a missing program to be created again at one bridge.
  """
  @spec ask(t(), Request.t()) :: result()
  def ask(%__MODULE__{} = changes, %Request{ref: ref, timeout: timeout, body: body} = request),
    do: ask(changes, ref, timeout, body, request.change)

  defp ask(changes, ref, timeout, body, {:create, id, nil}) do
    {stamp, changes} = stamp(changes)
    changes = remember(changes, stamp, [id])
    start(changes, {:caller, ref}, {:create, id, stamp}, body, timeout, all(changes))
  end

  defp ask(changes, ref, timeout, body, {:cleanup, ids, nil}) do
    {stamp, changes} = stamp(changes)
    changes = remember(changes, stamp, ids)
    Programs.Store.remove(changes.handle.programs, ids, stamp)
    start(changes, {:caller, ref}, {:cleanup, ids, stamp}, body, timeout, all(changes))
  end

  # Without a definition it goes to no bridge, which is over at once as if the bridge were not running.
  defp ask(changes, ref, timeout, _no_body, {:repair, index, id}) do
    {change, body, indexes} =
      case Programs.Store.get(changes.handle.programs, id) do
        {stamp, body} -> {{:create, id, stamp}, body, [index]}
        nil -> {nil, "", []}
      end

    start(changes, {:caller, ref}, {:repair, index, change}, body, timeout, indexes)
  end

  @doc "Sends a change that nobody waits for longer than needed to all bridges, or those of these slots."
  @spec deliver(t(), from(), Programs.Store.change(), binary(), [LoadCounters.index()] | nil) ::
          result()
  def deliver(%__MODULE__{} = changes, from, change, body, indexes \\ nil),
    do: start(changes, from, change, body, 0, indexes || all(changes))

  @doc """
  Sends the bridges again what they have of a program that is later than a change that has just been sent to them: it
  came from another node later, but was made earlier, and the peers make changes in the order in which they get them.
  """
  @spec deliver_later(t(), Programs.Store.id(), Programs.Store.stamp()) :: result()
  def deliver_later(%__MODULE__{} = changes, id, stamp) do
    for {{:create, _id, later} = change, body} <- Broadcast.later(changes.broadcast, id, stamp),
        not Programs.Store.removed?(changes.handle.programs, id, later),
        reduce: {changes, []} do
      {changes, over} ->
        {changes, more} = deliver(changes, :nobody, change, body)
        {changes, more ++ over}
    end
  end

  @doc "Removes programs that the table has no more from the peers: by name, since a peer may have a later one."
  @spec clean_peers(t(), from(), [Programs.Store.id()], Programs.Store.stamp()) :: result()
  def clean_peers(%__MODULE__{} = changes, from, ids, stamp) do
    {:ok, body} = Protocol.encode_body(:cleanup, %{program_ids: ids})
    indexes = if ids == [], do: [], else: all(changes)
    deliver(changes, from, {:cleanup, ids, stamp}, body, indexes)
  end

  @doc "Takes in the stamp of a change that was made elsewhere: later ones of this node get later stamps."
  @spec seen(t(), Programs.Store.stamp()) :: t()
  def seen(%__MODULE__{} = changes, stamp),
    do: %{changes | clock: Clock.seen(changes.clock, stamp)}

  @doc "As `DSPex.PythonBridge.Pool.Broadcast.answered/3`."
  @spec answered(t(), reference(), Broadcast.reply()) :: result()
  def answered(%__MODULE__{} = changes, ref, reply),
    do: conclude(changes, Broadcast.answered(changes.broadcast, ref, reply))

  @doc "As `DSPex.PythonBridge.Pool.Broadcast.down/2`."
  @spec down(t(), LoadCounters.index()) :: result()
  def down(%__MODULE__{} = changes, index),
    do: conclude(changes, Broadcast.down(changes.broadcast, index))

  @doc "As `DSPex.PythonBridge.Pool.Broadcast.expired/2`."
  @spec expired(t(), pos_integer()) :: result()
  def expired(%__MODULE__{} = changes, id),
    do: conclude(changes, Broadcast.expired(changes.broadcast, id))

  defp all(changes), do: LoadCounters.indexes(changes.handle.counters)

  defp start(%{handle: handle} = changes, from, change, body, timeout, indexes) do
    targets =
      for index <- indexes,
          pid = Process.whereis(Handle.bridge(handle, index)),
          do: {index, pid, LoadCounters.ready_since(handle.counters, index) > 0}

    conclude(changes, Broadcast.start(changes.broadcast, from, change, body, timeout, targets))
  end

  defp conclude(changes, {broadcast, over}) do
    for change <- over, reduce: {%{changes | broadcast: broadcast}, over} do
      {changes, over} ->
        {before, changes} = forget(changes, change)
        {changes, more} = correct(changes, change, before)
        {changes, more ++ over}
    end
  end

  # Only on the node where the change was made.
  defp correct(changes, %{mixed?: true, from: {:caller, _}, change: {:create, id, _}}, [before]) do
    {_id, _stamp, body} = before
    {stamp, changes} = put_back(changes, before, & &1)
    deliver(changes, :pool, {:create, id, stamp}, body)
  end

  defp correct(changes, %{mixed?: true, from: {:caller, _}, change: {:create, id, _}}, []) do
    {stamp, changes} = stamp(changes)
    Programs.Store.remove(changes.handle.programs, [id], stamp)
    clean_peers(changes, :pool, [id], stamp)
  end

  # A removal that came from another node while peers were making it: it was not in the table then.
  defp correct(changes, %{change: {:create, id, _stamp}, reply: {:frame, _}}, _before) do
    if Programs.Store.get(changes.handle.programs, id) ||
         Broadcast.creating?(changes.broadcast, id),
       do: {changes, []},
       else: clean_peers(changes, :nobody, [id], @long_ago)
  end

  # No peer made it: they still have their programs, and so must the table. One that has started since has not loaded
  # them, and other nodes may have received the removal with the whole table.
  defp correct(
         changes,
         %{mixed?: false, from: {:caller, _}, change: {:cleanup, _, _}} = over,
         before
       ) do
    if success?(over),
      do: {changes, []},
      else: Enum.reduce(before, {changes, []}, &undo_removal/2)
  end

  defp correct(changes, _over, _before), do: {changes, []}

  @doc "Whether a change that is over was made."
  @spec success?(Broadcast.over()) :: boolean()
  def success?(%{reply: {:frame, frame}}), do: Protocol.success?(frame)
  def success?(_error), do: false

  ## The definitions before a change

  defp remember(changes, stamp, ids) do
    programs = changes.handle.programs

    before =
      if ids == :all,
        do: Programs.Store.definitions(programs),
        else:
          for(
            id <- ids,
            {stamp, body} <- List.wrap(Programs.Store.get(programs, id)),
            do: {id, stamp, body}
          )

    %{changes | undo: Map.put(changes.undo, stamp, before)}
  end

  defp forget(changes, %{from: {:caller, _}, change: {kind, _ids, stamp}})
       when kind in [:create, :cleanup] do
    {before, undo} = Map.pop(changes.undo, stamp, [])
    {before, %{changes | undo: undo}}
  end

  defp forget(changes, _of_another), do: {[], changes}

  # A declaration stays one, of this node.
  defp undo_removal({id, stamp, body} = before, {changes, over}) do
    {from, alike} =
      if Programs.Store.declared?(stamp),
        do: {:nobody, &Programs.Store.declared/1},
        else: {:pool, & &1}

    {stamp, changes} = put_back(changes, before, alike)
    {changes, more} = deliver(changes, from, {:create, id, stamp}, body)
    {changes, more ++ over}
  end

  defp put_back(changes, {id, _stamp, body}, alike) do
    {stamp, changes} = stamp(changes)
    stamp = alike.(stamp)
    Programs.Store.put(changes.handle.programs, id, stamp, body)
    {stamp, changes}
  end

  defp stamp(changes) do
    {stamp, clock} = Clock.stamp(changes.clock)
    {stamp, %{changes | clock: clock}}
  end
end
