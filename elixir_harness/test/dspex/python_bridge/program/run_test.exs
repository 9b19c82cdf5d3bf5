defmodule DSPex.ProgramRunTest do
  @moduledoc "Programs as modules, run by real peers, through a bridge and through a pool."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.Test.{Address, Triage}

  @moduletag timeout: 120_000

  defmodule Stock do
    def find(%{"sku" => sku}), do: %{sku: sku, in_stock: 3}
  end

  defmodule Agent do
    use DSPex.PythonBridge.Program,
      program_type: :react,
      signature: "question -> answer",
      options: [max_iters: 3],
      tools: [
        stock: [
          description: "How many there are.",
          args: [sku: :string],
          function: &DSPex.ProgramRunTest.Stock.find/1
        ]
      ]
  end

  defmodule Calling do
    use DSPex.PythonBridge.Program,
      signature: [inputs: [question: :string], outputs: [answer: :string, sure: :boolean]],
      tools: [
        stock: [
          parameters: %{
            type: "object",
            properties: %{sku: %{type: "string"}},
            required: ["sku"]
          },
          function: &DSPex.ProgramRunTest.Stock.find/1
        ]
      ]
  end

  defmodule Served do
    use DSPex.PythonBridge.Program,
      id: "served",
      server: DSPex.ProgramRunTest.Named,
      signature: "question -> answer"
  end

  defmodule Uncreated do
    use DSPex.PythonBridge.Program, signature: "question -> answer"
  end

  defmodule Everything do
    use DSPex.PythonBridge.Program,
      signature: [
        inputs: [
          triage: Triage,
          on: :date,
          size: {:enum, [:small, :large]},
          past: :history,
          home: {:optional, Address},
          more: :map,
          source: {:optional, :document}
        ],
        outputs: [
          a: :string,
          b: {:integer, min: 1, max: 5},
          c: {:float, "a number"},
          d: {:map, :boolean},
          e: :any,
          f: :time,
          g: :datetime,
          h: :naive_datetime,
          i: :uuid,
          j: {:enum, [1, 2]},
          k: {{:list, {:optional, :string}}, max: 3},
          l: {:optional, %{m: {:list, Address}, n: {:optional, {:enum, [:x, :y]}}}},
          o: {:optional, :date},
          p: :reasoning,
          q: {:code, "elixir"},
          r: {:list, :citations}
        ]
      ],
      demos: [[on: ~D[2026-01-01], a: "x"]]
  end

  @answer %{
    reasoning: "They were charged twice.",
    team: "billing",
    size: "large",
    urgent: true,
    due: "2026-03-01",
    reply_to: %{street: "Mill Lane", city: "Leeds"},
    items: [%{sku: "a", count: 2}, %{sku: "b"}],
    phone: nil
  }
  @triage %Triage{
    reasoning: "They were charged twice.",
    team: "billing",
    size: :large,
    urgent: true,
    due: ~D[2026-03-01],
    reply_to: %Address{street: "Mill Lane", city: "Leeds"},
    items: [%{sku: "a", count: 2}, %{sku: "b", count: nil}],
    phone: nil
  }

  @lm [model: "offline/script", answers: %{"*" => @answer}]
  @bridge __MODULE__.Shared
  @modules [Triage, Everything, Agent, Calling]

  setup_all do
    start_supervised!({Bridge, real_opts(name: @bridge)})

    for module <- @modules,
        do: {:ok, _} = Bridge.call(@bridge, :create_program, module.definition(), 60_000)

    :ok
  end

  ## Runs

  test "a run gives a struct of the module, with atoms, dates and structs in it" do
    assert Triage.run(%{ticket: "Twice!"}, server: @bridge, lm: @lm) == {:ok, @triage}
    # Keys may be strings, and inputs a keyword list.
    assert Triage.run(%{"ticket" => "Twice!"}, server: @bridge, lm: @lm) == {:ok, @triage}

    assert Triage.run([ticket: "Twice!"], server: @bridge, lm: @lm, timeout: 30_000) ==
             {:ok, @triage}

    assert {:ok, @triage, %{"lm_calls" => 1}} =
             Triage.run([ticket: "Twice!"], server: @bridge, lm: @lm, meta: true)

    both = %{@triage | completions: [@triage, @triage]}
    assert Triage.run([ticket: "Twice!"], server: @bridge, lm: @lm, config: [n: 2]) == {:ok, both}
  end

  test "inputs may have structs, dates and atoms; every type is one that the peer takes" do
    inputs = [
      triage: @triage,
      on: ~D[2026-03-01],
      size: :small,
      past: [%{on: "2026-01-01", a: "x"}],
      home: %Address{street: "Mill Lane", city: "Leeds"},
      more: %{at: ~U[2026-03-01 10:00:00Z], of: [%Address{street: "x", city: "y"}]}
    ]

    assert {:ok, %Everything{b: b, c: c, d: d, f: %Time{}, g: %DateTime{}, j: j} = all} =
             Everything.run(inputs, server: @bridge)

    assert b in 1..5 and is_float(c) and is_map(d) and j in [1, 2]
    assert %{h: %NaiveDateTime{}, k: [_ | _]} = all
    # The LM, which repeats its inputs, was shown the fields of the structs.
    assert all.a =~ "Mill Lane" and all.a =~ "billing" and not (all.a =~ "none")

    assert {:error, %Error{type: :invalid_args, message: message}} =
             Everything.run(Keyword.put(inputs, :size, :medium), server: @bridge)

    assert message =~ "inputs.size: "
  end

  test "a list of inputs is a batch: each succeeds or fails by itself" do
    assert {:ok, [{:ok, @triage}, {:error, error}, {:ok, @triage}]} =
             Triage.run([%{ticket: "a"}, [tiket: "b"], %{"ticket" => "c"}],
               server: @bridge,
               lm: @lm,
               max_concurrency: 1
             )

    assert %Error{type: :invalid_args, message: "inputs.tiket: unknown field" <> _} = error
  end

  test "a stream has the fields as atoms, and ends with the struct" do
    elements = Enum.to_list(Triage.stream([ticket: "a"], server: @bridge, lm: @lm))
    chunks = for {:chunk, :reasoning, text} <- elements, do: text
    assert Enum.join(chunks) == @triage.reasoning
    assert {:ok, @triage, %{"lm_calls" => 1}} = List.last(elements)

    assert [{:item, 0, {:ok, @triage}}, {:ok, [{:ok, @triage}], %{}}] =
             Enum.to_list(Triage.stream([%{ticket: "a"}], server: @bridge, lm: @lm))

    assert [error: %Error{message: "inputs.tiket: unknown field; inputs.ticket: missing" <> _}] =
             Enum.to_list(Triage.stream([tiket: "a"], server: @bridge))

    assert [error: %Error{type: :program_not_found}] =
             Enum.to_list(Uncreated.stream([question: "a"], server: @bridge))
  end

  ## Errors

  test "unknown and missing inputs are refused before anything is sent" do
    # Nobody is asked: there is no such bridge.
    for {inputs, text} <- [
          {%{tiket: "a"}, "inputs.tiket: unknown field; inputs.ticket: missing"},
          {[], "inputs.ticket: missing; expected ticket, sender"},
          {%{:ticket => "a", {1, 2} => "b"}, ~s(inputs."{1, 2}": unknown field)},
          {%{:ticket => "a", <<255>> => "b"}, "inputs.<<255>>: unknown field"},
          {%Address{}, "inputs.city: unknown field; inputs.street: unknown field"},
          {"a", "inputs: expected a map or a keyword list"},
          {[%{} | 1], "inputs: expected a proper list"}
        ] do
      assert {:error, %Error{type: :invalid_args, message: message}} =
               Triage.run(inputs, server: NoSuchBridge)

      assert message =~ text
    end
  end

  test "a wrong option is named" do
    for {opts, text} <- [
          {[sever: Pool], "unknown option :sever, did you mean :server?"},
          {[meta: 1], ":meta: expected true or false, got 1"},
          {[retry: 1], ":retry: expected true or false, got 1"}
        ] do
      assert {:error, %Error{type: :invalid_request, message: ^text}} =
               Triage.run([ticket: "a"], [server: NoSuchBridge] ++ opts)
    end

    assert [error: %Error{message: "unknown option :meta" <> _}] =
             Enum.to_list(Triage.stream([ticket: "a"], meta: true))
  end

  test "an answer of another program with the same id does not fit; the error has the costs" do
    other = %{id: "served", signature: "question -> answer: int"}
    {:ok, _} = Bridge.call(@bridge, :create_program, other, 60_000)

    assert {:error, %Error{type: :output_invalid, message: message, meta: meta}} =
             Served.run([question: "a"], server: @bridge)

    assert message ==
             "the answer did not fit DSPex.ProgramRunTest.Served: answer: expected a string"

    assert %{"lm_calls" => 1} = meta
  end

  ## Servers

  test "a pool, or a bridge, is found by its name, and that of the module is the default" do
    opts = [name: DSPex.ProgramRunTest.Named, pool_size: 1, programs: [Served]]
    start_supervised!({Pool, real_opts(opts)})
    assert {:ok, %Served{answer: "echo: why"}} = Served.run(question: "why")

    assert {:ok, %Served{}, _meta} =
             Served.stream(question: "why") |> Enum.to_list() |> List.last()

    # A bridge of the pool, for example.
    {:ok, bridge} = Pool.checkout(DSPex.ProgramRunTest.Named)
    assert {:ok, %Served{answer: "echo: why"}} = Served.run([question: "why"], server: bridge)
  end

  ## Tools

  test "the functions of the tools belong to the module, unless a run has its own" do
    assert {:ok, %Agent{answer: "echo: " <> _, trajectory: %{"observation_0" => seen}}} =
             Agent.run([question: "Shirts?"], server: @bridge)

    assert %{"in_stock" => 3} = seen

    for name <- [:stock, "stock"] do
      tools = %{name => fn _args -> "none" end}

      assert {:ok, %Agent{trajectory: %{"observation_0" => "none"}}} =
               Agent.run([question: "Shirts?"], server: @bridge, tools: tools)
    end
  end

  test "of an LM that only calls tools the outputs are nil" do
    assert {:ok, %Calling{tool_calls: [%{"name" => "stock", "result" => %{"in_stock" => 3}}]}} =
             Calling.run([question: "Shirts?"], server: @bridge)
  end
end
