defmodule DSPex.PythonBridge.Durable.Options do
  @moduledoc false
  # The options and arguments of durable runs.

  alias DSPex.PythonBridge.Durable.{History, Session}
  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Tools.{Answer, Runner}

  @lease_ms 30_000
  @leases 1_000..86_400_000
  # They become arguments of the run, which are stored.
  @arguments [:attempts, :max_concurrency, :item_timeout_ms]
  @request [:timeout, :on_chunk, :history, :traceparent, :telemetry_metadata]
  @decisions [:approve, :deny, :answer, :keep]
  # They would be stored in clear, and be old when the run is resumed.
  @secrets ~w(api_key headers extra_headers azure_ad_token)

  @doc "Options of a run or of a resumption; with `whose` `:store` those that only name a run."
  @spec check(term(), :run | :resume | :store) :: {:ok, map()} | {:error, Error.t()}
  def check(opts, whose) do
    case Table.check(opts, table(whose), "durable", :durable) do
      {:ok, opts} -> required(Map.new(opts), whose)
      {:error, error} -> refuse(Exception.message(error))
    end
  end

  @doc "The names of the options of a run."
  @spec names() :: [atom()]
  def names, do: Keyword.keys(table(:run))

  defp table(:store), do: [store: &store/1, lease: {@leases, @lease_ms}]

  defp table(:resume) do
    table(:store) ++
      for(key <- @request, do: {key, :any}) ++
      [
        tools: {&tools/1, no_tools()},
        budget: Table.budget([:lm_calls, :tokens, :usd]),
        approve: {&keys/1, []},
        deny: {&pairs(&1, fn text -> is_binary(text) and String.valid?(text) end), []},
        answer: {&pairs(&1, fn value -> match?({:ok, _}, Payload.encode(value, "")) end), []},
        keep: :count
      ]
  end

  defp table(:run) do
    id =
      {:test, &(is_binary(&1) and &1 != "" and String.valid?(&1)), "a string that is not empty"}

    [id: id] ++ table(:resume) ++ for(key <- @arguments, do: {key, :any})
  end

  defp required(opts, whose) do
    missing = Enum.find(if(whose == :run, do: [:id, :store], else: [:store]), &(opts[&1] == nil))
    if missing, do: refuse("durable: #{inspect(missing)} is missing"), else: {:ok, opts}
  end

  defp store({module, _term}) when is_atom(module), do: store(module)

  defp store(module) do
    if is_atom(module) and Code.ensure_loaded?(module) and function_exported?(module, :claim, 4),
      do: :ok,
      else: {:error, "expected a module of DSPex.PythonBridge.Durable.Store, or {module, term}"}
  end

  defp keys(key) when is_binary(key), do: {:ok, [key]}

  defp keys(keys) do
    if is_list(keys) and Enum.all?(keys, &is_binary/1),
      do: {:ok, keys},
      else: {:error, "expected the key of a call that waits, or a list of them"}
  end

  defp pairs({_key, _value} = pair, value?), do: pairs([pair], value?)

  defp pairs(pairs, value?) do
    if is_list(pairs) and
         Enum.all?(pairs, &match?({key, _value} when is_binary(key), &1)) and
         Enum.all?(pairs, &value?.(elem(&1, 1))),
       do: {:ok, pairs},
       else: {:error, "expected {key of a call that waits, value}, or a list of them"}
  end

  ## Tools

  @doc "Of a run that calls none."
  @spec no_tools() :: Session.tools()
  def no_tools, do: %{functions: %{}, approve: MapSet.new()}

  defp tools(tools) do
    with {:ok, approve, plain} <- approvals(tools),
         {:ok, functions} <- Runner.functions(plain),
         do: {:ok, %{functions: functions, approve: approve}}
  end

  @doc "The names of the tools with `approve: true`, and all tools without this option."
  @spec approvals(term()) :: {:ok, MapSet.t(String.t()), term()} | {:error, String.t()}
  def approvals(tools) when is_map(tools) and not is_struct(tools) do
    Enum.reduce_while(tools, {:ok, MapSet.new(), tools}, fn
      {name, {function, opts}}, {:ok, approve, plain} ->
        case Keyword.keyword?(opts) && Keyword.pop(opts, :approve, false) do
          {true, opts} ->
            approve = MapSet.put(approve, Payload.string(name))
            {:cont, {:ok, approve, %{plain | name => {function, opts}}}}

          {wrong, _opts} when wrong != false ->
            text = "#{Answer.one_line(inspect(name))}: :approve: expected true or false"
            {:halt, {:error, text}}

          {false, opts} ->
            {:cont, {:ok, approve, %{plain | name => {function, opts}}}}

          false ->
            {:cont, {:ok, approve, plain}}
        end

      _tool, acc ->
        {:cont, acc}
    end)
  end

  def approvals(other), do: {:ok, MapSet.new(), other}

  ## Arguments

  @doc "The arguments of a run as they are stored, with those that were given as options."
  @spec arguments(term(), map()) :: {:ok, map()} | {:error, Error.t()}
  def arguments(args, opts) do
    given = Map.take(opts, @arguments)

    with true <- (is_map(args) and not is_struct(args)) || refuse("args: expected a map"),
         {:ok, json} <- Payload.encode(Map.merge(args, given), "args"),
         {:ok, args} <- json |> IO.iodata_to_binary() |> Payload.decode(),
         nil <- secret(args) do
      cond do
        args["optimize"] -> refuse("args.optimize: an optimization cannot be a durable run")
        args["budget"] -> refuse("args.budget: expected it as the option :budget")
        true -> {:ok, args}
      end
    else
      {:error, %Error{} = error} ->
        {:error, error}

      {:error, {_kind, text}} ->
        refuse("args: #{text}")

      place ->
        refuse(
          "args.#{place}: a durable run is stored, and keys do not belong there: " <>
            "give it to the server or the program"
        )
    end
  end

  defp secret(args) do
    for part <- ["lm", "config"],
        %{} = given <- [args[part]],
        key <- @secrets,
        is_map_key(given, key),
        reduce: nil do
      nil -> "#{part}.#{key}"
      first -> first
    end
  end

  @doc "The options of the request that makes a run."
  @spec request(map()) :: keyword()
  def request(opts), do: Map.to_list(Map.take(opts, @request))

  ## Decisions

  @doc "The records of what the options decide, or the error of one that the run does not wait for."
  @spec decisions(map(), History.t()) :: {:ok, [binary()]} | {:error, Error.t()}
  def decisions(opts, history) do
    decided =
      for(key <- opts.approve, do: {:approve, key, %{approve: key}}) ++
        for({key, text} <- opts.deny, do: {:deny, key, %{answer: key, error: text}}) ++
        for {key, value} <- opts.answer, do: {:answer, key, %{answer: key, ok: value}}

    keys = for {_how, key, _record} <- decided, do: key
    budget = if opts[:budget], do: [%{budget: opts.budget}], else: []
    keep = if opts[:keep], do: [%{keep: opts.keep}], else: []

    wrong =
      Enum.find(decided, fn {_how, key, _record} ->
        not is_map_key(history.waiting, key) or key == History.budget_key()
      end)

    cond do
      wrong != nil ->
        refuse(
          "#{inspect(elem(wrong, 0))}: no call of the run waits with the key #{Table.shown(elem(wrong, 1))}"
        )

      keys != Enum.uniq(keys) ->
        refuse("#{Enum.map_join(@decisions, ", ", &inspect/1)}: a call is decided twice")

      (opts[:keep] || 0) > length(history.entries) ->
        refuse(":keep: the run has #{length(history.entries)} answers of LMs")

      true ->
        records = for {_how, _key, record} <- decided, do: record
        {:ok, Enum.map(records ++ budget ++ keep, &History.record/1)}
    end
  end

  @doc "The error of a wrong option or argument."
  @spec refuse(String.t()) :: {:error, Error.t()}
  def refuse(text), do: {:error, Error.new(:invalid_request, text)}
end
