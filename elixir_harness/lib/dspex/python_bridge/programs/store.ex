defmodule DSPex.PythonBridge.Programs.Store do
  @moduledoc false
  # The definitions of programs that peers have acknowledged, for their successors: a table of the process that makes
  # it, a supervisor for example, which survives the bridges that use it.
  #
  # A definition is the body of the request that made it. Each change has a stamp; of two changes of one program the one
  # with the later stamp counts, in whatever order they come. So several bridges can write one table, and several nodes
  # can exchange theirs. A removal leaves a tombstone, for a day or until there are 10,000 later ones.
  #
  # Declared programs (`DSPex.PythonBridge.Programs.Declared`) are a layer of their own below those that were created:
  # any creation hides one, however early it was, and only a later removal takes it away. Other nodes are not sent them, so
  # each node of a cluster has the declarations of its own release.
  #
  # Any process can read the table, since several write it.

  alias DSPex.PythonBridge.Error

  # A change that is longer on its way may bring a removed program back.
  @removed_us 24 * 3_600 * 1_000_000
  @max_tombstones 10_000
  @prune_after 1_000
  @never {0, 0, nil}
  # In place of the node in a stamp, which is an atom for any version.
  @declared :declared

  @type table :: :ets.tid()
  @type id :: String.t()
  @typedoc "Microseconds since 1970, what orders changes of the same microsecond, and the node, or `:declared`."
  @type stamp :: {integer(), integer(), node()}
  @type definition :: {id(), stamp(), body :: binary()}
  @type change :: {:create, id(), stamp() | nil} | {:cleanup, :all | [id()], stamp() | nil}
  @opaque exported :: [tuple()]

  # Rows: {{:program, id}, stamp, body}, {{:removed, id}, stamp, nil}, {:removed_all, stamp, nil}. For this node
  # alone: {{:declared, id}, stamp, body}; {{:facts, id}, stamp, facts}, what was read from the definition
  # with that stamp; {{:warned, id}}, of `first_without_tools?/2`; {:undeclared, why}, the declarations that are not definitions, with their stamps and errors;
  # {:removals, count}.

  @doc "An empty table of the calling process."
  @spec new() :: table()
  def new, do: :ets.new(__MODULE__, [:set, :public, read_concurrency: true])

  @doc "A stamp of the present time, later than all earlier ones of this node."
  @spec stamp() :: stamp()
  def stamp, do: {System.system_time(:microsecond), System.unique_integer([:monotonic]), node()}

  @doc """
  As `stamp/0`, and later than all changes of these programs, or of all: the clock of a node that has made one may be
  ahead.
  """
  @spec stamp(table(), :all | id() | [id()]) :: stamp()
  def stamp(table, ids) do
    {time, count, node} = stamp()
    {latest, _count, _node} = latest(table, ids)
    {max(time, latest + 1), count, node}
  end

  defp latest(table, :all),
    do: table |> export() |> Enum.map(&elem(&1, 1)) |> Enum.max(fn -> @never end)

  defp latest(table, ids) do
    stamps =
      for id <- List.wrap(ids) do
        created = with {_key, stamp, _body} <- row(table, :program, id), do: stamp
        max(created || @never, removed_at(table, id) || @never)
      end

    Enum.max(stamps, fn -> @never end)
  end

  @doc "Whether a definition with this stamp was declared."
  @spec declared?(stamp()) :: boolean()
  def declared?(stamp), do: elem(stamp, 2) == @declared

  @doc """
  Adds declarations to a new table, in this order: for each id the body of its `create_program`, or why there is none.
  """
  @spec declare(table(), [{id(), {:ok, binary()} | {:error, Error.t()}}]) :: :ok
  def declare(table, declarations) do
    stamped = for {id, result} <- declarations, do: {id, put_elem(stamp(), 2, @declared), result}
    for {id, stamp, {:ok, body}} <- stamped, do: put(table, id, stamp, body)
    why = for {id, stamp, {:error, error}} <- stamped, into: %{}, do: {id, {stamp, error}}
    :ets.insert(table, {:undeclared, why})
    :ok
  end

  @doc "The ids of the declarations that are definitions, in their order."
  @spec declared_ids(table()) :: [id()]
  def declared_ids(table) do
    ids = for {id, stamp, _body} <- rows(table, :declared), do: {stamp, id}
    for {_stamp, id} <- Enum.sort(ids), do: id
  end

  @doc "Why declarations are not definitions, by their ids, without those that were created or removed since."
  @spec undeclared(table()) :: %{id() => Error.t()}
  def undeclared(table) do
    for {:undeclared, why} <- :ets.lookup(table, :undeclared),
        {id, {stamp, error}} <- why,
        row(table, id) == nil and stamp > removed_at(table, id),
        into: %{},
        do: {id, error}
  end

  @doc """
  Stores a definition; `body` comes from `DSPex.PythonBridge.Protocol.encode_body/3`. Returns false if the table has a
  later change of the program, or a later removal.

      iex> alias DSPex.PythonBridge.Programs.Store
      iex> table = Store.new()
      iex> [first, second] = [Store.stamp(), Store.stamp()]
      iex> {Store.put(table, "qa", second, "new"), Store.put(table, "qa", first, "old")}
      {true, false}
      iex> [{"qa", ^second, "new"}] = Store.definitions(table)
  """
  @spec put(table(), id(), stamp(), binary()) :: boolean()
  def put(table, id, stamp, body) do
    {kind, news?} =
      if declared?(stamp),
        do: {:declared, :ets.insert_new(table, {{:declared, id}, stamp, body})},
        else: {:program, replace(table, {:program, id}, stamp, body)}

    :ets.delete(table, {:warned, id})

    # Read after the write: a removal writes its tombstone first, so one of the two sees the other.
    if stamp < removed_at(table, id) do
      delete_older(table, {kind, id}, removed_at(table, id))
      false
    else
      news?
    end
  end

  @doc "Removes all definitions, or those of these ids, that are older than `stamp`."
  @spec remove(table(), :all | [id()], stamp()) :: :ok
  def remove(table, :all, stamp) do
    replace(table, :removed_all, stamp, nil)
    delete_older(table, {:program, :_}, stamp)
    delete_older(table, {:declared, :_}, stamp)
    # The row above includes these tombstones.
    delete_older(table, {:removed, :_}, stamp)
    :ets.match_delete(table, {{:facts, :_}, :_, :_})
    :ets.match_delete(table, {{:warned, :_}})
    :ok
  end

  def remove(table, ids, stamp) do
    for id <- ids, do: remove_one(table, id, stamp)
    prune(table)
  end

  defp remove_one(table, id, stamp) do
    replace(table, {:removed, id}, stamp, nil)
    delete_older(table, {:program, id}, stamp)
    delete_older(table, {:declared, id}, stamp)
    :ets.delete(table, {:facts, id})
    :ets.delete(table, {:warned, id})
    :ok
  end

  @doc "Makes a change that a peer has acknowledged; `body` is the request's."
  @spec apply_change(table(), change(), binary()) :: :ok
  def apply_change(table, {:create, id, stamp}, body) do
    put(table, id, stamp, body)
    :ok
  end

  def apply_change(table, {:cleanup, ids, stamp}, _body), do: remove(table, ids, stamp)

  @doc "The definition of `id`, or nil."
  @spec get(table(), id()) :: {stamp(), binary()} | nil
  def get(table, id), do: with({_key, stamp, body} <- row(table, id), do: {stamp, body})

  defp row(table, id), do: row(table, :program, id) || row(table, :declared, id)

  defp row(table, kind, id) do
    case :ets.lookup(table, {kind, id}) do
      [row] -> row
      [] -> nil
    end
  end

  @doc """
  What `read` gets from a program's definition, once (`DSPex.PythonBridge.Programs.Body`); nil if the program is
  not in the table, or `read` gives nil.
  """
  @spec facts(table(), id(), (binary() -> facts | nil)) :: facts | nil when facts: map()
  def facts(table, id, read) do
    with {stamp, body} <- get(table, id) do
      case :ets.lookup(table, {:facts, id}) do
        [{_key, ^stamp, facts}] -> facts
        _none_or_of_another -> tap(read.(body), &:ets.insert(table, {{:facts, id}, stamp, &1}))
      end
    end
  rescue
    # The table has ended with its bridge.
    ArgumentError -> nil
  end

  @doc "Whether this is the first call without tools of a program."
  @spec first_without_tools?(table(), id()) :: boolean()
  def first_without_tools?(table, id) do
    :ets.insert_new(table, {{:warned, id}})
  rescue
    ArgumentError -> false
  end

  @doc "The number of definitions."
  @spec count(table()) :: non_neg_integer()
  def count(table), do: length(definitions(table))

  @doc "All definitions, oldest first."
  @spec definitions(table()) :: [definition()]
  def definitions(table) do
    (rows(table, :declared) ++ rows(table, :program))
    |> Map.new(&{elem(&1, 0), &1})
    |> Map.values()
    |> Enum.sort_by(&elem(&1, 1))
  end

  # The created ones come last, to replace the declared ones in a map.
  defp rows(table, kind),
    do: :ets.select(table, [{{{kind, :"$1"}, :"$2", :"$3"}, [], [{{:"$1", :"$2", :"$3"}}]}])

  defp stamps(table) do
    for {id, stamp, _body} <- definitions(table), into: %{}, do: {id, stamp}
  end

  @doc "The whole table, removals included and declarations left out, for `merge/2` on another node."
  @spec export(table()) :: exported()
  def export(table) do
    for {key, _stamp, _body} = row <- :ets.tab2list(table),
        not match?({kind, _id} when kind in [:declared, :facts], key),
        do: row
  end

  @doc """
  Adopts the later changes of another table. Returns the ids of the programs that have another definition now, or none.
  """
  @spec merge(table(), exported()) :: [id()]
  def merge(table, exported) do
    before = stamps(table)

    for {key, stamp, nil} <- exported do
      case key do
        :removed_all -> remove(table, :all, stamp)
        {:removed, id} -> remove_one(table, id, stamp)
      end
    end

    prune(table)
    for {{:program, id}, stamp, body} <- exported, do: put(table, id, stamp, body)
    now = stamps(table)
    for id <- Map.keys(Map.merge(before, now)), before[id] != now[id], do: id
  end

  # Atomic: a later row is not overwritten by an earlier one.
  defp replace(table, key, stamp, body) do
    row = {key, stamp, body}

    # Tuples are code in a match specification, except in its pattern; a replacement must have the same key.
    same_key = {:element, 1, :"$_"}

    :ets.insert_new(table, row) or
      :ets.select_replace(table, [
        {{key, :"$1", :_}, [{:<, :"$1", {:const, stamp}}],
         [{{same_key, {:const, stamp}, {:const, body}}}]}
      ]) == 1
  end

  defp delete_older(table, key, stamp) do
    :ets.select_delete(table, [{{key, :"$1", :_}, [{:<, :"$1", {:const, stamp}}], [true]}])
    :ok
  end

  # nil is smaller than any stamp: in the order of terms, atoms come before tuples.
  defp removed_at(table, id) do
    for key <- [:removed_all, {:removed, id}],
        {_key, stamp, nil} <- :ets.lookup(table, key),
        reduce: nil,
        do: (latest -> max(latest, stamp))
  end

  # It reads the whole table, so it is done once for many removals.
  defp prune(table) do
    removals = :ets.update_counter(table, :removals, 1, {:removals, 0})
    if rem(removals, @prune_after) == 0, do: prune_now(table), else: :ok
  end

  defp prune_now(table) do
    {now, _count, _node} = stamp()
    delete_older(table, {:removed, :_}, {now - @removed_us, 0, nil})
    stamps = :ets.select(table, [{{{:removed, :_}, :"$1", :_}, [], [:"$1"]}])
    oldest = length(stamps) - @max_tombstones
    if oldest > 0, do: delete_older(table, {:removed, :_}, Enum.at(Enum.sort(stamps), oldest))
    :ok
  end
end
