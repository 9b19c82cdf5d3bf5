defmodule DSPex.PythonBridge.Optimize.RealTest do
  @moduledoc "Optimizations by real peers, whose LM answers rightly under one instruction."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Evaluate, Optimize}
  alias DSPex.Test.{OptimizingLM, SilentLM}

  @moduletag timeout: 180_000

  @qa %{id: "qa", signature: "question -> answer"}
  @metric {:field, :answer, :equals}
  @copro [optimizer: :copro, options: [breadth: 3, depth: 2], num_threads: 2]

  # A bridge that tests share, whose peer has one slot, and its LM, whose requests are counted.
  setup_all do
    lm = OptimizingLM.start()
    opts = OptimizingLM.opts(lm)
    env = Map.put(opts[:env], "DSPY_BRIDGE_MAX_IN_FLIGHT", "1")
    %{bridge: start_supervised!({Bridge, real_opts(Keyword.put(opts, :env, env))}), lm: lm}
  end

  defp folder do
    dir = Path.join(System.tmp_dir!(), "optimize#{System.unique_integer([:positive])}")
    on_exit(fn -> File.rm_rf!(dir) end)
    dir
  end

  defp start(opts), do: start_supervised!({Bridge, real_opts(opts)}, id: make_ref())

  defp optimize(server, opts, program \\ @qa) do
    given = [trainset: OptimizingLM.examples(6), metric: @metric] ++ @copro
    Optimize.run(server, program, Keyword.merge(given, opts))
  end

  defp no_programs?(bridge),
    do: Bridge.call(bridge, :list_programs) == {:ok, %{"programs" => []}}

  # A metric that counts its calls by their contents, and calls a function with the number of each.
  defp counting(table, fun) do
    fn example, prediction, purpose ->
      n = :ets.update_counter(table, :all, 1, {:all, 0})
      :ets.update_counter(table, {example, prediction, purpose}, 1, {nil, 0})
      fun.(n)
      example["answer"] == prediction["answer"]
    end
  end

  test "the state makes the program that scores as it says", %{bridge: bridge, lm: lm} do
    before = OptimizingLM.requests(lm)
    test = self()
    assert {:ok, result} = optimize(bridge, on_progress: &send(test, &1))

    assert %{score: 1.0, baseline: +0.0, stopped: nil, usage: %{"lm_calls" => _}} = result
    assert result.lm_calls == OptimizingLM.requests(lm) - before
    assert_received {:progress, %{step: "copro"}}
    assert_received {:candidate, %{best: true, of: 6, score: 1.0, state: %{"signature" => _}}}
    assert_received {:candidate, %{best: false, state: nil}}

    assert to_string(result) =~
             "instructions: Answer with the capitals of the question. (0 demos)"

    eventually(fn -> no_programs?(bridge) end)
    {:ok, _} = Bridge.call(bridge, :create_program, JSON.decode!(JSON.encode!(result.definition)))
    examples = OptimizingLM.examples(10)
    assert {:ok, %{score: 1.0}} = Evaluate.run(bridge, "qa", examples, metric: @metric)
    {:ok, _} = Bridge.call(bridge, :cleanup)
  end

  test "a spent budget, a stop, and wrong arguments of the peer's", %{bridge: bridge, lm: lm} do
    before = OptimizingLM.requests(lm)
    # Of several threads, some requests may be closed before they reach the LM.
    assert {:ok, result} = optimize(bridge, budget: [lm_calls: 10], num_threads: 1)
    assert %{stopped: "lm_calls", lm_calls: 10} = result
    assert OptimizingLM.requests(lm) == before + 10

    stop = &if(match?({:candidate, %{score: 1.0}}, &1), do: :stop)
    assert {:ok, result} = optimize(bridge, on_progress: stop)
    assert %{stopped: "caller", score: 1.0, state: %{"signature" => _}} = result

    assert {:error, %Error{type: :invalid_args}} = optimize(bridge, optimizer: :better)
    assert {:error, %Error{type: :tool_error}} = optimize(bridge, metric: fn _, _ -> "good" end)
    eventually(fn -> no_programs?(bridge) end)
  end

  test "a peer killed in the middle: the same state, no call of the metric and no LM request again" do
    [calls, again] = for _ <- 1..2, do: :ets.new(:calls, [:public])
    lm = OptimizingLM.start()
    opts = [metric: counting(calls, &Function.identity/1)]
    assert {:ok, undisturbed} = optimize(start(OptimizingLM.opts(lm, folder())), opts)
    requests = OptimizingLM.requests(lm)

    lm = OptimizingLM.start()
    bridge = start(OptimizingLM.opts(lm, folder()))
    metric = counting(again, &if(&1 == 15, do: kill(Bridge.get_status(bridge).os_pid)))
    assert {:ok, result} = optimize(bridge, metric: metric)
    assert result.state == undisturbed.state and result.score == undisturbed.score
    assert Enum.sort(:ets.tab2list(again)) == Enum.sort(:ets.tab2list(calls))
    # The peer that has died had at most two in work.
    assert OptimizingLM.requests(lm) <= requests + 2
  end

  test "the caller's death ends its requests to the LM, and the program is gone",
       %{bridge: bridge} do
    [lm: model, lm_options: options] = SilentLM.lm_opts(SilentLM.start())
    silent = Map.put(@qa, :lm, Map.put(options, :model, model))
    caller = spawn(fn -> optimize(bridge, [], silent) end)
    assert_receive {:lm_request, _line}, 60_000
    Process.exit(caller, :kill)
    assert_receive :lm_closed, 5_000
    eventually(fn -> Bridge.get_status(bridge).pending == 0 end)
    eventually(fn -> no_programs?(bridge) end)
  end
end
