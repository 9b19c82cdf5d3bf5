defmodule DSPex.PythonBridge.EvaluateTest do
  @moduledoc "Evaluations by real peers, whose LM is scripted."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Evaluate}
  alias DSPex.PythonBridge.Evaluate.{Examples, Metric, Result}
  alias DSPex.Test.{FakePeer, SilentLM}

  doctest Examples
  doctest Metric

  @answers %{"q-rome" => "The Rome!", "q-lima" => "Lima", "*" => "no idea"}
  @examples [
    {%{question: "q-rome"}, %{answer: "rome"}},
    {%{question: "q-else"}, %{answer: "Oslo"}},
    {%{question: "q-lima"}, %{answer: "Lima", note: 5}}
  ]

  defmodule Described do
    @callback describe() :: String.t()
    @optional_callbacks describe: 0
  end

  defmodule Agent do
    @behaviour Described
    use DSPex.PythonBridge.Program,
      id: "agent",
      program_type: "react",
      signature: "question -> answer",
      tools: [look: [args: [question: :string], function: &__MODULE__.look/1]]

    def look(%{"question" => question}), do: "found #{question}"
  end

  defmodule Own do
    def definition, do: [id: :agent]
  end

  setup_all do
    answers = Map.new(@answers, fn {key, answer} -> {key, %{answer: answer}} end)
    script = %{model: "offline/script", answers: answers}
    bridge = start_supervised!({Bridge, real_opts(lm: script)})
    qa = %{id: "qa", signature: "question -> answer"}
    {:ok, _} = Bridge.call(bridge, :create_program, qa, 60_000)
    %{bridge: bridge}
  end

  test "results are in the order of the examples, with all that is known", %{bridge: bridge} do
    test = self()

    score = fn example, prediction ->
      send(test, {:scored, example})
      right? = example["answer"] == prediction["answer"]
      if right?, do: {1, "right"}, else: 0.25
    end

    opts = [metric: score, on_result: &send(test, {:result, &1.index})]
    assert {:ok, %Result{} = result} = Evaluate.run(bridge, "qa", @examples, opts)
    assert_in_delta result.score, 0.5, 1.0e-9
    assert result.failed == 0 and is_integer(result.duration_ms)
    assert %{"lm_calls" => 3, "lm_usage" => %{"offline/script" => _}} = result.usage
    assert Enum.map(result.results, & &1.score) == [0.25, 0.25, 1.0]

    assert List.last(result.results) == %{
             index: 2,
             inputs: %{question: "q-lima"},
             expected: %{answer: "Lima", note: 5},
             prediction: %{"answer" => "Lima"},
             error: nil,
             score: 1.0,
             feedback: "right"
           }

    assert_received {:scored, %{"question" => "q-lima", "answer" => "Lima", "note" => 5}}
    for index <- 0..2, do: assert_received({:result, ^index})
  end

  test "an unknown cost plus a known one is unknown, and nothing else is" do
    known = %{"lm_calls" => 1, "cost_usd" => 0.25, "lm_usage" => %{"m" => %{"total_tokens" => 3}}}
    unknown = %{known | "cost_usd" => nil, "lm_usage" => %{}}

    for metas <- [[known, unknown], [unknown, known], [known, unknown, known]] do
      usage = Enum.reduce(metas, %{}, &Result.add_usage(&2, &1))
      tokens = 3 * Enum.count(metas, &(&1 == known))

      assert usage == %{
               "lm_calls" => length(metas),
               "cost_usd" => nil,
               "lm_usage" => %{"m" => %{"total_tokens" => tokens}}
             }
    end

    assert Result.add_usage(known, known)["cost_usd"] == 0.5
  end

  test "the tools that a module has are called, and a run may replace some", %{bridge: bridge} do
    {:ok, _} = Bridge.call(bridge, :create_program, Agent.definition())
    test = self()
    instead = fn args -> send(test, {:looked, args}) && "nothing" end

    for {program, tools, seen} <- [
          {Agent, %{}, "found q"},
          {Agent, %{"look" => instead}, "nothing"},
          {Own, %{look: instead}, "nothing"}
        ] do
      opts = [metric: fn _, prediction -> inspect(prediction) =~ seen end, tools: tools]
      opts = [lm: "offline/echo"] ++ opts
      assert {:ok, result} = Evaluate.run(bridge, program, [%{question: "q"}], opts)
      assert result.score == 1.0, inspect(result)
    end

    assert_received {:looked, %{"question" => _}}
  end

  test "a metric of three arguments gets what the score is for", %{bridge: bridge} do
    metric = fn _example, _prediction, purpose -> purpose == :score end
    assert {:ok, %Result{score: 1.0}} = Evaluate.run(bridge, "qa", @examples, metric: metric)

    judge = fn _, _, purpose -> {0, inspect(purpose)} end
    {:ok, %{tool: name}, [tools: tools]} = Metric.new(judge, [], nil)
    predictor = %{"name" => "self", "inputs" => %{"q" => 1}, "outputs" => %{}}
    asked = %{"example" => %{}, "prediction" => %{}, "purpose" => "feedback"}

    assert tools[name].(Map.put(asked, "predictor", predictor)).feedback ==
             inspect({:feedback, %{name: "self", inputs: %{"q" => 1}, outputs: %{}}})
  end

  test "a run that fails is 0, and the table shows the worst first", %{bridge: bridge} do
    examples = @examples ++ [{%{wrong: "x"}, %{answer: "y"}}]
    assert {:ok, result} = Evaluate.run(bridge, "qa", examples, metric: {:field, "answer", :f1})
    assert {result.failed, result.score} == {1, 0.5}

    assert %{error: %Error{type: :invalid_args}, prediction: nil, score: +0.0} =
             List.last(result.results)

    text = to_string(result)
    assert [summary, _head, worst | _] = String.split(text, "\n")
    assert summary =~ "score 0.500, 4 examples, 1 failed"
    assert worst =~ "invalid_args: inputs.wrong"
    assert inspect(result) =~ text
  end

  test "a metric that fails ends the evaluation at once", %{bridge: bridge} do
    examples = Stream.repeatedly(fn -> hd(@examples) end)

    for {metric, text} <- [
          {fn _, _ -> raise "broken" end, "broken"},
          {fn _, _ -> "good" end, "expected a number, a boolean or"},
          {fn _, _ -> nil end, "expected a number, a boolean or"},
          {fn _, _ -> {:error, "no judge"} end, "no judge"},
          {fn _, _ -> exit(:gone) end, "gone"}
        ] do
      assert {:error, %Error{type: :tool_error, message: message}} =
               Evaluate.run(bridge, "qa", examples, metric: metric)

      assert message =~ "metric:score: " and message =~ text
    end
  end

  test "examples are taken as they are needed", %{bridge: bridge} do
    taken = :counters.new(1, [])
    seen = :counters.new(1, [])

    examples =
      Stream.map(1..150, fn _ ->
        :counters.add(taken, 1, 1)
        hd(@examples)
      end)

    metric = fn _, _ ->
      :counters.add(seen, 1, 1)
      # Those in work, and those of one request more.
      :counters.get(taken, 1) - :counters.get(seen, 1) <= 18
    end

    opts = [metric: metric, max_concurrency: 16]

    assert {:ok, %Result{score: 1.0, results: results}} =
             Evaluate.run(bridge, "qa", examples, opts)

    assert Enum.map(results, & &1.index) == Enum.to_list(0..149)
  end

  test "a metric that has captured 18 MB is not copied for each example", %{bridge: bridge} do
    held = Enum.map(1..600_000, &{&1, &1})
    assert :erts_debug.flat_size(held) * 8 > 18_000_000
    examples = for n <- 1..200, do: {%{question: "q-#{n}"}, %{answer: "#{n}"}}
    test = self()

    metric = fn _, _ ->
      {:total_heap_size, words} = Process.info(self(), :total_heap_size)
      send(test, {:heap, words})
      elem(hd(held), 0)
    end

    assert {:ok, %Result{score: 1.0}} = Evaluate.run(bridge, "qa", examples, metric: metric)
    for _ <- examples, do: assert_received({:heap, words} when words * 8 < 2_000_000)
  end

  test "a long mailbox of the caller costs the examples no time" do
    bridge = start_supervised!({Bridge, FakePeer.opts(:plays)}, id: :quick)
    results = [%{success: true, result: %{answer: "a"}, score: 1}]

    opts = [
      metric: {:field, :answer, :f1},
      config: %{play: [["reply", %{results: results}, %{}]]}
    ]

    examples = List.duplicate(%{question: "q"}, 512)
    # To look through it once takes 8 ms. On the heap, each garbage collection would, too.
    Process.flag(:message_queue_data, :off_heap)
    run = fn -> Evaluate.run(bridge, "qa", examples, [max_concurrency: 1] ++ opts) end
    assert {before, {:ok, %Result{score: 1.0}}} = :timer.tc(run)
    for n <- 1..1_000_000, do: send(self(), n)
    assert {us, {:ok, %Result{score: 1.0}}} = :timer.tc(run)
    # For each example it would take 4 s more.
    assert us < 3 * before + 1_000_000
  end

  test "wrong arguments are named", %{bridge: bridge} do
    many = List.duplicate(hd(@examples), 70)

    no_file = fn _acc, _fun -> raise "no file" end

    for {examples, opts, text} <- [
          {@examples, [metric: nil], ":metric: missing"},
          {@examples, [metric: {:field, :answer, :fuzzy}], ":metric: expected {:field, name, m"},
          {@examples, [metric: fn _ -> 1 end], ":metric: expected a function of two"},
          {@examples, [metric: {:field, :question, :f1}], "metric.field: expected one of answer"},
          {@examples, [metrics: 1], "unknown option :metrics, did you mean :metric?"},
          {@examples, [max_concurrency: 0], ":max_concurrency"},
          {@examples, [timeout: 4_294_967_296], ":timeout: expected 1 to 4294967295 ms"},
          {@examples, [attempts: 11], ":attempts"},
          {many ++ [{%{question: "x"}, %{}}], [], "expected[70].answer: missing"},
          {many ++ [5], [], "examples[70]: expected"},
          {many ++ [{%{question: {:secret, 1}}, %{}}], [], "inputs[70].question: a tuple has no"},
          {nil, [], "examples: ** (Protocol.UndefinedError)"},
          {no_file, [], "examples: ** (RuntimeError) no file"},
          {Stream.map(many, &no_file.(&1, nil)), [], "examples: ** (RuntimeError) no file"}
        ] do
      opts = Keyword.merge([metric: {:field, :answer, :f1}], opts)

      assert {:error, %Error{type: type, message: message}} =
               Evaluate.run(bridge, "qa", examples, opts)

      assert type in [:invalid_args, :invalid_request] and message =~ text
    end

    for {program, text} <- [{Enum, "there is no such module with a definition/0"}, {nil, "an id"}] do
      assert {:error, %Error{type: :invalid_request, message: "program: " <> message}} =
               Evaluate.run(bridge, program, @examples, metric: fn _, _ -> 1 end)

      assert message =~ text
    end

    assert {:error, %Error{type: :program_not_found}} =
             Evaluate.run(bridge, "none", @examples, metric: fn _, _ -> 1 end)
  end

  test "a peer that sends no valid results is an error" do
    bridge = start_supervised!({Bridge, FakePeer.opts(:plays)}, id: :liar)
    ok = %{success: true, result: %{answer: "a"}, score: 1}
    wrong = [nil, [], [ok, ok], [1], [%{ok | score: "1"}]]

    for lie <- [nil, [], %{}] ++ for(results <- wrong, do: %{results: results}) do
      opts = [metric: {:field, :answer, :f1}, config: %{play: [["reply", lie, %{}]]}]

      assert {:error, %Error{type: :internal, message: "the peer sent no valid results"}} =
               Evaluate.run(bridge, "qa", [%{question: "q"}], opts)
    end
  end

  test "the timeout and the caller's death stop all requests", %{bridge: bridge} do
    [lm: model, lm_options: options] = SilentLM.lm_opts(SilentLM.start())
    silent = %{id: "silent", signature: "question -> answer", lm: Map.put(options, :model, model)}
    {:ok, _} = Bridge.call(bridge, :create_program, silent, 60_000)

    metric = fn _, _ -> flunk("there is no answer to score") end

    assert {:error, %Error{type: :timeout}} =
             Evaluate.run(bridge, "silent", @examples, metric: metric, timeout: 1_500)

    eventually(fn -> Bridge.get_status(bridge).pending == 0 end)
    for _ <- @examples, do: assert_receive(:lm_closed)
    for _ <- @examples, do: assert_received({:lm_request, _line})

    # Many more would follow.
    examples = Stream.repeatedly(fn -> hd(@examples) end)
    opts = [metric: metric, max_concurrency: 4]
    caller = spawn(fn -> Evaluate.run(bridge, "silent", examples, opts) end)
    for _ <- 1..4, do: assert_receive({:lm_request, _line})
    Process.exit(caller, :kill)
    for _ <- 1..4, do: assert_receive(:lm_closed)
    eventually(fn -> Bridge.get_status(bridge).pending == 0 end)
    stats = fn -> Bridge.call(bridge, :get_stats) end
    eventually(fn -> match?({:ok, %{"in_flight" => 0, "queued" => 0}}, stats.()) end)
    refute_received {:lm_request, _line}
  end
end
