defmodule DSPex.ProgramDefinitionTest do
  @moduledoc "What `use DSPex.PythonBridge.Program` makes of its options, and what it refuses."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Program

  doctest Program.Refusal
  doctest Program.StringSignature

  defmodule Address do
    defstruct [:street, :city, note: "none"]
    def __dspex__(:fields), do: [street: :string, city: {:string, "without the postal code"}]
  end

  defmodule NotInStruct do
    defstruct [:street]
    def __dspex__(:fields), do: [street: :string, town: :string]
  end

  defmodule Raising do
    defstruct [:a]
    def __dspex__(:other), do: []
  end

  defmodule Undeclared do
    defstruct [:a]
  end

  defmodule Stock do
    def find(%{"sku" => sku}), do: %{sku: sku}
  end

  # A module of its own for each: their names are those of the programs.
  defp module(options, more \\ "") do
    name = "DSPex.ProgramDefinitionTest.Made#{System.unique_integer([:positive])}"

    alias_of =
      "alias #{inspect(__MODULE__)}.{Address, NotInStruct, Raising, Undeclared, Stock}"

    code = """
    defmodule #{name} do
      #{alias_of}
      _ = {Address, NotInStruct, Raising, Undeclared, Stock}
      use DSPex.PythonBridge.Program,
        #{options}
      #{more}
    end
    """

    {[{module, _beam}], warnings} =
      Code.with_diagnostics(fn -> Code.compile_string(code, "triage.ex") end)

    assert warnings == []
    on_exit(fn -> :code.delete(module) && :code.purge(module) end)
    module
  end

  defp signature(inputs, outputs), do: "signature: [inputs: [#{inputs}], outputs: [#{outputs}]]"

  defp definition(outputs), do: module(signature("q: :string", outputs)).definition()

  defp type(type) do
    assert %{signature: %{outputs: [%{name: "a", type: type}]}} = definition("a: #{type}")
    type
  end

  ## Definitions

  test "the definition has the arguments of create_program; the id is the module's name" do
    module =
      module("""
      program_type: :chain_of_thought,
      signature: [inputs: [ticket: {:string, "as the customer wrote it"}], outputs: [urgent: :boolean]],
      instructions: "Route the ticket.", adapter: :json, lm: [model: "openai/gpt-4o-mini", temperature: 0.1],
      config: [], options: [], demos: [[ticket: "Help!", urgent: true, reasoning: "It shouts."]]
      """)

    assert module.definition() == %{
             id: inspect(module),
             program_type: "chain_of_thought",
             signature: %{
               inputs: [
                 %{name: "ticket", type: "string", description: "as the customer wrote it"}
               ],
               outputs: [%{name: "urgent", type: "boolean"}],
               instructions: "Route the ticket."
             },
             adapter: :json,
             lm: %{model: "openai/gpt-4o-mini", temperature: 0.1},
             config: %{},
             options: %{},
             demos: [%{ticket: "Help!", urgent: true, reasoning: "It shouts."}]
           }

    assert JSON.encode!(module.definition())
  end

  test "the id can be chosen, and the definition overridden" do
    signature = signature("q: :string", "a: :string")
    assert %{id: "triage"} = module(~s(id: "triage", #{signature})).definition()

    module =
      module(signature, """
      def definition, do: Map.put(super(), :lm, "offline/echo")
      """)

    assert %{lm: "offline/echo", program_type: "predict"} = module.definition()
  end

  test "types by Elixir terms are those of the peer's contract" do
    for name <-
          ~w(string integer float boolean map any image audio file history reasoning code document),
        do: assert(type(":#{name}") == name)

    assert type("{:enum, [:low, :high]}") == %{enum: ["low", "high"]}
    assert type("{:enum, [1, 2]}") == %{enum: [1, 2]}
    assert type("{:list, :integer}") == %{type: "array", items: %{type: "integer"}}
    assert type("{:map, :float}") == %{type: "object", additionalProperties: %{type: "number"}}
    assert type("{:optional, :string}") == %{anyOf: [%{type: "string"}, %{type: "null"}]}
    assert type("{:optional, {:optional, :string}}") == type("{:optional, :string}")
    assert type(":date") == %{type: "string", format: "date"}
    assert type(":time") == %{type: "string", format: "time"}
    assert type(":datetime") == %{type: "string", format: "date-time"}
    assert type(":naive_datetime") == %{type: "string", format: "date-time"}
    assert type(":uuid") == %{type: "string", format: "uuid"}
    assert type("{:list, :image}") == "list[image]"
    assert type(~s({:optional, {:code, "c++"}})) == ~s(Optional[code["c++"]])
    assert type("{:optional, {:map, :file}}") == "Optional[dict[str, file]]"
  end

  test "a field has a description and limits" do
    assert [
             %{name: "a", type: %{type: "integer", minimum: 1, maximum: 5}, description: "stars"},
             %{name: "b", type: %{type: "array", items: %{}, maxItems: 3}},
             %{name: "c", type: %{anyOf: [%{type: "string", minLength: 2}, %{type: "null"}]}},
             %{name: "d", type: "map", description: "free"}
           ] =
             definition("""
             a: {:integer, description: "stars", min: 1, max: 5}, b: {{:list, :any}, max: 3},
             c: {{:optional, :string}, min: 2}, d: {:map, description: "free"}
             """).signature.outputs
  end

  test "nested maps and structs are objects, which take no other names as inputs" do
    person = %{
      type: "object",
      properties: %{
        age: %{anyOf: [%{type: "integer"}, %{type: "null"}]},
        name: %{type: "string", description: "in full"}
      },
      required: ["name"]
    }

    term = ~s(%{name: {:string, "in full"}, age: {:optional, :integer}})
    assert type(term) == person

    address = %{
      type: "object",
      title: "Address",
      properties: %{
        street: %{type: "string"},
        city: %{type: "string", description: "without the postal code"}
      },
      required: ["street", "city"]
    }

    assert type("Address") == address

    assert [%{type: given}, %{type: items}] =
             module(signature("p: #{term}, a: {:list, Address}", "b: :string")).definition().signature.inputs

    assert given == Map.put(person, :additionalProperties, false)
    assert items == %{type: "array", items: Map.put(address, :additionalProperties, false)}
  end

  test "tools are told to the peer with their arguments' types, without the functions" do
    module =
      module("""
      program_type: "react", #{signature("q: :string", "a: :string")},
      tools: [
        stock: [description: "How many there are.", args: [sku: {:string, "the article"}, size: {:enum, [:s, :m]}],
                function: {&Stock.find/1, repeat: false}],
        now: [],
        find: [args: [
          most: {:integer, default: 10, max: 50}, size: {{:enum, [:s, :m]}, default: :s},
          since: {:date, default: ~D[2026-01-31]}, page: {:integer, optional: true, description: "from 1 on"},
          lang: {:optional, :string}, near: {Address, default: %Address{street: "A", city: "B"}}
        ]],
        any: [parameters: %{type: "object", properties: %{q: %{type: "string"}}, required: ["q"]}]
      ]
      """)

    assert [stock, %{name: "now", args: %{}}, %{name: "find", args: args}, any] =
             module.definition().tools

    assert stock == %{
             name: "stock",
             description: "How many there are.",
             args: %{
               sku: %{type: "string", description: "the article"},
               size: %{type: %{enum: ["s", "m"]}}
             }
           }

    assert %{
             most: %{type: %{type: "integer", maximum: 50}, default: 10},
             size: %{type: %{enum: ["s", "m"]}, default: :s},
             since: %{default: ~D[2026-01-31]},
             page: %{type: "integer", optional: true, description: "from 1 on"},
             near: %{default: %{"street" => "A", "city" => "B"}},
             # The peer makes it null where it is left out.
             lang: %{type: %{anyOf: [%{type: "string"}, %{type: "null"}]}}
           } = args

    parameters = %{type: "object", properties: %{q: %{type: "string"}}, required: ["q"]}
    assert any == %{name: "any", parameters: parameters}
  end

  ## Structs

  test "the struct has the outputs and what the program type adds" do
    keys = fn more ->
      module = module(signature("q: :string", "a: :string, b: :integer") <> ", " <> more)
      module.__struct__() |> Map.from_struct() |> Map.keys() |> Enum.sort()
    end

    tools = "tools: [now: []]"
    assert keys.(~s(program_type: "predict")) == [:a, :b, :completions]
    assert keys.(tools) == [:a, :b, :tool_calls]
    assert keys.("program_type: :chain_of_thought") == [:a, :b, :completions, :reasoning]

    assert keys.("program_type: :react, #{tools}") ==
             [:a, :b, :history, :reasoning, :termination_reason, :trajectory]

    # The conversation, once, under its name.
    past =
      &module(signature("q: :string, past: :history", "a: :string") <> ", program_type: " <> &1)

    for type <- [":predict", ":best_of_n", ":react, #{tools}"] do
      assert %{past: nil} = struct = past.(type).__struct__()
      refute is_map_key(struct, :history)
    end

    refute is_map_key(past.(":rlm").__struct__(), :past)
    assert keys.("program_type: :best_of_n") == [:a, :b]

    assert keys.("program_type: :refine, options: [module: :chain_of_thought]") == [
             :a,
             :b,
             :reasoning
           ]

    assert keys.("program_type: :multi_chain_comparison") == [:a, :b, :rationale]
    assert keys.("program_type: :rlm") == [:a, :b, :final_reasoning, :trajectory]
    assert keys.(~s(program_type: "my_app.rag:RAG")) == [:a, :b]

    assert %{reasoning: nil} =
             module(
               "program_type: :chain_of_thought, " <>
                 signature("q: :string", "reasoning: :string")
             ).__struct__()
  end

  test "a module says its outputs as a type of other programs" do
    inner =
      module(signature("q: :string", ~s(team: {:enum, ["a", "b"]}, n: {:integer, "how many"})))

    assert inner.__dspex__(:fields) == [team: {:enum, ["a", "b"]}, n: {:integer, "how many"}]

    assert %{type: %{properties: %{team: %{enum: ["a", "b"]}}, required: ["team", "n"]}} =
             hd(
               module(signature("t: #{inspect(inner)}", "a: :string")).definition().signature.inputs
             )
  end

  ## Refusals

  @refused [
    # Names.
    {"inputs: [q: :string, q: :string], outputs: [a: :string]",
     "signature.inputs.q: there twice"},
    {"inputs: [q: :string], outputs: [q: :string]",
     "signature.outputs.q: an input has the same name"},
    {"inputs: [q: :string], outputs: []", "signature.outputs: expected at least one field"},
    {"inputs: [q: :string], output: [a: :string]",
     "signature: unknown option :output, did you mean :outputs?"},
    {"inputs: [config: :map], outputs: [a: :string]",
     "signature.inputs.config: reserved by DSPy"},
    {"inputs: [q: :string], outputs: [class: :string]",
     "signature.outputs.class: a keyword of Python"},
    # Types.
    {"inputs: [q: :string], outputs: [a: %{b: {:list, %{c: :owl}}}]",
     "signature.outputs.a.b.c: unknown type :owl; expected one of :string"},
    {~s(inputs: [q: :string], outputs: [a: {:enum, [:a, "b"]}]),
     "signature.outputs.a: expected an enum of strings"},
    {"inputs: [q: :string], outputs: [a: %{photo: :image}]",
     "signature.outputs.a: :image is the type of a field"},
    # Options of a field.
    {~s(inputs: [q: :string], outputs: [a: {:string, desc: "b"}]),
     "signature.outputs.a: unknown option :desc of a field"},
    {"inputs: [q: :string], outputs: [a: {:string, min: -1}]",
     "signature.outputs.a: min: expected a number, of a length 0 or more, got -1"},
    # Structs.
    {"inputs: [q: :string], outputs: [a: MyApp.Nowhere]",
     "signature.outputs.a: there is no module MyApp.Nowhere"},
    {"inputs: [q: :string], outputs: [a: __MODULE__]",
     "contains itself, which a type here cannot"},
    {"inputs: [q: :string], outputs: [a: NotInStruct]",
     "signature.outputs.a: DSPex.ProgramDefinitionTest.NotInStruct.town: its struct has no such field"},
    {"inputs: [q: :string], outputs: [a: Raising]",
     "DSPex.ProgramDefinitionTest.Raising raised ** (FunctionClauseError)"},
    {"inputs: [q: :string], outputs: [a: Undeclared]",
     "Undeclared is not a type: it exports no __dspex__/1, and is no embedded schema of Ecto"}
  ]

  test "a wrong signature is an error of the compiler at the place of the use, which names the field" do
    for {signature, text} <- @refused do
      error = assert_raise CompileError, fn -> module("signature: [#{signature}]") end
      assert error.file =~ "triage.ex" and error.line == 4
      assert Exception.message(error) =~ "DSPex.ProgramDefinitionTest.Made"
      assert Exception.message(error) =~ text
    end
  end

  test "so is any other wrong option" do
    for {options, text} <- [
          {"signatur: []", "unknown option :signatur, did you mean :signature?"},
          {"id: :x", "signature: expected [inputs: […], outputs: […]], or a string, got nil"},
          {~s(signature: "question"), ~s(signature: expected exactly one "->")},
          {~s(signature: "q -> a: Union[int, str]"),
           ~s(signature.outputs.a: "Union[int, str]" is not one of str, int)},
          {~s(signature: "q -> a", program_type: "chain_of_thougth"),
           ~s(program_type: unknown type "chain_of_thougth"; expected one of predict)},
          {~s(signature: "q -> trajectory", program_type: :react),
           "signature.outputs.trajectory: react has a field of its own with this name"},
          {~s(signature: "q -> tool_calls", tools: [now: []]),
           "signature.outputs.tool_calls: with tools, a field of DSPy's own"},
          {~s(signature: "q -> a", tools: [now: [fun: &Stock.find/1]]),
           "tools.now: unknown option :fun"},
          {~s(signature: "q -> a", tools: [now: [function: fn _ -> 1 end]]),
           "tools.now.function: expected one of a module, such as &MyApp.Stock.find/1"},
          # What the peer would refuse when the program is created.
          {~s(signature: "q -> a", program_type: :react), "tools: react needs at least one"},
          {~s(signature: "q -> a", adapter: "jsn"),
           ~s(adapter: unknown adapter "jsn"; expected one of chat, json, xml, or)},
          {~s(signature: "q -> a", adapter: [name: "two_step", extraction_modell: "x"]),
           ~s(adapter.extraction_modell: unknown name, did you mean "extraction_model"?)},
          {~s(signature: "q -> a", lm: [modell: "x"]),
           ~s(lm.modell: unknown name, did you mean "model"?)},
          {~s(signature: "q -> a", config: %{"temprature" => 1}),
           ~s(config.temprature: unknown name, did you mean "temperature"?)},
          {~s(signature: "q -> a", program_type: :refine, options: [treshold: 1]),
           ~s(options.treshold: unknown name, did you mean "threshold"?)},
          {~s(signature: "q -> a", demos: [[q: "x", b: "y"]]), "demos[0].b: unknown name"},
          {~s(signature: "q -> a", demos: [q: "x"]),
           "demos: expected a list of keyword lists or maps"},
          {~s(signature: "q -> a", demos: ["x"]), "demos[0]: expected a keyword list or a map"},
          {~s(signature: "q -> a", tools: [now: [args: [q: :string], parameters: %{}]]),
           "tools.now: has :args and :parameters; expected one of them"},
          {~s(signature: [inputs: [q: :string], outputs: [m: {:list, {:enum, [:calm]}}]], demos: [%{m: [:sad]}]),
           ~s(demos[0].m[0]: expected "calm")}
        ] do
      error = assert_raise CompileError, fn -> module(options) end
      assert Exception.message(error) =~ text
    end
  end
end
