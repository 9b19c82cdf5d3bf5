defmodule DSPex.PythonBridge.Pool.Budgets do
  @moduledoc false
  # What the runs of a pool may spend together, for each value of a key of their `telemetry_metadata`, such as a tenant.
  #
  # Each answer of an LM is counted when the peer sends it as an entry of the run's journal, so it counts whatever becomes of
  # the run. The reply adds what has no entry, such as requests that failed. The table is the pool supervisor's.

  alias DSPex.PythonBridge.{Error, Protocol}
  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.OTP.Registry
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Telemetry.Usage

  @limits [:lm_calls, :tokens, :usd]
  @tokens ~w(prompt_tokens completion_tokens input_tokens output_tokens)
  # Of optimizations, whose replies have no budget.
  @measured [:lm_calls, :cache_hits, :input_tokens, :output_tokens, :cost_usd]
  # Money is counted in integers, which are added atomically.
  @usd 1_000_000_000_000
  @longest_ms 4_294_967_295
  @expected "expected :hour, :day, :month or 1 to #{@longest_ms} ms, got "

  @enforce_keys [:key, :limits, :per]
  defstruct @enforce_keys

  @type per :: :hour | :day | :month | pos_integer()
  @type t :: %__MODULE__{key: atom(), limits: %{atom() => number()}, per: per()}
  @typedoc "A `t:DSPex.PythonBridge.Pool.Handle.t/0`; `spent`: the table."
  @type pool :: %{:spent => :ets.tid(), :settings => map(), optional(atom()) => term()}
  @typedoc "A call: its pool, its metadata, and what it took, with the journal that it was given."
  @type run :: {pool :: term(), metadata :: map(), :counters.counters_ref()}
  @type spent :: %{lm_calls: non_neg_integer(), tokens: non_neg_integer(), usd: float()}

  @doc "The budgets of the option `:budgets`, or the text that refuses it."
  @spec check(term()) :: {:ok, [t()]} | {:error, String.t()}
  def check(option) do
    keys = if Keyword.keyword?(option), do: Keyword.keys(option)
    budgets = for {key, given} <- if(keys, do: option, else: []), do: budget(key, given)

    cond do
      keys == nil ->
        {:error, "expected a keyword list, such as [tenant: [usd: 5, per: :day]]"}

      keys != Enum.uniq(keys) ->
        {:error, "#{inspect(hd(keys -- Enum.uniq(keys)))} is there twice"}

      true ->
        Enum.find(budgets, {:ok, budgets}, &is_tuple/1)
    end
  end

  defp budget(key, given) do
    {per, limits} = if Keyword.keyword?(given), do: Keyword.pop(given, :per), else: {nil, nil}

    case Table.budget(@limits).(limits) do
      {:error, text} ->
        {:error, "#{inspect(key)}: #{text}"}

      {:ok, limits} when per in [:hour, :day, :month] or per in 1..@longest_ms ->
        %__MODULE__{key: key, limits: limits, per: per}

      _per ->
        {:error, "#{inspect(key)}: :per: " <> @expected <> Table.shown(per)}
    end
  end

  ## A call

  @doc """
  The options of a call, with `:counted` if a budget may apply, and what counts the answers of LMs. The pool may start later.
  """
  @spec begin(term(), Protocol.command(), keyword()) :: keyword()
  def begin(pool, command, opts) do
    metadata = command in [:execute_program, "execute_program"] && opts[:telemetry_metadata]
    handle = Registry.get(:pool, pool)

    if metadata && opts[:counted] == nil && (handle == nil or of(handle, metadata) != []) do
      run = {pool, metadata, :counters.new(3, [])}
      keeper = Keyword.get(opts, :keeper, %{})
      keep = Map.get(keeper, :on_journal, fn _entry -> :ok end)

      on_journal = fn entry ->
        # Also if it cannot be kept: it is paid.
        count(of_entry(decoded(entry)), run)
        keep.(entry)
      end

      Keyword.merge(opts, counted: run, keeper: Map.put(keeper, :on_journal, on_journal))
    else
      opts
    end
  end

  @doc "The arguments of a call, which may spend what is left, and its options, with `:counted` if a budget applies."
  @spec admit(pool(), term(), keyword()) :: {:ok, term(), keyword()} | {:error, Error.t()}
  def admit(pool, args, opts) do
    with {_pool, metadata, counter} <- opts[:counted],
         [_ | _] = budgets <- of(pool, metadata) do
      # What a journal replays has been counted; the peer counts it anew.
      replayed = replayed(opts[:journal] || [])
      for {n, index} <- Enum.with_index(replayed, 1), do: :counters.put(counter, index, n)

      if text = refusal(pool, budgets),
        do: {:error, Error.new(:budget_spent, text)},
        else: {:ok, capped(args, left(pool, budgets, shown(replayed))), opts}
    else
      _none -> {:ok, args, Keyword.delete(opts, :counted)}
    end
  end

  defp left(pool, budgets, replayed) do
    for {%{limits: limits}, _value} = budget <- budgets, {limit, most} <- limits do
      {limit, most - read(pool, budget)[limit] + replayed[limit]}
    end
  end

  defp refusal(pool, budgets) do
    Enum.find_value(budgets, fn {%{key: key, limits: limits, per: per}, value} = budget ->
      spent = read(pool, budget)

      if limit = Enum.find(@limits, &(spent[&1] >= limits[&1])) do
        until = DateTime.from_unix!(elem(window(per), 1), :millisecond)
        amounts = "#{spent[limit]} of #{limits[limit]} #{limit} are spent until #{until}"
        "budgets.#{key} #{Table.shown(value)}: #{amounts}"
      end
    end)
  end

  # An optimization has a budget of another kind. The peer refuses what is wrong.
  defp capped(args, left)
       when is_map(args) and not (is_map_key(args, :optimize) or is_map_key(args, "optimize")) do
    name = if is_map_key(args, "budget"), do: "budget", else: :budget
    given = Map.get(args, name) || %{}
    if is_map(given), do: Map.put(args, name, Enum.reduce(left, given, &lower/2)), else: args
  end

  defp capped(args, _left), do: args

  defp lower({limit, left}, given) do
    name = if is_map_key(given, "#{limit}"), do: "#{limit}", else: limit
    Map.update(given, name, left, &if(is_number(&1) or &1 == nil, do: min(&1, left), else: &1))
  end

  @doc "The result of a call, whose reply is counted. What the peer refused, the budget's text explains."
  @spec settle(result, run() | nil) :: result when result: tuple()
  def settle(result, nil), do: result

  def settle(result, {name, metadata, counter} = run) do
    {_result, meta, _lm_calls} = Usage.take(result)
    counts = Enum.with_index(of_meta(meta), 1)
    count(for({n, index} <- counts, do: max(n - :counters.get(counter, index), 0)), run)

    with {:error, %Error{type: :budget_spent} = error} <- result,
         %{} = pool <- Registry.get(:pool, name),
         "" <> text <- refusal(pool, of(pool, metadata)),
         do: {:error, %{error | message: "#{error.message}; #{text}"}},
         else: (_other -> result)
  end

  ## What a call took: LM calls, tokens, money

  defp of_meta(%{"budget" => spent}),
    do: [spent["lm_calls"], spent["tokens"], round(spent["usd"] * @usd)]

  defp of_meta(meta) do
    used = Usage.measurements(meta)
    [calls, cached, input, output, usd] = for name <- @measured, do: used[name] || 0
    [calls - cached, input + output, round(usd * @usd)]
  end

  defp decoded(entry), do: with({:ok, entry} <- Payload.decode(entry), do: entry)

  # As the peer counts it: lm/journal.py and lm/metering/endings.py.
  defp of_entry(%{"answer" => %{"usage" => usage} = answer})
       when not is_map_key(answer, "cached") do
    names = if is_integer(usage["total_tokens"]), do: ["total_tokens"], else: @tokens
    tokens = for name <- names, is_integer(usage[name]), do: usage[name]
    [length(answer["responses"]), Enum.sum(tokens), round((answer["cost"] || 0) * @usd)]
  end

  defp of_entry(_cached_or_error), do: [0, 0, 0]

  # Of two with one key the later one counts.
  defp replayed(entries) do
    entries = for entry <- entries, do: decoded(entry)
    spent = Map.new(entries, &{{&1["item"], &1["key"], &1["nth"]}, of_entry(&1)})
    Enum.zip_with([[0, 0, 0] | Map.values(spent)], &Enum.sum/1)
  end

  ## The table: a row for each value in the present window, and the window of each key

  @doc "What a value of a key has spent in the present window."
  @spec spent(pool(), term(), term()) :: spent() | {:error, Error.t()}
  def spent(pool, key, value) do
    budget = Enum.find(pool.settings.budgets, &(&1.key == key))

    if budget,
      do: read(pool, {budget, value}),
      else: {:error, Error.new(:invalid_request, "budgets: none of #{inspect(key)}")}
  end

  defp of(%{settings: %{budgets: budgets}}, metadata),
    do:
      for(%{key: key} = budget <- budgets, is_map_key(metadata, key), do: {budget, metadata[key]})

  defp read(%{spent: table}, {%__MODULE__{key: key, per: per}, value}) do
    row = {key, value, elem(window(per), 0)}
    {_row, calls, tokens, usd} = hd(:ets.lookup(table, row) ++ [{row, 0, 0, 0}])
    shown([calls, tokens, usd])
  rescue
    ArgumentError -> shown([0, 0, 0])
  end

  defp shown([calls, tokens, usd]), do: %{lm_calls: calls, tokens: tokens, usd: usd / @usd}

  defp count([0, 0, 0], _run), do: :ok

  defp count(counts, {name, metadata, counter}) do
    for {n, index} <- Enum.with_index(counts, 1), do: :counters.add(counter, index, n)
    %{spent: table} = pool = Registry.get(:pool, name)

    for {%__MODULE__{key: key, per: per}, value} <- of(pool, metadata) do
      {from, _until} = window(per)
      past = {{{key, :_, :"$1"}, :_, :_, :_}, [{:<, :"$1", from}], [true]}
      if :ets.lookup(table, key) != [{key, from}], do: :ets.select_delete(table, [past])
      :ets.insert(table, {key, from})
      row = {key, value, from}
      :ets.update_counter(table, row, Enum.zip(2..4, counts), {row, 0, 0, 0})
    end

    :ok
  rescue
    # The pool has ended.
    _error -> :ok
  end

  @doc "The window that a time is in: its beginning and that of the next one, in ms since 1970."
  @spec window(per(), integer()) :: {integer(), integer()}
  def window(per, now \\ System.system_time(:millisecond))
  def window(:hour, now), do: window(3_600_000, now)
  def window(:day, now), do: window(86_400_000, now)

  def window(:month, now) do
    day = now |> DateTime.from_unix!(:millisecond) |> DateTime.to_date()
    ms = &DateTime.to_unix(DateTime.new!(&1, ~T[00:00:00]), :millisecond)
    {ms.(Date.beginning_of_month(day)), ms.(Date.shift(Date.end_of_month(day), day: 1))}
  end

  def window(ms, now), do: {now - Integer.mod(now, ms), now - Integer.mod(now, ms) + ms}
end
