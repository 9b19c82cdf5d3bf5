defmodule DSPex.ProgramStubTest do
  @moduledoc "Programs as modules in an application's tests, without Python."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Error, Evaluate, Stub}
  alias DSPex.Test.{Address, Triage}

  @name __MODULE__.Pool
  @outputs %{
    "team" => "billing",
    "size" => "large",
    "urgent" => true,
    "due" => "2026-03-01",
    "reply_to" => %{"street" => "Mill Lane", "city" => "Leeds"},
    "items" => [],
    "reasoning" => "It says so."
  }

  defmodule Renamed do
    use DSPex.PythonBridge.Program, id: "first", signature: "question -> answer"
    def definition, do: Map.put(super(), :id, :second)
  end

  defmodule Raising do
    use DSPex.PythonBridge.Program, signature: "question -> answer"
    def definition, do: raise("no environment")
  end

  defmodule NoInputs do
    use DSPex.PythonBridge.Program, signature: [inputs: [], outputs: [joke: :string]]
  end

  defmodule Mail do
    use DSPex.PythonBridge.Program,
      id: "mail",
      signature: [inputs: [to: Address, on: {:optional, :date}], outputs: [greeting: :string]]
  end

  setup_all do
    start_supervised!({Stub, name: @name})
    :ok
  end

  test "a stub answers a run and a stream by the program's id; the answers become structs" do
    Stub.stub(@name, inspect(Triage), fn %{"ticket" => "It burns!", "sender" => nil} ->
      {:ok, @outputs}
    end)

    assert {:ok, %Triage{team: "billing", size: :large, due: ~D[2026-03-01], phone: nil} = triage} =
             Triage.run(%{ticket: "It burns!"}, server: @name)

    assert %Triage{reply_to: %Address{city: "Leeds"}, reasoning: "It says so."} = triage
    elements = Enum.to_list(Triage.stream([ticket: "It burns!"], server: @name))
    assert {:chunk, :reasoning, "It says so."} in elements
    assert {:ok, ^triage, %{}} = List.last(elements)
  end

  test "an answer that the module cannot have is named, and so is a wrong input" do
    Stub.stub(@name, inspect(Triage), fn _inputs ->
      {:ok, %{@outputs | "reply_to" => %{"street" => "Mill Lane"}}}
    end)

    assert {:error, %Error{type: :output_invalid, message: message}} =
             Triage.run([ticket: "a"], server: @name)

    assert message == "the answer did not fit DSPex.Test.Triage: reply_to.city: missing"

    assert {:error, %Error{type: :invalid_args, message: "inputs.tiket: unknown field" <> _}} =
             Triage.run([tiket: "a"], server: @name)
  end

  test "a program runs under the id of its definition/0" do
    Stub.stub(@name, "second", fn %{"question" => "q"} -> {:ok, %{answer: "a"}} end)
    assert {:ok, %Renamed{answer: "a"}} = Renamed.run([question: "q"], server: @name)

    assert {:ok, %Renamed{answer: "a"}, _meta} =
             [question: "q"] |> Renamed.stream(server: @name) |> Enum.to_list() |> List.last()

    assert {:error, %Error{type: :invalid_request, message: message}} =
             Raising.run([question: "q"], server: @name)

    assert message =~ "its definition/0 raised RuntimeError"
    assert [error: %Error{}] = Enum.to_list(Raising.stream([question: "q"], server: @name))
  end

  test "an empty list is no inputs, not an empty batch" do
    Stub.stub(@name, inspect(NoInputs), fn none when none == %{} -> {:ok, %{joke: "j"}} end)
    assert {:ok, %NoInputs{joke: "j"}} = NoInputs.run([], server: @name)

    assert {:error, %Error{type: :invalid_args, message: "inputs.question: missing" <> _}} =
             Renamed.run([], server: @name)
  end

  test "an evaluation takes the inputs that a run takes" do
    sent = %{"to" => %{"street" => "Mill Lane", "city" => "Leeds"}, "on" => nil}
    Stub.stub(@name, "mail", fn ^sent -> {:ok, %{greeting: "Hello"}} end)
    inputs = %{to: %Address{street: "Mill Lane", city: "Leeds"}}
    assert {:ok, %Mail{}} = Mail.run(inputs, server: @name)

    examples = [{inputs, %{greeting: "Hello"}}, {Map.to_list(inputs), %{greeting: "Hello"}}]
    test = self()
    metric = fn example, _ -> send(test, {:example, example}) && 1 end

    for metric <- [{:field, :greeting, :equals}, metric] do
      assert {:ok, %{score: 1.0, failed: 0} = result} =
               Evaluate.run(@name, Mail, examples, metric: metric)

      assert [%{inputs: ^inputs}, %{inputs: [to: %Address{}]}] = result.results
      assert "#{result}" =~ "to: %DSPex.Test.Address"
    end

    assert_received {:example, %{"to" => %{"city" => "Leeds"}, "greeting" => "Hello"}}
  end

  test "a batch has the sum of what its answers say that they used" do
    Stub.stub(@name, "second", fn
      %{"question" => "no"} ->
        {:error, %{Error.new(:lm_error, "no") | meta: %{"lm_calls" => 4}}}

      %{"question" => cost} ->
        tokens = %{"m" => %{"prompt_tokens" => 3, "completion_tokens" => 1}}
        meta = %{lm_calls: 1, cost_usd: cost, lm_usage: tokens, finish_reasons: ["stop"]}
        {:ok, %{answer: "a"}, meta}
    end)

    run = fn questions ->
      inputs = Enum.map(questions, &%{question: &1})
      assert {:ok, [_, _, _], meta} = Renamed.run(inputs, server: @name, meta: true)
      meta
    end

    assert %{"lm_calls" => 6, "cost_usd" => 0.75, "finish_reasons" => ["stop", "stop"]} =
             meta = run.([0.25, 0.5, "no"])

    assert meta["lm_usage"] == %{"m" => %{"prompt_tokens" => 6, "completion_tokens" => 2}}
    assert %{"lm_calls" => 3, "cost_usd" => nil} = run.([0.25, nil, 0.25])
  end

  test "an error of the stub is that of the run" do
    Stub.stub(@name, inspect(Triage), fn _inputs -> {:error, :timeout} end)
    assert {:error, %Error{type: :timeout}} = Triage.run([ticket: "a"], server: @name)
  end
end
