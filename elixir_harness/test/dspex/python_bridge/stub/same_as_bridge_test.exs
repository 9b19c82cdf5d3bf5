defmodule DSPex.PythonBridge.Stub.SameAsBridgeTest do
  @moduledoc """
  A stub gives what a real bridge gives: each case is run against both, and the results are compared. Only the peer differs.
  """

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Bridge, Error, Evaluate, Pool, Stub}
  alias DSPex.Test.Helpers

  defmodule Chat do
    use DSPex.PythonBridge.Program,
      signature: [inputs: [past: :history, question: :string], outputs: [answer: :string]]
  end

  setup_all do
    real = start_supervised!({Pool, Helpers.real_opts(name: __MODULE__.Real, pool_size: 1)})
    stub = start_supervised!({Stub, name: __MODULE__.Stub, answers: &answer/2})
    assert {:ok, _} = Pool.call(real, :ping, %{}, 30_000)

    for server <- [real, stub] do
      qa = %{id: "qa", signature: "question -> answer, certain: bool"}
      assert {:ok, _} = Pool.call(server, :create_program, qa, 60_000)
      assert {:ok, _} = Pool.call(server, :create_program, Chat.definition())
    end

    %{both: [__MODULE__.Real.Bridge1, __MODULE__.Stub]}
  end

  defp answer("qa", %{"question" => question}),
    do: {:ok, %{"answer" => "echo: #{question}", "certain" => true}}

  defp answer(_chat, %{"question" => question}), do: {:ok, %{answer: "echo: #{question}"}}

  defp same([real, stub], fun) do
    result = timeless(fun.(real))
    assert timeless(fun.(stub)) == result
    result
  end

  # Times differ.
  defp timeless({:error, %Error{meta: %{} = meta} = error}) do
    for {key, value} <- meta, String.ends_with?(key, "_ms"), do: assert(is_float(value))
    {:error, %{error | meta: Map.drop(meta, ["duration_ms", "queue_ms"])}}
  end

  defp timeless(list) when is_list(list), do: Enum.map(list, &timeless/1)
  defp timeless(result), do: result

  defp run(inputs, program \\ "qa"), do: %{program_id: program, inputs: inputs}

  describe "a call has the same result:" do
    test "a list of inputs, one of them wrong", %{both: both} do
      inputs = [%{question: "One?"}, %{qestion: "Two?"}, "three", %{question: "Four?"}]

      assert {:ok, %{"results" => results}} =
               same(both, &Bridge.call(&1, :execute_program, run(inputs)))

      assert [true, false, false, true] = Enum.map(results, & &1["success"])
      assert {:ok, %{"results" => []}} = same(both, &Bridge.call(&1, :execute_program, run([])))
    end

    test "programs that are listed and removed", %{both: both} do
      for id <- ["one", "two"], server <- both do
        Bridge.call(server, :create_program, %{
          id: id,
          signature: "a -> b",
          program_type: "chain_of_thought"
        })
      end

      same(both, &Bridge.call(&1, :list_programs, %{program_ids: ["two", "one", "x"]}))

      same(both, fn server ->
        {:ok, %{"details" => [one]}} =
          Bridge.call(server, :list_programs, %{details: true, program_ids: ["one"]})

        assert is_float(one["created_at"])
        Map.take(one, ["id", "program_type", "signature"])
      end)

      same(both, &Bridge.call(&1, :cleanup, %{program_ids: ["one", "x"]}))
      same(both, &Bridge.call(&1, :list_programs, %{program_ids: ["two", "one"]}))
      same(both, &Bridge.call(&1, :cleanup, %{program_ids: ["two"]}))
    end
  end

  test "a conversation goes on with what the run before returned", %{both: both} do
    {first, second} = {turn("Why?"), turn("And?")}

    for server <- both do
      assert {:ok, %Chat{answer: "echo: Why?", past: [^first] = past}} =
               Chat.run(%{question: "Why?"}, server: server)

      assert [{:ok, %Chat{past: [^first, ^second] = past}, _meta} | _] =
               Chat.stream(%{question: "And?", past: past}, server: server)
               |> Enum.reverse()

      inputs = %{question: "So?", past: past}

      for pool <- [__MODULE__.Real, __MODULE__.Stub] do
        assert {:ok, %{"past" => [^first, ^second, %{"answer" => "echo: So?"}]}, _meta} =
                 Pool.request(pool, :execute_program, run(inputs, inspect(Chat)))
      end
    end
  end

  defp turn(question), do: %{"question" => question, "answer" => "echo: #{question}"}

  describe "a call has the same error:" do
    test "inputs that the program does not have, or not all, and no inputs", %{both: both} do
      for inputs <- [%{}, %{qestion: "Why?"}, %{question: {1, 2}}, %{question: self()}],
          ask <- [&Bridge.request/3, &Bridge.call/3] do
        assert {:error, _error} = same(both, &ask.(&1, :execute_program, run(inputs)))
      end

      same(both, &Bridge.request(&1, {:a}, %{}))
      same(both, &Bridge.call(&1, :unheard_of, %{}))
    end
  end

  test "an evaluation has the same scores, in the results and in a stream", %{both: both} do
    examples = [
      {%{question: "One?"}, %{answer: "echo: One?"}},
      {%{question: "Two?"}, %{answer: "no"}},
      {%{wrong: "a"}, %{answer: "b"}}
    ]

    metric = fn example, prediction ->
      if example["answer"] == prediction["answer"], do: {true, "right"}, else: 0.25
    end

    for metric <- [metric, {:field, :answer, :equals}, fn _, _ -> nil end] do
      same(both, fn server ->
        with {:ok, result} <- Evaluate.run(server, "qa", examples, metric: metric),
             do:
               {result.score, result.failed, for(it <- result.results, do: {it.score, it.error})},
             else: ({:error, error} -> {error.type, error.message})
      end)
    end
  end

  describe "a stream has the same elements:" do
    test "the text of its fields, and the result", %{both: both} do
      same(both, fn server ->
        elements = Enum.to_list(Bridge.stream(server, run(%{question: "Why not?"})))
        {:ok, result, _meta} = List.last(elements)
        {for({:chunk, "answer", text} <- elements, into: "", do: text), result}
      end)
    end

    test "the items of a list", %{both: both} do
      same(both, fn server ->
        inputs = [%{question: "One?"}, %{}, 3]
        elements = Enum.to_list(Bridge.stream(server, run(inputs)))
        {:ok, result, _meta} = List.last(elements)
        {Enum.sort(for({:item, _, _} = item <- elements, do: item)), result}
      end)
    end
  end
end
