defmodule DSPex.PythonBridge.Evaluate.ClusterTest do
  @moduledoc "Evaluations over the pools of two nodes, with real peers. The metric runs at the caller."

  # It makes this a distributed node.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Error, Evaluate, Optimize, Pool}
  alias DSPex.Test.{Nodes, PoolProbe}

  @pool __MODULE__.Pool
  @field {:field, :answer, :equals}
  @moduletag timeout: 120_000

  # The tests share the pools of two nodes.
  setup_all do
    Nodes.distribute()
    script = %{model: "offline/script", answers: %{"*" => %{answer: "a"}}}
    cluster = "evaluations #{System.unique_integer([:positive])}"
    opts = [name: @pool, cluster: cluster, pool_size: 1, lm: script, max_retries: 10]
    opts = real_opts([default_timeout: 60_000] ++ opts)
    start_supervised!({Pool, opts})
    there = join(opts)
    {:ok, _} = Pool.call(@pool, :create_program, %{id: "qa", signature: "question -> answer"})
    %{there: there, opts: opts}
  end

  # Each example counts what was scored: the questions.
  setup context do
    for node <- [node(), context.there], do: up_on(node)
    %{scored: :ets.new(:scored, [:public])}
  end

  # One more node, with a pool.
  defp join(opts) do
    node = Nodes.start()
    Nodes.start_pool(node, opts)
    for node <- [node(), node], do: up_on(node)
    eventually(fn -> node in for({pid, _} <- PoolProbe.serving(@pool), do: node(pid)) end)
    node
  end

  defp up_on(node),
    do: eventually(fn -> Enum.all?(peers_on(node), &(&1.state == :running)) end, 30_000)

  defp peers_on(node), do: Nodes.on(node, Pool, :status, [@pool]).peers

  # How many runs the peers of a node have made.
  defp runs_on(node) do
    for %{bridge: bridge} <- peers_on(node), reduce: 0 do
      sum ->
        args = [bridge, :list_programs, %{details: true}, 20_000]
        {:ok, %{"details" => programs}} = Nodes.on(node, DSPex.PythonBridge.Bridge, :call, args)
        # None while the node still loads it.
        sum + Enum.sum_by(programs, & &1["execution_count"])
    end
  end

  defp examples(count), do: for(n <- 1..count, do: {%{question: "q#{n}"}, %{answer: "a", n: n}})

  # Right for all; `meanwhile` is called with the number of an example, before its first score is given.
  defp metric(scored, meanwhile \\ fn _n -> :ok end) do
    caller = node()

    fn %{"question" => question, "n" => n}, %{"answer" => "a"} ->
      if node() != caller, do: raise("not at the caller")
      if :ets.update_counter(scored, question, 1, {question, 0}) == 1, do: meanwhile.(n)
      true
    end
  end

  defp assert_each_once(result, scored, count) do
    assert {:ok, %{score: 1.0, failed: 0, results: results}} = result
    assert Enum.map(results, & &1.inputs.question) == for(n <- 1..count, do: "q#{n}")
    assert :ets.info(scored, :size) == count
    assert for({question, times} <- :ets.tab2list(scored), times != 1, do: question) == []
  end

  test "the peers of both nodes run examples", context do
    before = runs(context)
    result = Evaluate.run(@pool, "qa", examples(120), metric: metric(context.scored))
    assert_each_once(result, context.scored, 120)
    runs = runs(context)
    assert runs.here > before.here and runs.there > before.there
    assert runs.here + runs.there == before.here + before.there + 120
    assert {:ok, %{score: 1.0}} = Evaluate.run(@pool, "qa", examples(120), metric: @field)
    now = runs(context)
    assert now.here > runs.here and now.there > runs.there
  end

  defp runs(context), do: %{here: runs_on(node()), there: runs_on(context.there)}

  test "an optimization takes a pool of its own node, and a bridge of any", context do
    far = {@pool, context.there}
    assert {:error, %Error{type: :invalid_request, message: text}} = optimize(far)
    assert text =~ "is a pool"
    [%{bridge: bridge}] = peers_on(context.there)
    assert {:ok, %{score: 1.0}} = optimize({bridge, context.there})
  end

  defp optimize(server) do
    opts = [trainset: examples(4), metric: @field, optimizer: :random_search]
    opts = opts ++ [options: %{num_candidate_programs: 1, max_bootstrapped_demos: 1}]
    Optimize.run(server, %{id: "better", signature: "question -> answer"}, opts)
  end

  test "no metric call is made twice when a node is lost", context do
    lost = join(context.opts)
    os_pid = Nodes.on(lost, System, :pid, [])
    lose = fn n -> if n == 40, do: kill(os_pid) end
    result = Evaluate.run(@pool, "qa", examples(160), metric: metric(context.scored, lose))
    assert_each_once(result, context.scored, 160)
    eventually(fn -> lost not in Node.list() end)
  end
end
