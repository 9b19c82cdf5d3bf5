defmodule DSPex.PythonBridge.Pool.ProgramChanges do
  @moduledoc """
  `create_program` and `cleanup`, which hold for all peers of the pool and all nodes of its cluster.
  Used by the coordinator's process.

  Each change gets a stamp here, later than all that this node has seen, whatever the clocks of other
  nodes: who changes a program after having heard of another change to it, wins over that. A cleanup
  takes its programs from the table at once, so that no peer is given them any more; a definition
  gets there when a peer has acknowledged it (the bridge puts it there), or has it from another node.

  Whoever asked for a change may give up waiting; the change goes on, so that the peers stay alike. A
  definition that some peers took and others refused is replaced by the one before, if there was one, or
  removed again; a cleanup that no peer made is undone.
  """

  alias DSPex.PythonBridge.{Programs, Protocol}
  alias DSPex.PythonBridge.Calls.{LoadCounters, Request}
  alias DSPex.PythonBridge.Pool.{Broadcast, Handle}

  # Of removals that are in the table, with the stamps that they have there.
  @long_ago {0, 0, :nobody}

  @enforce_keys [:handle, :broadcast]
  defstruct [:handle, :broadcast, latest: 0, undo: %{}]

  @typedoc """
  Who wants to know: a caller (its alias), `GenServer.call/3`'s, another node's coordinator with its number for
  the change, the pool itself, which made one for all nodes; nobody.
  """
  @type from ::
          {:caller, reference()}
          | {:call, GenServer.from()}
          | {:node, pid(), pos_integer()}
          | :pool
          | :nobody
  @typedoc """
  `latest`: the greatest time of a stamp that was seen. `undo`: the definitions before a change that is
  under way, by its stamp.
  """
  @type t :: %__MODULE__{
          handle: Handle.t(),
          broadcast: Broadcast.t(),
          latest: integer(),
          undo: %{Programs.Store.stamp() => [Programs.Store.definition()]}
        }
  @type result :: {t(), [Broadcast.over()]}

  @doc "No change is under way."
  @spec new(Handle.t()) :: t()
  def new(%Handle{pid: pid} = handle),
    do: %__MODULE__{handle: handle, broadcast: Broadcast.new(pid)}

  @doc "Whether `ask/2` can be asked for this: requests come from anywhere."
  @spec asked?(term(), Handle.t()) :: boolean()
  def asked?({:repair, index, id}, handle),
    do: is_integer(index) and index in LoadCounters.indexes(handle.counters) and is_binary(id)

  def asked?({_kind, _ids, nil} = change, _info), do: Programs.Store.change?(change)
  def asked?(_other, _info), do: false

  @doc """
  A caller asks for a change, or for a missing program to be created again at one bridge.
  """
  @spec ask(t(), Request.t()) :: result()
  def ask(%__MODULE__{} = changes, %Request{ref: ref, timeout: timeout, body: body} = request),
    do: ask(changes, ref, timeout, body, request.change)

  defp ask(changes, ref, timeout, body, {:create, id, nil}) do
    {stamp, changes} = stamp(changes)
    changes = remember(changes, stamp, [id])
    start(changes, {:caller, ref}, {:create, id, stamp}, body, timeout)
  end

  defp ask(changes, ref, timeout, body, {:cleanup, ids, nil}) do
    {stamp, changes} = stamp(changes)
    changes = remember(changes, stamp, ids)
    Programs.Store.remove(changes.handle.programs, ids, stamp)
    start(changes, {:caller, ref}, {:cleanup, ids, stamp}, body, timeout)
  end

  # Without a definition or the bridge: as if nobody had answered.
  defp ask(changes, ref, timeout, _no_body, {:repair, index, id}) do
    {what, body, indexes} =
      case Programs.Store.get(changes.handle.programs, id) do
        {stamp, body} -> {{:create, id, stamp}, body, [index]}
        nil -> {nil, "", []}
      end

    start(changes, {:caller, ref}, {:repair, index, what}, body, timeout, indexes)
  end

  @doc "Another node has made a change; over at once if a later one is known here."
  @spec adopt(t(), from(), Programs.Store.change(), binary()) :: result()
  def adopt(%__MODULE__{} = changes, from, {:create, id, stamp} = what, body) do
    if Programs.Store.put(changes.handle.programs, id, stamp, body),
      do: changes |> seen(stamp) |> start(from, what, body, 0),
      else: start(changes, from, what, body, 0, [])
  end

  def adopt(changes, from, {:cleanup, ids, stamp}, _body) do
    programs = changes.handle.programs
    before = ids(programs)
    Programs.Store.remove(programs, ids, stamp)
    changes |> seen(stamp) |> clean_peers(from, before -- ids(programs), stamp)
  end

  @doc "Another node has told all that it knows."
  @spec merge(t(), Programs.Store.exported()) :: result()
  def merge(%__MODULE__{} = changes, exported) do
    {created, removed} = Programs.Store.merge(changes.handle.programs, exported)

    for {id, stamp, body} <- created, reduce: clean_peers(changes, :nobody, removed, @long_ago) do
      {changes, over} ->
        {changes, more} = changes |> seen(stamp) |> start(:nobody, {:create, id, stamp}, body, 0)
        {changes, more ++ over}
    end
  end

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

  defp start(changes, from, what, body, timeout, indexes \\ nil) do
    targets = targets(changes.handle, indexes || LoadCounters.indexes(changes.handle.counters))
    conclude(changes, Broadcast.start(changes.broadcast, from, what, body, timeout, targets))
  end

  defp targets(handle, indexes) do
    for index <- indexes, pid = Process.whereis(Handle.bridge(handle, index)) do
      {index, pid, LoadCounters.ready_since(handle.counters, index) > 0}
    end
  end

  # By name, since peers may have later ones by now. The table knows already.
  defp clean_peers(changes, from, ids, stamp) do
    {:ok, body} = Protocol.encode_body(:cleanup, %{program_ids: ids})
    indexes = if ids == [], do: [], else: LoadCounters.indexes(changes.handle.counters)
    start(changes, from, {:cleanup, ids, stamp}, body, 0, indexes)
  end

  defp conclude(changes, {broadcast, over}) do
    for change <- over, reduce: {%{changes | broadcast: broadcast}, over} do
      {changes, over} ->
        {before, changes} = forget(changes, change)
        {changes, more} = correct(changes, change, before)
        {changes, more ++ over}
    end
  end

  # Only where it was made: what another node has is not for this one to remove.
  defp correct(changes, %{mixed?: true, from: {:caller, _}, what: {:create, id, _}}, [before]) do
    {_id, _stamp, body} = before
    {stamp, changes} = stamp(changes)
    Programs.Store.put(changes.handle.programs, id, stamp, body)
    start(changes, :pool, {:create, id, stamp}, body, 0)
  end

  defp correct(changes, %{mixed?: true, from: {:caller, _}, what: {:create, id, _}}, []) do
    {stamp, changes} = stamp(changes)
    Programs.Store.remove(changes.handle.programs, [id], stamp)
    clean_peers(changes, :pool, [id], stamp)
  end

  # A removal that came from another node while peers were making it: it was not in the table then.
  defp correct(changes, %{what: {:create, id, _stamp}, reply: {:frame, _}}, _before) do
    if Programs.Store.get(changes.handle.programs, id) ||
         Broadcast.creating?(changes.broadcast, id),
       do: {changes, []},
       else: clean_peers(changes, :nobody, [id], @long_ago)
  end

  # Nobody made it: the peers have their programs still, and so must the table.
  defp correct(
         changes,
         %{mixed?: false, from: {:caller, _}, what: {:cleanup, _, _}} = change,
         before
       ) do
    if success?(change.reply), do: {changes, []}, else: {put_back(changes, before), []}
  end

  defp correct(changes, _change, _before), do: {changes, []}

  defp success?({:frame, frame}), do: Protocol.success?(frame)
  defp success?(_error), do: false

  defp put_back(changes, definitions) do
    for {id, _stamp, body} <- definitions, reduce: changes do
      changes ->
        {stamp, changes} = stamp(changes)
        Programs.Store.put(changes.handle.programs, id, stamp, body)
        changes
    end
  end

  ## What there was before

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

  defp forget(changes, %{what: {kind, _ids, stamp}}) when kind in [:create, :cleanup] do
    {before, undo} = Map.pop(changes.undo, stamp, [])
    {before, %{changes | undo: undo}}
  end

  defp forget(changes, _repair), do: {[], changes}

  defp ids(programs), do: for({id, _stamp, _body} <- Programs.Store.definitions(programs), do: id)

  ## Stamps

  defp stamp(changes) do
    {time, count, node} = Programs.Store.stamp()
    stamp = {max(time, changes.latest + 1), count, node}
    {stamp, seen(changes, stamp)}
  end

  defp seen(changes, {time, _count, _node}), do: %{changes | latest: max(time, changes.latest)}
end
