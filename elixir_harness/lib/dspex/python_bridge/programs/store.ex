defmodule DSPex.PythonBridge.Programs.Store do
  @moduledoc false
  # The definitions of programs that peers have acknowledged, for their successors: a table of the process that makes
  # it, a supervisor for example, which survives the bridges that use it.
  #
  # A definition is the body of the request that made it. Each change has a stamp; of two changes of one program the one
  # with the later stamp counts, in whatever order they come. So several bridges can write one table, and several nodes
  # can exchange theirs. A removal leaves a tombstone; so many are kept that only a change that is under way very long
  # could be taken for a new one.
  #
  # Declared programs (`DSPex.PythonBridge.Programs.Declared`) are a layer of their own below those that were created:
  # any creation hides one, however early it was, and only a later removal takes it away. Other nodes are not sent them, so
  # each node of a cluster has the declarations of its own release.
  #
  # Any process can read the table, since several write it. Definitions may hold keys (`lm`), so they are sealed
  # (`DSPex.PythonBridge.OTP.Sealed`).

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.OTP.Sealed

  @max_tombstones 10_000
  # In place of the node in a stamp, which is an atom for any version.
  @declared :declared

  @type table :: :ets.tid()
  @type id :: String.t()
  @typedoc "Microseconds since 1970, what orders changes of the same microsecond, and the node, or `:declared`."
  @type stamp :: {integer(), integer(), node()}
  @type definition :: {id(), stamp(), body :: binary()}
  @type change :: {:create, id(), stamp() | nil} | {:cleanup, :all | [id()], stamp() | nil}
  @opaque exported :: [tuple()]

  # Rows: {{:program, id}, stamp, sealed body}, {{:removed, id}, stamp, nil}, {:removed_all, stamp, nil}. For this node
  # alone: {{:declared, id}, stamp, sealed body}; {{:facts, id}, stamp, facts, calls}, what was read from the definition
  # with that stamp; {:undeclared, why}, the declarations that are not definitions, with their stamps and errors.

  @doc "An empty table of the calling process."
  @spec new() :: table()
  def new, do: :ets.new(__MODULE__, [:set, :public, read_concurrency: true])

  @doc "A stamp of the present time, later than all earlier ones of this node."
  @spec stamp() :: stamp()
  def stamp, do: {System.system_time(:microsecond), System.unique_integer([:monotonic]), node()}

  @doc "The stamp of a declaration of that time."
  @spec declared(stamp()) :: stamp()
  def declared(stamp), do: put_elem(stamp, 2, @declared)

  @doc "Whether a definition with this stamp was declared, here or on another node."
  @spec declared?(stamp()) :: boolean()
  def declared?(stamp), do: elem(stamp, 2) == @declared

  @doc """
  Adds declarations to a new table, in this order: for each id the body of its `create_program`, or why there is none.
  """
  @spec declare(table(), [{id(), {:ok, binary()} | {:error, Error.t()}}]) :: :ok
  def declare(table, declarations) do
    stamped = for {id, result} <- declarations, do: {id, declared(stamp()), result}
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

  @doc "Whether a term is a change, with or without a stamp."
  @spec change?(term()) :: boolean()
  def change?({:create, id, stamp}), do: id?(id) and stamp?(stamp)
  def change?({:cleanup, :all, stamp}), do: stamp?(stamp)
  def change?({:cleanup, ids, stamp}), do: all?(ids, &id?/1) and stamp?(stamp)
  def change?(_other), do: false

  defp id?(id), do: is_binary(id) and String.valid?(id)

  defp stamp?({time, count, node}),
    do: is_integer(time) and is_integer(count) and is_atom(node)

  defp stamp?(stamp), do: stamp == nil

  defp all?(list, fun), do: is_list(list) and not List.improper?(list) and Enum.all?(list, fun)

  @doc """
  Stores a definition; `body` comes from `DSPex.PythonBridge.Protocol.encode_body/3`. Returns false if the table has a
  later change of the program, or a later removal. One that another node has declared never replaces another.

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
        do: {:declared, declare_first(table, id, stamp, Sealed.new(body))},
        else: {:program, replace(table, {:program, id}, stamp, Sealed.new(body))}

    # Read after the write: a removal writes its tombstone first, so one of the two sees the other.
    if removed?(table, id, stamp) do
      delete_older(table, {kind, id}, removed_at(table, id))
      false
    else
      news?
    end
  end

  defp declare_first(table, id, stamp, sealed),
    do:
      :ets.insert_new(table, {{:declared, id}, stamp, sealed}) and
        not :ets.member(table, {:program, id})

  @doc "Removes all definitions, or those of these ids, that are older than `stamp`."
  @spec remove(table(), :all | [id()], stamp()) :: :ok
  def remove(table, :all, stamp) do
    replace(table, :removed_all, stamp, nil)
    delete_older(table, {:program, :_}, stamp)
    delete_older(table, {:declared, :_}, stamp)
    # The row above includes these tombstones.
    delete_older(table, {:removed, :_}, stamp)
    :ets.match_delete(table, {{:facts, :_}, :_, :_, :_})
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
    :ok
  end

  @doc "Whether the table has a removal of the program that is later than a stamp."
  @spec removed?(table(), id(), stamp()) :: boolean()
  def removed?(table, id, stamp), do: stamp < removed_at(table, id)

  @doc "Makes a change that a peer has acknowledged; `body` is the request's."
  @spec apply_change(table(), change(), binary()) :: :ok
  def apply_change(table, {:create, id, stamp}, body) do
    put(table, id, stamp, body)
    :ok
  end

  def apply_change(table, {:cleanup, ids, stamp}, _body), do: remove(table, ids, stamp)

  @doc "The definition of `id`, or nil."
  @spec get(table(), id()) :: {stamp(), binary()} | nil
  def get(table, id), do: with({_key, stamp, sealed} <- row(table, id), do: {stamp, sealed.()})

  defp row(table, id), do: row(table, :program, id) || row(table, :declared, id)

  defp row(table, kind, id) do
    case :ets.lookup(table, {kind, id}) do
      [row] -> row
      [] -> nil
    end
  end

  @doc """
  What `read` gets from a program's definition, once (`DSPex.PythonBridge.Programs.Definition`); nil if the program is
  not in the table, or `read` gives nil.
  """
  @spec facts(table(), id(), (binary() -> facts | nil)) :: facts | nil when facts: map()
  def facts(table, id, read) do
    with stamp when stamp != nil <- current(table, id) do
      case :ets.lookup(table, {:facts, id}) do
        [{_key, ^stamp, facts, _calls}] -> facts
        _none_or_of_another -> read_facts(table, id, read)
      end
    end
  rescue
    # The table has ended with its bridge.
    ArgumentError -> nil
  end

  defp current(table, id) do
    :ets.lookup_element(table, {:program, id}, 2, nil) ||
      :ets.lookup_element(table, {:declared, id}, 2, nil)
  end

  defp read_facts(table, id, read) do
    with {stamp, body} <- get(table, id) do
      facts = read.(body)
      row = {{:facts, id}, stamp, facts, 0}

      unless :ets.insert_new(table, row) do
        :ets.select_replace(table, [
          {{{:facts, id}, :"$1", :_, :_}, [{:"/=", :"$1", {:const, stamp}}],
           [{{{:element, 1, :"$_"}, {:const, stamp}, {:const, facts}, 0}}]}
        ])
      end

      facts
    end
  end

  @doc "Whether this is the first call without tools of a program that `facts/3` knows."
  @spec first_without_tools?(table(), id()) :: boolean()
  def first_without_tools?(table, id) do
    :ets.update_counter(table, {:facts, id}, {4, 1}) == 1
  rescue
    # It has just been removed.
    ArgumentError -> false
  end

  @doc "The number of definitions."
  @spec count(table()) :: non_neg_integer()
  def count(table), do: map_size(stamps(table))

  @doc "All definitions, oldest first."
  @spec definitions(table()) :: [definition()]
  def definitions(table) do
    (rows(table, :declared) ++ rows(table, :program))
    |> Map.new(fn {id, stamp, sealed} -> {id, {id, stamp, sealed.()}} end)
    |> Map.values()
    |> Enum.sort_by(fn {_id, stamp, _body} -> stamp end)
  end

  # The created ones come last, to replace the declared ones in a map.
  defp rows(table, kind),
    do: :ets.select(table, [{{{kind, :"$1"}, :"$2", :"$3"}, [], [{{:"$1", :"$2", :"$3"}}]}])

  @doc "The stamps of all definitions."
  @spec stamps(table()) :: %{id() => stamp()}
  def stamps(table) do
    for {id, stamp, _sealed} <- rows(table, :declared) ++ rows(table, :program),
        into: %{},
        do: {id, stamp}
  end

  @doc "The whole table, removals included and declarations left out, for `merge/2` on another node."
  @spec export(table()) :: exported()
  def export(table) do
    for {key, stamp, sealed} <- :ets.tab2list(table),
        not match?({:declared, _id}, key),
        do: {key, stamp, if(sealed, do: sealed.())}
  end

  @doc "Whether a term has the form of an exported table: it may come from another version."
  @spec exported?(term()) :: boolean()
  def exported?(rows), do: all?(rows, &row?/1)

  defp row?({_key, nil, _body}), do: false
  defp row?({{:program, id}, stamp, body}), do: id?(id) and stamp?(stamp) and is_binary(body)
  defp row?({{:removed, id}, stamp, nil}), do: id?(id) and stamp?(stamp)
  defp row?({:removed_all, stamp, nil}), do: stamp?(stamp)
  defp row?(_other), do: false

  @doc "Adopts the later changes of another table; returns what they changed, oldest first."
  @spec merge(table(), exported()) :: {[definition()], removed :: [id()]}
  def merge(table, exported) do
    difference(table, fn ->
      for {key, stamp, nil} <- exported do
        case key do
          :removed_all -> remove(table, :all, stamp)
          {:removed, id} -> remove_one(table, id, stamp)
        end
      end

      prune(table)
      for {{:program, id}, stamp, body} <- exported, do: put(table, id, stamp, body)
    end)
  end

  @doc """
  What `change` changes in the table: the definitions that count from now on, oldest first, which a removal may have
  uncovered, and the ids of those that are gone.
  """
  @spec difference(table(), (-> term())) :: {[definition()], removed :: [id()]}
  def difference(table, change) do
    before = stamps(table)
    change.()
    now = definitions(table)
    changed = Enum.reject(now, fn {id, stamp, _body} -> before[id] == stamp end)
    {changed, Map.keys(Map.drop(before, Enum.map(now, &elem(&1, 0))))}
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
    [:removed_all, {:removed, id}]
    |> Enum.map(fn key ->
      case :ets.lookup(table, key) do
        [{_key, stamp, nil}] -> stamp
        [] -> nil
      end
    end)
    |> Enum.max()
  end

  defp prune(table) do
    tombstones = :ets.select_count(table, [{{{:removed, :_}, :_, :_}, [], [true]}])

    if tombstones > @max_tombstones do
      # By half, so that it is rarely done.
      stamps = :ets.select(table, [{{{:removed, :_}, :"$1", :_}, [], [:"$1"]}])
      delete_older(table, {:removed, :_}, Enum.at(Enum.sort(stamps), div(tombstones, 2)))
    end

    :ok
  end
end
