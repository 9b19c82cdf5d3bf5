defmodule DSPex.PythonBridge.Programs.DeclaredTest do
  @moduledoc "Which lists are declarations of programs, and which of these can be sent to a peer."

  use ExUnit.Case, async: true

  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.{Bridge, Error, Options, Pool, Programs}
  alias DSPex.PythonBridge.Programs.Declared
  alias DSPex.PythonBridge.Supervisor, as: BridgeSupervisor

  doctest Declared

  defmodule Triage do
    def definition, do: %{id: "triage", signature: "ticket -> team"}
  end

  defmodule Raises do
    def definition, do: raise(ArgumentError, "sk-0123456789abcdef")
  end

  defmodule Exits do
    def definition, do: exit(:sk_0123456789abcdef)
  end

  defmodule NoMap do
    def definition, do: {:ok, %{id: "a"}}
  end

  @key "sk-0123456789abcdef"

  @refused [
    {:none, "expected a list of maps, keyword lists and modules"},
    {%{id: "qa"}, "expected a list of maps, keyword lists and modules"},
    {[%{id: "qa"} | :more], "expected a list of maps, keyword lists and modules"},
    {[id: "qa", signature: "q -> a"], "entry 1: expected a map or keyword list"},
    {["qa"],
     "entry 1: expected a map or keyword list of create_program's arguments, or a module"},
    {[%{id: "qa"}, []], "entry 2: expected a map or keyword list"},
    {[nil], "entry 1 (nil): expected a map or keyword list"},
    {[%URI{}], "entry 1: expected a map or keyword list"},
    {[[{"id", "qa"}]], "entry 1: expected a map or keyword list"},
    {[%{id: "qa"}, %{signature: @key}], "entry 2: it has no id"},
    {[%{id: nil, lm: @key}], "entry 1: id: expected a string"},
    {[%{id: 5}], "entry 1: id: expected a string"},
    {[%{id: <<255>>}], "entry 1: id: expected a string"},
    {[NoSuchModule], "entry 1 (NoSuchModule): there is no such module with a definition/0"},
    {[Enum], "entry 1 (Enum): there is no such module with a definition/0"},
    {[Raises], "entry 1 (#{inspect(Raises)}): its definition/0 raised ArgumentError"},
    {[Exits], "entry 1 (#{inspect(Exits)}): its definition/0 ended with exit"},
    {[NoMap], "entry 1 (#{inspect(NoMap)}): its definition/0: expected a map or keyword list"},
    {[%{id: "a"}, [id: :b], %{"id" => "b"}], "entry 3: b is declared twice"},
    {[Triage, %{id: "triage"}], "entry 2: triage is declared twice"}
  ]

  test "maps, keyword lists and modules are declarations" do
    declared = [%{"id" => "a"}, [id: :b, signature: "q -> a"], Triage]

    assert Declared.new(declared) ==
             {:ok,
              [
                {"a", %{"id" => "a"}},
                {"b", %{"id" => :b, "signature" => "q -> a"}},
                {"triage", %{"id" => "triage", "signature" => "ticket -> team"}}
              ]}

    assert Declared.new([]) == {:ok, []}
  end

  test "what cannot be one refuses the options of a bridge, a pool and a supervisor" do
    for {programs, text} <- @refused,
        start <- [&Bridge.start_link/1, &Pool.start_link/1, &BridgeSupervisor.start_link/1] do
      assert {:error, %ArgumentError{message: message}} =
               start.(name: :refused, programs: programs)

      assert message =~ ": :programs: " <> text
      refute message =~ "0123456789"
    end
  end

  test "in the options they are sealed, and no inspection shows them" do
    programs = [%{id: "qa", lm: %{model: "openai/x", api_key: @key}}]
    {:ok, options} = Options.new(programs: programs)
    assert [{"qa", %{"lm" => %{api_key: @key}}}] = options.programs.()

    for term <- [
          options,
          Bridge.child_spec(programs: programs),
          Pool.child_spec(programs: programs),
          BridgeSupervisor.child_spec(programs: programs),
          BridgeSupervisor.child_spec(bridge: [programs: programs]),
          Pool.Options.new([programs: programs], Pool)
        ] do
      refute inspect(term, limit: :infinity) =~ @key
    end
  end

  describe "one that cannot be sent to a peer" do
    # Where the value is, and of which kind; never the value.
    @no_json [
      {%{lm: %{api_key: {:system, @key}}}, "lm.api_key: a tuple has no JSON form"},
      {%{signature: %{inputs: [%{name: "q", type: &is_map/1}]}},
       "signature.inputs[0].type: a function has no JSON form"},
      {%{demos: [%{q: @key, r: {@key}}]}, "demos[0].r: a tuple has no JSON form"},
      {%{demos: [1 | 2]}, "demos: it has no JSON form"},
      {%{lm: %{{1, 2} => @key}}, "lm: expected a map whose keys are strings"},
      {%{lm: %URI{host: @key}}, "lm: a struct URI has no JSON form"},
      {%{signature: @key <> <<255>>}, "signature: a string that is not valid UTF-8"}
    ]

    test "is in the table with the reason, which names the place and shows no value" do
      for {args, text} <- @no_json do
        {:ok, declared} = Declared.new([Map.put(args, :id, "qa")])

        log =
          capture_log(fn ->
            table = Declared.store(declared, {:pool, MyPool}, 10_000)

            assert %{"qa" => %Error{type: :invalid_args} = error} =
                     Programs.Store.undeclared(table)

            assert error.message =~ "program qa could not be loaded: args." <> text
            refute error.message =~ @key
            assert Programs.Store.definitions(table) == []
          end)

        assert log =~ "pool MyPool: program qa could not be loaded: args." <> text
        refute log =~ @key
      end
    end

    test "is too large for a frame" do
      {:ok, declared} = Declared.new([%{id: "large", signature: String.duplicate("q", 10_000)}])

      log =
        capture_log(fn ->
          table = Declared.store(declared, {:bridge, MyBridge}, 10_000)
          assert %{"large" => %Error{type: :frame_too_large}} = Programs.Store.undeclared(table)
        end)

      assert log =~ ~r/program large .* the request has 10\d\d\d bytes; max_frame_bytes is 10000/
    end
  end
end
