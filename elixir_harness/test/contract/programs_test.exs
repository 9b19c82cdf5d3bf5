defmodule DSPex.Contract.ProgramsTest do
  @moduledoc """
  The contract, in the README's order; a newcomer reads this folder first. The tests use public functions, real peers, and
  LMs of the package or on loopback.

  This file: programs and the types of their fields.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error}

  defmodule Summary do
    use DSPex.PythonBridge.Program,
      id: "summary",
      signature: [
        inputs: [ticket: :string],
        outputs: [summary: {:string, "one sentence"}, mood: {:enum, [:calm, :angry]}]
      ]
  end

  setup_all do
    %{bridge: start_supervised!({Bridge, real_opts()})}
  end

  # Each test has programs of its own: their ids begin with its line.
  defp create(bridge, id, args \\ %{}) do
    args = Map.merge(%{id: id, signature: "question -> answer"}, args)
    Bridge.call(bridge, :create_program, args)
  end

  defp run(bridge, id, inputs), do: execute(bridge, id, inputs, %{})

  defp execute(bridge, id, inputs, args) do
    args = Map.merge(%{program_id: id, inputs: inputs}, args)
    Bridge.call(bridge, :execute_program, args)
  end

  defp script(answers), do: %{model: "offline/script", answers: answers}

  test "a program is created, run, listed and removed" do
    bridge = start_supervised!({Bridge, real_opts()}, id: :own)
    assert create(bridge, "qa") == {:ok, %{"program_id" => "qa", "status" => "created"}}
    assert {:ok, %{"answer" => answer}} = run(bridge, "qa", %{question: "Why?"})
    assert is_binary(answer)
    assert Bridge.call(bridge, :list_programs) == {:ok, %{"programs" => ["qa"]}}

    assert Bridge.call(bridge, :cleanup) ==
             {:ok, %{"status" => "cleaned", "programs_removed" => 1}}

    assert Bridge.call(bridge, :list_programs) == {:ok, %{"programs" => []}}
  end

  test "outputs are values of their types, with the reasoning", %{bridge: bridge} do
    inputs = [%{name: "ticket", type: "string"}]
    team = %{name: "team", type: "Literal['billing', 'support']"}
    urgent = %{name: "urgent", type: "boolean", description: "must be handled today"}
    signature = %{instructions: "Route the ticket.", inputs: inputs, outputs: [team, urgent]}
    args = %{signature: signature, program_type: "chain_of_thought"}
    {:ok, _} = create(bridge, "triage", args)
    assert {:ok, result} = run(bridge, "triage", %{ticket: "I was charged twice!"})
    assert %{"team" => team, "urgent" => urgent, "reasoning" => reasoning} = result
    assert team in ["billing", "support"] and is_boolean(urgent) and is_binary(reasoning)
  end

  test "lists, maps, optional and nested values come back as the LM gave them", %{bridge: bridge} do
    answer = %{tags: ["a", "b"], counts: %{"x" => 1}, score: nil, owner: %{name: "Ann", age: 5}}
    owner = %{type: "object", properties: %{name: %{type: "string"}, age: %{type: "integer"}}}

    outputs = [
      %{name: "tags", type: "list[str]"},
      %{name: "counts", type: "dict[str, int]"},
      %{name: "score", type: "Optional[float]"},
      %{name: "owner", type: owner}
    ]

    signature = %{inputs: [%{name: "text", type: "str"}], outputs: outputs}
    {:ok, _} = create(bridge, "nested", %{signature: signature, lm: script([answer])})
    assert {:ok, result} = run(bridge, "nested", %{text: "?"})
    assert result == answer |> JSON.encode!() |> JSON.decode!()
  end

  test "text and integers of any size come back exactly", %{bridge: bridge} do
    id = "žluťoučký 🐎 \" \\ \n #{String.duplicate("9", 400)}"
    number = Integer.pow(10, 1_000) + 1
    args = %{signature: "q -> n: int", lm: script([%{n: number}])}
    assert {:ok, %{"program_id" => ^id}} = create(bridge, id, args)
    assert run(bridge, id, %{q: "?"}) == {:ok, %{"n" => number}}
  end

  test "an id that exists is replaced", %{bridge: bridge} do
    {:ok, _} = create(bridge, "again", %{signature: "question -> old"})
    {:ok, _} = create(bridge, "again", %{signature: "question -> new"})
    assert {:ok, %{"new" => _}} = run(bridge, "again", %{question: "?"})
  end

  test "a wrong definition names the field, and changes nothing", %{bridge: bridge} do
    {:ok, _} = create(bridge, "kept")
    wrong = %{signature: "question -> answer: strng"}
    assert {:error, text} = create(bridge, "kept", wrong)
    assert text =~ "answer" and text =~ "strng"
    assert {:ok, %{"answer" => _}} = run(bridge, "kept", %{question: "?"})
  end

  test "inputs that are missing or misspelt are named", %{bridge: bridge} do
    {:ok, _} = create(bridge, "inputs")
    assert {:error, text} = run(bridge, "inputs", %{})
    assert text =~ "question"
    assert {:error, text} = run(bridge, "inputs", %{question: "?", qustion: "?"})
    assert text =~ "qustion"
  end

  test "an LM, an adapter, settings: of a program, or of one call", %{bridge: bridge} do
    args = %{lm: script([%{answer: "mine"}]), adapter: "json", config: %{temperature: 0.5}}
    {:ok, _} = create(bridge, "own", args)
    assert run(bridge, "own", %{question: "?"}) == {:ok, %{"answer" => "mine"}}
    call = %{lm: script([%{answer: "of the call"}]), config: %{temperature: 0.1}}

    assert execute(bridge, "own", %{question: "?"}, call) ==
             {:ok, %{"answer" => "of the call"}}
  end

  test "a budget that is spent ends the run, with what it took", %{bridge: bridge} do
    tools = [%{name: "look", args: %{query: %{type: "str"}}}]
    {:ok, _} = create(bridge, "spends", %{program_type: "react", tools: tools})
    args = %{program_id: "spends", inputs: %{question: "?"}}
    opts = [budget: [lm_calls: 1], tools: %{look: fn _ -> "x" end}]

    assert {:error, %Error{type: :budget_spent, meta: %{"budget" => %{"lm_calls" => 1}}}} =
             Bridge.request(bridge, :execute_program, args, opts)
  end

  test "with attempts the LM is asked again about an answer that does not fit", %{bridge: bridge} do
    answers = %{"did not fit" => %{answer: "Rome", population: 59}, "*" => "I do not know."}
    args = %{signature: "question -> answer, population: int", adapter: "json"}
    {:ok, _} = create(bridge, "fits", Map.put(args, :lm, script(answers)))
    assert {:error, text} = run(bridge, "fits", %{question: "Italy?"})
    assert text =~ "answer"

    assert execute(bridge, "fits", %{question: "Italy?"}, %{attempts: 2}) ==
             {:ok, %{"answer" => "Rome", "population" => 59}}
  end

  test "a list of inputs is one call, with each result in its place", %{bridge: bridge} do
    {:ok, _} = create(bridge, "many")
    inputs = [%{question: "one"}, %{qustion: "two"}, %{question: "three"}]
    assert {:ok, %{"results" => [first, second, third]}} = run(bridge, "many", inputs)
    assert %{"success" => true, "result" => %{"answer" => _}} = first
    assert %{"success" => false, "error_type" => "invalid_args"} = second
    assert %{"success" => true} = third
  end

  test "a state that was read is what the next definition starts from", %{bridge: bridge} do
    demos = [%{question: "1+1", answer: "2"}]
    {:ok, _} = create(bridge, "taught", %{demos: demos})
    ask = %{program_ids: ["taught"], state: true}
    {:ok, %{"details" => [%{"state" => state}]}} = Bridge.call(bridge, :list_programs, ask)
    {:ok, _} = create(bridge, "pupil", %{state: state})
    ask = %{program_ids: ["pupil"], state: true}

    assert {:ok, %{"details" => [%{"state" => ^state}]}} =
             Bridge.call(bridge, :list_programs, ask)

    assert inspect(state) =~ "1+1"
  end

  test "a program as a module takes and gives its own types", %{bridge: bridge} do
    {:ok, _} = Bridge.call(bridge, :create_program, Summary.definition())

    assert {:ok, %Summary{summary: text, mood: mood}} =
             Summary.run([ticket: "I was charged twice!"], server: bridge)

    assert is_binary(text) and mood in [:calm, :angry]
  end
end
