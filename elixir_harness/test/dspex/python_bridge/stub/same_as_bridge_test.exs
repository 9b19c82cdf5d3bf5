defmodule DSPex.PythonBridge.Stub.SameAsBridgeTest do
  @moduledoc """
  A stub gives what a real bridge, and a real pool, give: each case is run against both, and the results are compared.
  """

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Bridge, Error, Evaluate, Pool, Stub}
  alias DSPex.Test.{Helpers, SilentLM}

  @moduletag :tmp_dir

  @agent %{
    id: "agent",
    program_type: "react",
    signature: "question -> answer",
    tools: [%{name: "search", args: %{query: %{type: "str"}}}]
  }
  # Answers, and what is expected.
  @pairs [
    {"The Rome!", "rome"},
    {"a an the", ""},
    {"Lima is  the\tcapital, an old one", "the old capital: Lima; Lima"},
    {"theme a-way athens", "THEME away Athens"},
    {"É\u00a0cole\u2003x", "e\u0301 COLE\x1cx"},
    {"á b", "b"},
    {"ΟΔΟΣ", "οδος"},
    {"ΟΔΟΣ", "οδοσ"},
    {"x_a_y İ ẞ", "xay i̇ ß"},
    {"a1 ²a 一a", "A1 ²A 一A"},
    {"12", "1 2"},
    {"", ""},
    {"the", "nothing"},
    {"left right", "right left"},
    {"one one two", "one three one"},
    {"一a ²a", "一 ²"},
    {"áa", "é"}
  ]
  @values [1, 1.0, true, nil, [1, "a"], %{"a" => [nil]}, "one", 0.5]
  @steps [
    %{next_thought: "t", next_tool_name: "search", next_tool_args: %{query: "Elixir"}},
    %{next_thought: "t", next_tool_name: "finish", next_tool_args: %{}},
    %{reasoning: "r", answer: "A language."}
  ]

  setup_all do
    real = start_supervised!({Pool, Helpers.real_opts(name: __MODULE__.Real, pool_size: 1)})
    stub = start_supervised!({Stub, name: __MODULE__.Stub, answers: &answer/2})
    assert {:ok, _} = Pool.call(real, :ping, %{}, 30_000)

    # For all runs of it.
    lm = %{model: "offline/script", answers: Enum.concat(List.duplicate(@steps, 4))}

    slow = %{
      model: "openai/slow",
      api_base: "http://127.0.0.1:#{SilentLM.start()}/v1",
      api_key: "k"
    }

    for server <- [real, stub] do
      create = &assert {:ok, _} = Pool.call(server, :create_program, &1, 60_000)
      create.(%{id: "qa", signature: "question -> answer, certain: bool"})
      create.(%{id: "said", signature: "say -> said", lm: said(for {got, _} <- @pairs, do: got)})
      create.(%{id: "any", signature: "say -> said: Any", lm: said(@values)})
      create.(%{id: "slow", signature: "question -> answer", lm: slow})
      create.(Map.put(@agent, :lm, lm))
    end

    %{both: [__MODULE__.Real.Bridge1, __MODULE__.Stub], pools: [__MODULE__.Real, __MODULE__.Stub]}
  end

  # The n-th of them to the question "#n.".
  defp said(answers) do
    answers =
      for {answer, n} <- Enum.with_index(answers), into: %{}, do: {"##{n}.", %{said: answer}}

    %{model: "offline/script", answers: answers}
  end

  defp answer("qa", %{"question" => question}),
    do: {:ok, %{"answer" => "echo: #{question}", "certain" => true}}

  defp answer("said", %{"say" => say}), do: said(say, for({got, _} <- @pairs, do: got))
  defp answer("any", %{"say" => say}), do: said(say, @values)

  defp answer("slow", _inputs), do: Process.sleep(:infinity)

  defp answer("agent", _inputs) do
    Stub.status("calling tool search")

    case Stub.call_tool("search", %{"query" => "Elixir"}) do
      {:ok, _found} ->
        {:ok, %{"reasoning" => "r", "answer" => "A language.", "trajectory" => %{}}}

      {:error, text} ->
        {:ok, %{"answer" => text}}
    end
  end

  defp said("#" <> say, answers) do
    {n, "."} = Integer.parse(say)
    {:ok, %{"said" => Enum.at(answers, n)}}
  end

  defp same([real, stub], fun) do
    result = timeless(fun.(real))
    assert timeless(fun.(stub)) == result
    result
  end

  # The same of cases that take their time.
  defp same_meanwhile(servers, fun) do
    results = Enum.map(servers, &Task.async(fn -> fun.(&1) end)) |> Task.await_many(30_000)
    same(results, & &1)
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
    test "a run", %{both: both} do
      assert {:ok, %{"answer" => "echo: Why?", "certain" => true}} =
               same(both, &Bridge.call(&1, :execute_program, run(%{question: "Why?"})))
    end

    test "a list of inputs, one of them wrong", %{both: both} do
      inputs = [%{question: "One?"}, %{qestion: "Two?"}, "three", %{question: "Four?"}]

      assert {:ok, %{"results" => results}} =
               same(both, &Bridge.call(&1, :execute_program, run(inputs)))

      assert [true, false, false, true] = Enum.map(results, & &1["success"])
      assert {:ok, %{"results" => []}} = same(both, &Bridge.call(&1, :execute_program, run([])))
    end

    test "the metadata have the same keys", %{both: both} do
      same(both, fn server ->
        assert {:ok, result, meta} =
                 Bridge.request(server, :execute_program, run(%{question: "Why?"}),
                   history: false
                 )

        {result, Enum.sort(Map.keys(meta))}
      end)
    end

    test "a cast, whose reply nobody waits for", %{both: both} do
      same(both, &Bridge.cast(&1, :execute_program, run(%{question: "Why?"})))
      same(both, &Bridge.cast(&1, :execute_program, run(%{question: self()})))
    end

    test "programs that are listed and removed", %{both: both} do
      for id <- ["one", "two"], server <- both do
        Bridge.call(server, :create_program, %{
          id: id,
          signature: "a -> b",
          program_type: "chain_of_thought"
        })
      end

      for args <- [%{program_ids: ["two", "one", "x"]}, %{program_ids: "two"}, %{details: 1}],
          do: same(both, &Bridge.call(&1, :list_programs, args))

      same(both, fn server ->
        {:ok, %{"details" => [one]}} =
          Bridge.call(server, :list_programs, %{details: true, program_ids: ["one"]})

        assert is_float(one["created_at"])
        Map.delete(one, "created_at")
      end)

      for args <- [%{program_id: ["one"]}, %{program_ids: [1]}, %{program_ids: ["one", "x"]}],
          do: same(both, &Bridge.call(&1, :cleanup, args))

      same(both, &Bridge.call(&1, :list_programs, %{program_ids: ["two", "one"]}))
      same(both, &Bridge.call(&1, :cleanup, %{program_ids: ["two"]}))
    end

    test "the keys of the statistics", %{both: both} do
      same(both, fn server ->
        {:ok, stats} = Bridge.call(server, :get_stats)
        keys = &Enum.sort(Map.keys(&1))
        {keys.(stats), keys.(stats["threads"]), keys.(stats["commands"]["create_program"])}
      end)
    end

    test "a ping", %{both: both} do
      same(both, fn server ->
        {:ok, %{"timestamp" => time} = pong} = Bridge.call(server, :ping)
        assert_in_delta time, System.system_time(:second), 60
        Map.delete(pong, "timestamp")
      end)
    end
  end

  describe "a call has the same error:" do
    @wrong [
      {:execute_program, %{}},
      {:execute_program, %{program_id: "qa"}},
      {:execute_program, %{program_id: "", inputs: %{}}},
      {:execute_program, %{program_id: "qa", inputs: "Why?"}},
      {:execute_program, %{program_id: "qa", inputs: %{}}},
      {:execute_program, %{program_id: "qa", inputs: %{qestion: "Why?"}}},
      {:execute_program, %{program_id: "qa", input: %{question: "Why?"}}},
      {:execute_program, %{program_id: "qa", inputs: %{question: "Why?"}, config: 1}},
      {:execute_program, %{program_id: "qa", inputs: %{question: "Why?"}, attempts: 11}},
      {:execute_program, %{program_id: "qa", inputs: %{question: "Why?"}, max_concurrency: 1}},
      {:execute_program, %{program_id: "qa", inputs: [], max_concurrency: 0}},
      {:execute_program, %{program_id: "qa", inputs: [], item_timeout_ms: 0}},
      {:execute, %{}},
      {:optimize, %{}},
      {"list_program", %{}},
      {:create_program, %{}},
      {:create_program, %{id: 1, signature: "a -> b"}},
      {:create_program, %{id: "x"}},
      {:create_program, %{id: "x", signatur: "a -> b"}},
      {:create_program, %{id: "x", signature: 1}},
      {:create_program, %{id: "x", signature: "a"}},
      {:create_program, %{id: "x", signature: "a -> b -> c"}},
      {:create_program, %{id: "x", signature: "a ->"}},
      {:create_program, %{id: "x", signature: "a -> b", lm: 1}},
      {:create_program, %{id: "x", signature: "a -> b", instructions: "Be brief."}},
      {:create_program, %{id: "x", inputs: [%{name: "a"}], outputs: [%{name: "b"}]}},
      {:create_program, %{id: "x", signature: "a -> b", config: []}},
      {:create_program, %{id: "x", signature: "a -> b", options: 1}},
      {:create_program, %{id: "x", signature: "a -> b", program_type: "predikt"}},
      {:create_program, %{id: "x", signature: "a -> b", program_type: "react"}},
      {:create_program, %{id: "x", signature: "a -> _b"}},
      {:create_program, %{id: "x", signature: "a -> dspy_b"}},
      {:create_program, %{id: "x", signature: "a -> a"}},
      {:create_program, %{id: "x", signature: "self -> a"}},
      {:create_program, %{id: "x", signature: "signature -> a"}},
      {:create_program, %{id: "x", signature: "a -> model_dump"}},
      {:create_program, %{id: "x", signature: %{inputs: [], outputs: []}}},
      {:create_program, %{id: "x", signature: %{inputs: [%{name: "a"}]}}},
      {:create_program, %{id: "x", signature: %{input: [%{name: "a"}]}}},
      {:create_program, %{id: "x", signature: %{inputs: ["a"], outputs: [%{name: "b"}]}}},
      {:create_program, %{id: "x", signature: %{inputs: [%{nam: "a"}], outputs: []}}},
      {:create_program,
       %{id: "x", signature: %{inputs: [%{name: "for"}], outputs: [%{name: "b"}]}}},
      {:create_program,
       %{id: "x", signature: %{inputs: [%{type: "str"}], outputs: [%{name: "b"}]}}},
      {:create_program, %{id: "x", signature: %{inputs: [%{name: "a"}], outputs: [%{name: "a"}]}}}
    ]

    for {{command, args}, number} <- Enum.with_index(@wrong) do
      @command command
      @args args
      test "#{number}: #{command} #{inspect(args)}", %{both: both} do
        assert {:error, %Error{}} = same(both, &Bridge.request(&1, @command, @args))
        assert {:error, text} = same(both, &Bridge.call(&1, @command, @args))
        assert is_binary(text)
      end
    end

    test "inputs and arguments without a JSON form", %{both: both} do
      for value <- [{1, 2}, self(), <<255>>, %{{1, 2} => 3}] do
        args = run(%{question: value})

        assert {:error, %Error{type: :invalid_args}} =
                 same(both, &Bridge.request(&1, :execute_program, args))
      end

      same(both, &Bridge.request(&1, :execute_program, run("x"), attempts: 3, tools: %{a: 1}))
      same(both, &Bridge.request(&1, {:a}, %{}))
    end

    test "options that are wrong", %{both: both} do
      for opts <- [
            [timeout: -1],
            [retries: 1],
            [tools: %{a: 1}],
            [traceparent: "x"],
            [on_chunk: 1]
          ] do
        args = run(%{question: "Why?"})

        assert {:error, %Error{type: type}} =
                 same(both, &Bridge.request(&1, :execute_program, args, opts))

        assert type == :invalid_request
      end
    end

    test "a program that there is not: the stub adds what to do", %{both: both, pools: pools} do
      for {servers, module} <- [{both, Bridge}, {pools, Pool}] do
        [real, stub] =
          for server <- servers do
            {:error, text} = module.call(server, :execute_program, run(%{}, "nobody"))
            text
          end

        assert real == "Program not found: nobody"
        assert String.starts_with?(stub, real)
      end
    end

    test "a timeout, and one of the items of a list", %{both: both, pools: pools} do
      args = run(%{question: "Why?"}, "slow")
      assert {:error, :timeout} = same(both, &Bridge.call(&1, :execute_program, args, 100))
      assert {:error, :timeout} = same(pools, &Pool.call(&1, :execute_program, args, 100))

      batch = %{args | inputs: [%{question: "1"}, %{question: "2"}]}

      # The results come a tenth before the deadline, also on a busy machine.
      opts = [timeout: 3_000, max_concurrency: 1]

      assert %{"results" => [one, two]} =
               same_meanwhile(both, fn server ->
                 {:ok, results, _meta} = Bridge.request(server, :execute_program, batch, opts)
                 # The texts have what was left of the timeout when the request was sent.
                 update_in(results, ["results", Access.all(), "error"], fn text ->
                   String.replace(text, ~r/ (3000|29\d\d) ms$/, " 3000 ms")
                 end)
               end)

      assert %{"error" => "not finished within 3000 ms", "error_type" => "timeout"} = one
      assert %{"error" => "not started within 3000 ms", "error_type" => "timeout"} = two

      same(both, fn server ->
        {:ok, results, _meta} =
          Bridge.request(server, :execute_program, batch, timeout: 10_000, item_timeout_ms: 100)

        results
      end)
    end
  end

  describe "an evaluation has the same" do
    defp evaluated(server, examples, opts) do
      with {:ok, result} <- Evaluate.run(server, "said", examples, opts) do
        usage = result.usage
        %{result | duration_ms: 0, usage: Map.take(usage, ["cache_hits"])}
      end
    end

    test "scores of text, number for number", %{both: both} do
      examples =
        for {{_got, wanted}, n} <- Enum.with_index(@pairs),
            do: {%{say: "##{n}."}, %{said: wanted}}

      for match <- [:equals, :exact_match, :f1, :contains] do
        result = same(both, &evaluated(&1, examples, metric: {:field, :said, match}))
        scores = Enum.map(result.results, & &1.score)
        assert 0.0 in scores and 1.0 in scores, "#{match}"
      end
    end

    test "scores of other values", %{both: both} do
      examples =
        for n <- 0..(length(@values) - 1),
            wanted <- @values,
            do: {%{say: "##{n}."}, %{said: wanted}}

      same(both, fn server ->
        for match <- [:equals, :exact_match, :f1, :contains] do
          {:ok, result} =
            Evaluate.run(server, "any", examples, metric: {:field, :said, match})

          Enum.map(result.results, & &1.score)
        end
      end)
    end

    test "scores by a function, which gets the same; failures are 0", %{both: both} do
      metric = fn example, prediction ->
        assert %{"say" => _, "said" => said, "note" => 1} = example
        if said == prediction["said"], do: {true, "right"}, else: 0.25
      end

      examples = [
        {%{say: "#10."}, %{said: "12", note: 1}},
        {%{say: "#1."}, %{said: "b", note: 1}},
        {%{wrong: "a"}, %{said: "b", note: 1}}
      ]

      assert %{score: score, failed: 1} = same(both, &evaluated(&1, examples, metric: metric))
      assert_in_delta score, 1.25 / 3, 1.0e-9

      for examples <- [[%{say: "#1."}, %{say: "#2."}], []],
          do: same(both, &evaluated(&1, examples, metric: fn e, _ -> map_size(e) end))
    end

    test "errors of a metric", %{both: both} do
      for metric <- [
            fn _, _ -> raise "broken" end,
            fn _, _ -> {:error, "no judge"} end,
            fn _, _ -> nil end,
            fn _, _ -> "good" end,
            fn _, _ -> %{score: 1, feedbck: "x"} end,
            fn _, _ -> {1, 5} end,
            fn _, _ -> Integer.pow(10, 400) end
          ] do
        assert {:error, %Error{type: :tool_error}} =
                 same(both, fn server ->
                   with {:error, error} <-
                          evaluated(server, [%{say: "#1."}], metric: metric),
                        do: {:error, %{error | meta: nil}}
                 end)
      end
    end

    @one %{program_id: "qa", inputs: [%{question: "?"}]}
    @field %{field: "answer", match: "f1"}
    @wrong_evaluations [
      %{@one | inputs: %{question: "?"}} |> Map.put(:metric, @field),
      %{@one | inputs: %{question: "?"}} |> Map.put(:expected, []),
      Map.put(@one, :expected, [%{}]),
      Map.put(@one, :metric, @field),
      Map.put(@one, :metric, "exact"),
      Map.put(@one, :metric, %{}),
      Map.put(@one, :metric, %{tool: 5}),
      Map.put(@one, :metric, %{tool: "x", field: "answer"}),
      Map.put(@one, :metric, %{field: "question", match: "f1"}),
      Map.put(@one, :metric, %{field: "answer", match: "fuzzy"}),
      Map.merge(@one, %{metric: @field, expected: []}),
      Map.merge(@one, %{metric: @field, expected: %{answer: "x"}}),
      Map.merge(@one, %{metric: @field, expected: ["x"]}),
      Map.merge(@one, %{metric: @field, expected: [%{note: "x"}]}),
      Map.merge(@one, %{metric: @field, expected: [%{answer: "x", question: "y"}]}),
      Map.merge(@one, %{metric: %{tool: "x"}, expected: [%{question: "y"}]})
    ]

    test "errors of wrong arguments", %{both: both} do
      for args <- @wrong_evaluations do
        assert {:error, %Error{type: :invalid_args}} =
                 same(both, &Bridge.request(&1, :execute_program, args))
      end
    end

    test "items of a stream", %{both: both} do
      args = %{
        program_id: "said",
        inputs: [%{say: "#1."}, %{}],
        expected: [%{said: "a an the"}, %{said: "b"}],
        metric: %{field: "said", match: "equals"}
      }

      same(both, fn server ->
        elements = Enum.to_list(Bridge.stream(server, args))
        {:ok, result, _meta} = List.last(elements)
        {Enum.sort(for({:item, _, _} = item <- elements, do: item)), result}
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

    test "an error alone", %{both: both} do
      assert [error: %Error{}] = same(both, &Enum.to_list(Bridge.stream(&1, run(%{}))))
    end

    test "a timeout", %{both: both} do
      stream = &Bridge.stream(&1, run(%{question: "Why?"}, "slow"), timeout: 100)

      assert [:timeout] =
               same(both, fn it -> for {:error, error} <- stream.(it), do: error.type end)
    end
  end

  describe "tools are called in the same way:" do
    test "with their arguments and results, in a stream, too", %{both: both} do
      test = self()

      for server <- both do
        search = fn args ->
          send(test, {server, args, Process.get(:"$callers")})
          "Found."
        end

        args = run(%{question: "What is Elixir?"}, "agent")

        assert {:ok, %{"answer" => "A language."}, _meta} =
                 Bridge.request(server, :execute_program, args, tools: %{search: search})

        assert_receive {^server, %{"query" => "Elixir"}, [^test | _]}
        elements = Enum.to_list(Bridge.stream(server, args, tools: %{"search" => search}))
        assert {:status, "calling tool search"} in elements
        assert_receive {^server, %{"query" => "Elixir"}, _callers}
      end
    end

    test "one that the program does not have is refused", %{both: both} do
      args = run(%{question: "What is Elixir?"}, "agent")

      assert {:error, %Error{type: :invalid_args}} =
               same(
                 both,
                 &Bridge.request(&1, :execute_program, args, tools: %{find: fn _ -> 1 end})
               )

      assert {:error, %Error{type: :invalid_args}} =
               same(
                 both,
                 &Bridge.request(&1, :execute_program, run(%{question: "?"}),
                   tools: %{a: fn _ -> 1 end}
                 )
               )
    end
  end

  describe "a pool has the same" do
    test "results and errors", %{pools: pools} do
      same(pools, &Pool.call(&1, :execute_program, run(%{question: "Why?"})))
      same(pools, &Pool.call(&1, :execute_program, run(%{question: {1, 2}})))
      same(pools, &Pool.call(&1, :execute_program, run(%{qestion: "Why?"})))
      same(pools, &Pool.call(&1, :optimize))
      same(pools, &Pool.call(&1, :create_program, %{id: "x"}))
      same(pools, &Pool.call(&1, :create_program, %{id: "p", signature: "a -> b"}))
      same(pools, &Pool.call(&1, :cleanup, %{program_ids: ["p"]}))
      same(pools, &Pool.call(&1, :list_programs, %{program_ids: ["qa", "p"]}))
    end

    test "results with metadata and options", %{pools: pools} do
      same(pools, fn pool ->
        {:ok, result, meta} = Pool.request(pool, :execute_program, run(%{question: "Why?"}))
        {result, Enum.sort(Map.keys(meta))}
      end)

      for args <- [run(%{}), run("x"), run([%{question: "One?"}, %{}])],
          do: same(pools, &answer_of(&1, args))

      same(pools, &Pool.request(&1, :execute_program, run(%{}), retries: 1))
      same(pools, &Pool.request(&1, :create_program, %{id: "x"}))

      for pool <- pools do
        assert {:ok, %{"status" => "created"}, %{"duration_ms" => _}} =
                 Pool.request(pool, :create_program, %{id: "p2", signature: "a -> b"})

        assert {:ok, %{"programs_removed" => 1}, _} =
                 Pool.request(pool, :cleanup, %{program_ids: ["p2"]})

        args = run(%{question: "Why?"}, "slow")

        assert {:error, %Error{type: :timeout}} =
                 Pool.request(pool, :execute_program, args, timeout: 100)
      end
    end

    defp answer_of(pool, args) do
      with {:ok, result, _meta} <- Pool.request(pool, :execute_program, args), do: result
    end

    test "streams", %{pools: pools} do
      same(pools, fn pool ->
        elements = Enum.to_list(Pool.stream(pool, run(%{question: "Why not?"})))
        {:ok, result, _meta} = List.last(elements)
        {for({:chunk, "answer", text} <- elements, into: "", do: text), result}
      end)

      same(pools, &Enum.to_list(Pool.stream(&1, run(%{}))))
    end

    test "calls of tools", %{pools: pools} do
      test = self()

      for pool <- pools do
        search = fn args ->
          send(test, {pool, args})
          "Found."
        end

        args = run(%{question: "What is Elixir?"}, "agent")

        assert {:ok, %{"answer" => "A language."}, _meta} =
                 Pool.request(pool, :execute_program, args, tools: %{search: search})

        assert_receive {^pool, %{"query" => "Elixir"}}
        elements = Enum.to_list(Pool.stream(pool, args, tools: %{"search" => search}))
        assert {:status, "calling tool search"} in elements
        assert_receive {^pool, %{"query" => "Elixir"}}
      end
    end

    test "bridges of one's own", %{pools: pools} do
      same(pools, fn pool ->
        Pool.with_bridge(pool, &Bridge.call(&1, :execute_program, run(%{question: "Why?"})))
      end)

      same(pools, fn pool ->
        catch_throw(Pool.with_bridge(pool, fn _bridge -> throw(:enough) end))
      end)

      same(pools, fn pool -> for %{checked_out: out?} <- Pool.status(pool).peers, do: out? end)
    end

    test "sums of statistics", %{pools: pools} do
      same(pools, fn pool ->
        {:ok, stats} = Pool.call(pool, :get_stats)
        Enum.sort(Map.keys(stats))
      end)
    end

    test "status and checkouts", %{pools: pools} do
      for pool <- pools do
        assert %{peers: [%{state: :running, checked_out: false, bridge: bridge}], nodes: [_]} =
                 Pool.status(pool)

        assert {:ok, ^bridge} = Pool.checkout(pool)

        assert {:ok, _result, _meta} =
                 Bridge.request(bridge, :execute_program, run(%{question: "?"}), [])

        assert :ok = Pool.checkin(pool, bridge)
        assert {:error, text} = Pool.checkin(pool, :nobody)
        assert is_binary(text)
        assert %{state: :running, pending: 0} = Bridge.get_status(bridge)
        assert :ok = Bridge.restart(bridge)
      end
    end
  end
end
