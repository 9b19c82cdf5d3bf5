defmodule DSPex.PythonBridge.Stub.EvaluationTest do
  @moduledoc "`Evaluate.run` over a stub. `same_as_bridge_test.exs` compares scores and errors with a peer's."

  use ExUnit.Case, async: true

  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.{Bridge, Error, Evaluate, Stub}

  @stub __MODULE__.Shared
  @field {:field, :answer, :equals}

  setup_all do
    start_supervised!({Stub, name: @stub})
    :ok
  end

  defp evaluate(examples, opts), do: Evaluate.run(@stub, "qa", examples, opts)

  test "a test's answers serve its evaluation, and each expected run comes once" do
    Stub.expect(@stub, "qa", 30, fn %{"n" => n} -> {:ok, %{"answer" => n * 2}} end)
    examples = for n <- 1..30, do: {%{n: n}, %{answer: if(rem(n, 3) == 0, do: n * 2, else: 0)}}

    assert {:ok, %{score: score, failed: 0, results: results}} =
             evaluate(examples, metric: @field)

    assert_in_delta score, 1 / 3, 1.0e-9
    assert Enum.map(results, & &1.prediction["answer"]) == for(n <- 1..30, do: n * 2)
    Stub.verify!(@stub)
  end

  test "a metric may run a program of the same stub" do
    Stub.stub(@stub, "qa", fn %{"n" => n} -> {:ok, %{"answer" => n}} end)
    Stub.stub(@stub, "judge", fn %{"n" => n} -> {:ok, %{"right" => n > 2}} end)

    judge = fn _example, %{"answer" => n} ->
      args = %{program_id: "judge", inputs: %{n: n}}
      {:ok, %{"right" => right}} = Bridge.call(@stub, :execute_program, args)
      {right, "judged"}
    end

    examples = for n <- 1..4, do: %{n: n}
    assert {:ok, %{score: 0.5, results: [one | _]}} = evaluate(examples, metric: judge)
    assert one.feedback == "judged"
  end

  test "a run that fails has the score 0" do
    Stub.stub(@stub, "qa", fn _ -> {:error, Error.new(:output_invalid, "x")} end)

    assert {:ok, %{score: +0.0, failed: 2}} =
             evaluate([%{n: 1}, %{n: 2}], metric: fn _, _ -> 1 end)
  end

  test "a field is compared as the metric says" do
    Stub.stub(@stub, "qa", fn %{"text" => text} -> {:ok, %{"answer" => text}} end)

    for {got, wanted, scores} <- [
          {"The Rome!", "rome", [0.0, 1.0, 1.0, 0.0]},
          {"left right", "right left", [0.0, 0.0, 1.0, 0.0]},
          {"one one two", "one three one", [0.0, 0.0, 2 / 3, 0.0]},
          {"in Rome", "Rome", [0.0, 0.0, 2 / 3, 1.0]},
          {1, 1.0, [1.0, 0.0, 0.0, 0.0]},
          {nil, "x", [0.0, 0.0, 0.0, 0.0]}
        ],
        {match, score} <- Enum.zip([:equals, :exact_match, :f1, :contains], scores) do
      examples = [{%{text: got}, %{answer: wanted}}]
      assert {:ok, result} = evaluate(examples, metric: {:field, :answer, match})
      assert_in_delta result.score, score, 1.0e-9, "#{match} of #{got} and #{wanted}"
    end

    assert {:error, %Error{type: :invalid_args, message: "expected: answer is missing" <> _}} =
             evaluate([{%{text: "x"}, %{other: "x"}}], metric: @field)
  end

  test "a metric that fails ends the evaluation, whose other runs are killed" do
    test = self()

    Stub.stub(@stub, "qa", fn %{"n" => n} ->
      send(test, {:answers, n, self()})
      receive do: (:go -> {:ok, %{"answer" => n}})
    end)

    opts = [metric: fn _, _ -> raise "broken" end, max_concurrency: 32]
    evaluation = Task.async(fn -> evaluate([%{n: 1}, %{n: 2}], opts) end)
    assert_receive {:answers, 1, scored}
    assert_receive {:answers, 2, other}
    ref = Process.monitor(other)
    send(scored, :go)
    assert {:error, %Error{type: :tool_error}} = Task.await(evaluation)
    assert_receive {:DOWN, ^ref, :process, ^other, :killed}
  end

  test "an answer that is missing is a mistake of the test, and ends the evaluation" do
    text =
      capture_log(fn ->
        assert {:error, %Error{type: :program_not_found, message: message}} =
                 evaluate([{%{n: 1}, %{answer: 1}}], metric: @field)

        assert message =~ "has no answer for it"
      end)

    assert text =~ "has no answer for it"
  end

  test "a stub refuses to optimize" do
    args = %{program_id: "qa", inputs: [], metric: %{tool: "x"}, optimize: %{optimizer: "copro"}}

    assert {:error, %Error{type: :invalid_args, message: message}} =
             Bridge.request(@stub, :execute_program, args)

    assert message == "optimize: a stub cannot optimize; test with a bridge and offline/script"
  end

  test "an item's time includes its metric" do
    Stub.stub(@stub, "qa", fn _ -> {:ok, %{"answer" => 1}} end)
    metric = fn _, _ -> Process.sleep(:infinity) end

    assert {:ok, %{failed: 1, results: [one]}} =
             evaluate([%{n: 1}], metric: metric, item_timeout_ms: 50)

    assert one.error.type == :timeout
  end
end
