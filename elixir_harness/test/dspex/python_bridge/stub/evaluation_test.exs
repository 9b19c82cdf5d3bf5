defmodule DSPex.PythonBridge.Stub.EvaluationTest do
  @moduledoc "`Evaluate.run` over a stub. `same_as_bridge_test.exs` compares scores and errors with a peer's."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Bridge, Error, Evaluate, Stub}

  @stub __MODULE__.Shared
  @field {:field, :answer, :equals}

  setup_all do
    start_supervised!({Stub, name: @stub})
    :ok
  end

  defp evaluate(examples, opts), do: Evaluate.run(@stub, "qa", examples, opts)

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

  test "a stub refuses to optimize" do
    args = %{program_id: "qa", inputs: [], metric: %{tool: "x"}, optimize: %{optimizer: "copro"}}

    assert {:error, %Error{type: :invalid_args, message: message}} =
             Bridge.request(@stub, :execute_program, args)

    assert message == "optimize: a stub cannot optimize; test with a bridge and offline/script"
  end
end
