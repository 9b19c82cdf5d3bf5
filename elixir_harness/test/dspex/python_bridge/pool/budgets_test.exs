defmodule DSPex.PythonBridge.Pool.BudgetsTest do
  @moduledoc "What the runs of a pool may spend for each tenant, with the real peer and an LM whose requests are counted."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Durable, Error, Evaluate, Optimize, Pool, Stub}
  alias DSPex.PythonBridge.Pool.{Budgets, Handle}
  alias DSPex.Test.{AgentLM, Nodes}

  # Of an agent with two words: two steps with a tool, one that finishes, and the answer. An answer takes ten tokens.
  @total 4
  # A window that is hardly over while the tests run.
  @per 4_294_967_295
  @acme [telemetry_metadata: %{tenant: "acme"}]

  setup_all do
    {lm, asked} = AgentLM.start()
    %{lm: lm, asked: asked}
  end

  # With the programs `agent` and `qa`.
  defp pool(context, budgets, opts \\ []) do
    name = Module.concat(__MODULE__, "Pool#{System.unique_integer([:positive])}")
    opts = Keyword.merge([name: name, pool_size: 1, budgets: budgets], opts)
    start_supervised!({Pool, real_opts(opts)}, id: name)
    programs = [AgentLM.agent("agent", context.lm), qa(context)]
    for program <- programs, do: {:ok, _} = Pool.call(name, :create_program, program, 30_000)
    name
  end

  defp qa(context), do: %{id: "qa", signature: "question -> answer", lm: context.lm}
  defp args(id), do: %{program_id: id, inputs: %{question: "a b"}}
  defp tool(%{"what" => what}), do: what
  defp run(pool, args, opts), do: Pool.request(pool, :execute_program, args, opts)

  defp request(pool, tenant, id, opts \\ []) do
    tools = if id == "agent", do: [tools: %{do: &tool/1}], else: []
    opts = opts ++ [telemetry_metadata: %{tenant: tenant}, timeout: 60_000] ++ tools
    run(pool, args(id), opts)
  end

  defp calls(pool, tenant \\ "acme"), do: Pool.spent(pool, :tenant, tenant).lm_calls

  # With the number of the LM's requests meanwhile.
  defp counted(context, fun) do
    before = :atomics.get(context.asked, 1)
    {fun.(), :atomics.get(context.asked, 1) - before}
  end

  test "each value has its own budget, past which a request is not sent", context do
    pool = pool(context, tenant: [lm_calls: 2, per: @per])
    for _ <- 1..2, do: {:ok, _, _} = request(pool, "acme", "qa")
    assert %{lm_calls: 2, tokens: 20, usd: +0.0} = Pool.spent(pool, :tenant, "acme")
    assert {{:error, error}, 0} = counted(context, fn -> request(pool, "acme", "qa") end)
    assert %Error{type: :budget_spent, retryable: false, message: text} = error
    until = DateTime.from_unix!(elem(Budgets.window(@per), 1), :millisecond)
    assert text == ~s(budgets.tenant "acme": 2 of 2 lm_calls are spent until #{until})
    assert Enum.to_list(Pool.stream(pool, args("qa"), @acme)) == [error: error]

    # Another tenant, a term of another type, no tenant, and no run.
    for tenant <- ["other", :acme], do: assert({:ok, _, _} = request(pool, tenant, "qa"))
    assert {:ok, _, _} = run(pool, args("qa"), telemetry_metadata: %{user: 1})
    assert {:ok, _} = Pool.call(pool, :execute_program, args("qa"))
    assert {:ok, _, _} = Pool.request(pool, :ping, %{}, @acme)
    assert {calls(pool), calls(pool, "other"), calls(pool, "none")} == {2, 1, 0}
  end

  test "a run ends where a budget does, or its own smaller one", context do
    pool = pool(context, tenant: [lm_calls: 5, per: @per], user: [tokens: 1_000, per: @per])
    own = [budget: [lm_calls: 2, tokens: 900]]
    assert {{:error, error}, 2} = counted(context, fn -> request(pool, "acme", "agent", own) end)
    assert error.message == "budget.lm_calls: 2 of 2 are spent"

    opts = [telemetry_metadata: %{tenant: "acme", user: 7}, tools: %{do: &tool/1}]
    on_wire = Map.put(args("agent"), "budget", %{"lm_calls" => 9})
    assert {{:error, error}, 3} = counted(context, fn -> run(pool, on_wire, opts) end)
    assert %Error{type: :budget_spent, meta: %{"budget" => %{"lm_calls" => 3}}} = error
    text = ~s(budget.lm_calls: 3 of 3 are spent; budgets.tenant "acme": 5 of 5 lm_calls are spent)
    assert String.starts_with?(error.message, text)
    assert %{lm_calls: 3, tokens: 30} = Pool.spent(pool, :user, 7)

    wrong = Map.put(args("qa"), :budget, %{tokens: "5"})
    assert {:error, %Error{message: text}} = run(pool, wrong, telemetry_metadata: %{user: 7})
    assert text =~ "budget: expected an object"
  end

  test "money is counted by DSPy's prices", context do
    pool = pool(context, tenant: [usd: 0.000005, per: @per])
    priced = Map.put(args("qa"), :lm, %{context.lm | model: "openai/gpt-4o-mini"})
    assert {:ok, _, %{"cost_usd" => cost}} = run(pool, priced, @acme)
    assert cost > 0 and cost < 0.000005
    assert %{usd: ^cost} = Pool.spent(pool, :tenant, "acme")
    assert {:ok, _, _} = run(pool, priced, @acme)
    assert {:error, %Error{type: :budget_spent}} = run(pool, priced, @acme)
  end

  test "what was spent counts if the caller is killed, or the peer", context do
    pool = pool(context, [tenant: [lm_calls: 100, per: @per]], max_retries: 5)
    test = self()
    wait = fn _args -> send(test, :in_tool) && Process.sleep(:infinity) end
    caller = spawn(fn -> request(pool, "gone", "agent", tools: %{do: wait}) end)
    assert_receive :in_tool, 30_000
    Process.exit(caller, :kill)
    assert calls(pool, "gone") == 1

    kill = fn args -> kill(hd(Pool.status(pool).peers).os_pid) && tool(args) end
    died = request(pool, "once", "agent", tools: %{do: kill}, retry: false)
    assert {:error, %Error{type: :python_process_died}} = died
    assert calls(pool, "once") == 1

    # The next peer gets the answers so far, and they are not counted again.
    all_up(pool)
    kill_at_a = fn args -> if args["what"] == "a", do: kill.(args), else: tool(args) end
    again = fn -> request(pool, "again", "agent", tools: %{do: kill_at_a}) end
    assert {{:ok, _, _}, @total} = counted(context, again)
    assert calls(pool, "again") == @total
  end

  test "streams, batches, evaluations and optimizations count", context do
    pool = pool(context, tenant: [tokens: 10_000, per: @per])
    data = [{%{question: "a"}, %{answer: "x"}}, {%{question: "b"}, %{answer: "y"}}]
    measured = [metric: {:field, :answer, :exact_match}] ++ @acme
    few = [optimizer: :bootstrap_few_shot, trainset: data] ++ measured
    stream = fn -> Pool.stream(pool, args("agent"), [tools: %{do: &tool/1}] ++ @acme) end
    batch = %{program_id: "qa", inputs: [%{question: "a"}, %{question: "b"}]}

    ways = [
      stream: fn -> Enum.to_list(stream.()) end,
      left: fn -> Enum.take(stream.(), 3) end,
      batch: fn -> {:ok, _, _} = run(pool, batch, @acme) end,
      evaluate: fn -> {:ok, _} = Evaluate.run(pool, "qa", data, measured) end,
      optimize: fn -> {:ok, _} = Optimize.run(pool, qa(context), few) end
    ]

    for {way, run} <- ways do
      %{lm_calls: before, tokens: tokens} = Pool.spent(pool, :tenant, "acme")
      {_, asked} = counted(context, run)
      assert {way, calls(pool) - before} == {way, asked}
      # The LM does not say how many tokens a stream took.
      more = Pool.spent(pool, :tenant, "acme").tokens - tokens
      assert way in [:stream, :left] or more == 10 * asked
    end
  end

  test "of a durable run nothing counts twice, and a refusal leaves it as it was", context do
    pool = pool(context, tenant: [lm_calls: 5, per: @per])
    store = {Durable.MemoryStore, start_supervised!({Durable.MemoryStore, []})}
    opts = [store: store, timeout: 60_000, tools: %{do: &tool/1}]
    two = [id: "r", budget: [lm_calls: 2]]
    assert {:suspended, _run} = Durable.run(pool, args("agent"), two ++ opts ++ @acme)
    assert calls(pool) == 2
    # Three are left, in addition to the two that are replayed.
    more = [budget: [lm_calls: 9]] ++ opts ++ @acme
    assert {:ok, _, _} = Durable.resume(pool, "r", more)
    assert calls(pool) == @total

    spent = Durable.run(pool, args("agent"), [id: "s"] ++ opts ++ @acme)
    assert {:error, %Error{type: :budget_spent}} = spent
    assert calls(pool) == 5
    assert {:error, %Error{type: :budget_spent}} = Durable.resume(pool, "s", opts ++ @acme)
    others = opts ++ [telemetry_metadata: %{tenant: "other"}]
    assert {:ok, _, _} = Durable.resume(pool, "s", others)
    assert {calls(pool), calls(pool, "other")} == {5, @total - 1}
  end

  test "what the peer of another node does counts where the call began", context do
    Nodes.distribute()
    shared = [cluster: "budgets #{System.unique_integer([:positive])}"]
    here = pool(context, [tenant: [lm_calls: 9, per: @per]], shared)
    Nodes.start_pool(node = Nodes.start(), real_opts([name: here, pool_size: 1] ++ shared))
    eventually(fn -> match?([_, _], Pool.status(here).nodes) end, 20_000)
    data = for _ <- 1..9, do: {%{question: "a"}, %{answer: ""}}
    metric = [metric: {:field, :answer, :exact_match}]
    assert {:ok, _} = Evaluate.run(here, "qa", data, metric ++ @acme)
    assert calls(here) == 9
    there = Nodes.on(node, Pool, :spent, [here, :tenant, "acme"])
    assert {:error, %Error{message: "budgets: none of :tenant"}} = there
  end

  test "a stub spends what its answers say; rows of past windows go", context do
    meta = %{"lm_calls" => 3, "cost_usd" => 0.5}
    answers = fn "qa", _inputs -> {:ok, %{answer: "x"}, meta} end
    budgets = [tenant: [usd: 1, per: :month], user: [usd: 1, per: 1]]
    name = start_supervised!({Stub, name: context.test, answers: answers, budgets: budgets})

    for n <- 1..9 do
      opts = [telemetry_metadata: %{tenant: div(n, 3), user: n}]
      spent? = match?({:error, %Error{type: :budget_spent}}, run(name, args("qa"), opts))
      assert spent? == n in [5, 8]
      rows = for {{:user, _, from}, _, _, _} <- :ets.tab2list(Handle.fetch(name).spent), do: from
      assert [_] = Enum.uniq(rows)
    end

    assert Pool.spent(name, :tenant, 1) == %{lm_calls: 6, tokens: 0, usd: 1.0}
    eventually(fn -> Pool.spent(name, :user, 9).usd == 0.0 end)
    stop_supervised!(context.test)
    assert {:error, %Error{type: :bridge_not_running}} = Pool.spent(name, :tenant, 1)
  end

  test "a window is an hour, a day or a month of UTC, or a number of ms since 1970" do
    ms = &DateTime.to_unix(&1, :millisecond)
    now = ms.(~U[2028-02-29 12:34:56.789Z])
    window = &Budgets.window(&1, now)
    assert window.(:hour) == {ms.(~U[2028-02-29 12:00:00Z]), ms.(~U[2028-02-29 13:00:00Z])}
    assert window.(:day) == {ms.(~U[2028-02-29 00:00:00Z]), ms.(~U[2028-03-01 00:00:00Z])}
    assert window.(:month) == {ms.(~U[2028-02-01 00:00:00Z]), ms.(~U[2028-03-01 00:00:00Z])}
    assert window.(10_000) == {ms.(~U[2028-02-29 12:34:50Z]), ms.(~U[2028-02-29 12:35:00Z])}
  end

  test "budgets that cannot be right are refused by name" do
    for {given, text} <- [
          {%{tenant: 1}, "expected a keyword list, such as [tenant: [usd: 5, per: :day]]"},
          {[a: [usd: 1, per: 9], a: [usd: 2, per: 9]], ":a is there twice"},
          {[a: 5], ":a: options: expected a keyword list"},
          {[a: [eur: 5, per: :day]], ":a: unknown option :eur"},
          {[a: [usd: -1, per: :day]], ":a: :usd: expected a number above 0, got -1"},
          {[a: [lm_calls: 0.5, per: :day]], ":a: :lm_calls: expected 1 or more, got 0.5"},
          {[a: [per: :day]], ":a: expected one of :lm_calls, :tokens, :usd"},
          {[a: [usd: 5]], ":a: :per: expected :hour, :day, :month or 1 to 4294967295 ms, got nil"}
        ] do
      assert {:error, %ArgumentError{message: message}} = Pool.start_link(budgets: given)
      assert message == "python pool: :budgets: " <> text
    end
  end
end
