defmodule DSPex.PythonBridge.OptimizeTest do
  @moduledoc "Optimizations by a fake peer, which scores each example once; its option `die` has it die before one."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Optimize, Pool}
  alias DSPex.PythonBridge.Optimize.Result
  alias DSPex.Test.PoolProbe

  @definition %{id: "qa", signature: "question -> answer", demos: [%{answer: "x"}]}
  @trainset for n <- 1..6, do: {%{question: "q#{n}"}, %{answer: "a", n: n}}

  defmodule Agent do
    use DSPex.PythonBridge.Program,
      id: "agent",
      program_type: "react",
      signature: "question -> answer",
      tools: [look: [args: [what: :string], function: &List.wrap/1]]
  end

  # Names of files that the peers share, and its own script.
  defp opts(more \\ []) do
    # A run that was killed has left its own.
    name = "optimize#{System.pid()}_#{System.unique_integer([:positive])}"
    dir = Path.join(System.tmp_dir!(), name)
    File.mkdir!(dir)
    on_exit(fn -> File.rm_rf!(dir) end)
    fake_opts("optimizes", [env: %{"FAKE_FILE" => Path.join(dir, "x")}] ++ more)
  end

  defp start(more \\ []), do: start_supervised!({Bridge, opts(more)}, id: make_ref())

  defp start_pool(more) do
    pool = Module.concat(__MODULE__, "Pool#{System.unique_integer([:positive])}")
    start_supervised!({Pool, Keyword.merge(opts(), [name: pool, pool_size: 2] ++ more)}, id: pool)
    eventually(fn -> Enum.all?(Pool.status(pool).peers, &(&1.state == :running)) end)
    pool
  end

  # Sends the test which example it scores.
  defp metric do
    test = self()

    fn %{"n" => n}, %{"answer" => "a"} ->
      send(test, {:scored, n})
      n / 10
    end
  end

  defp optimize(server, more, definition \\ @definition) do
    given = [trainset: @trainset, metric: metric(), optimizer: :copro]
    Optimize.run(server, definition, Keyword.merge(given, more))
  end

  defp scored do
    receive do: ({:scored, n} -> [n | scored()]), after: (0 -> [])
  end

  defp events do
    receive do: ({:event, event} -> [event | events()]), after: (0 -> [])
  end

  defp listener(answer \\ :ok) do
    test = self()

    fn event ->
      send(test, {:event, event})
      answer
    end
  end

  test "gives the definition with the new state in the place of the old one and of demos" do
    bridge = start()
    definition = Map.put(@definition, :state, %{old: 1})
    assert {:ok, %Result{} = result} = optimize(bridge, [on_progress: listener()], definition)
    assert %{"n" => 3, "from" => %{"old" => 1}} = result.state
    assert result.definition == %{id: "qa", signature: "question -> answer", state: result.state}
    assert_in_delta result.score, 0.35, 1.0e-9
    assert %{baseline: +0.0, candidates: 3, stopped: nil, lm_calls: 6, metric_calls: 6} = result
    assert %{"lm_calls" => 6} = result.usage
    assert is_integer(result.duration_ms)
    assert scored() == Enum.to_list(1..6)

    assert [{:progress, progress}, {:progress, _}, {:candidate, candidate} | _] = events()
    assert progress == %{step: "fake", done: 1, total: 6, lm_calls: 1, best: nil}
    state = %{"n" => 1, "from" => %{"old" => 1}}
    assert candidate == %{number: 1, score: 0.2, of: 1, best: true, state: state}

    text = to_string(result)
    assert text =~ ~r/^score 0.350, before 0.000, 3 candidates, 6 LM calls, 6 metric calls, /
    assert inspect(result) =~ text and not (inspect(result) =~ "old")
  end

  test "sends the wire's arguments" do
    opts = [
      options: [breadth: 2],
      budget: [lm_calls: 5],
      num_threads: 4,
      seed: 0,
      prompt_lm: [model: "offline/echo"],
      valset: [%{question: "v"}]
    ]

    assert {:ok, %{state: %{"optimize" => optimize}}} = optimize(start(), opts)

    assert optimize == %{
             "optimizer" => "copro",
             "options" => %{"breadth" => 2},
             "budget" => %{"lm_calls" => 5},
             "num_threads" => 4,
             "seed" => 0,
             "prompt_lm" => %{"model" => "offline/echo"},
             "valset" => %{"inputs" => [%{"question" => "v"}]}
           }
  end

  test "the program has an id of its own in the peer, is removed, and is not kept for others" do
    bridge = start()
    seen = listener({:ok, Bridge.call(bridge, :list_programs)})
    assert {:ok, _} = optimize(bridge, on_progress: &if(elem(&1, 0) == :candidate, do: seen.(&1)))
    assert {:ok, [["create", id], ["cleanup", id]]} = Bridge.call(bridge, "heard", %{})
    assert "qa:optimize:" <> _ = id
    :ok = Bridge.restart(bridge)
    assert {:ok, %{"programs" => []}} = Bridge.call(bridge, :list_programs)
    assert {:ok, []} = Bridge.call(bridge, "heard", %{})
  end

  describe "a peer that dies" do
    test "before and after its first item is followed by one that repeats no call of the metric" do
      bridge = start()

      for die <- [[[0, 1]], [[3, 2]], [[2, 1], [5, 1]]] do
        assert {:ok, %{lm_calls: 6}} = optimize(bridge, options: [die: die])
        assert scored() == Enum.to_list(1..6), inspect(die)
      end

      assert {:ok, %{"programs" => []}} = Bridge.call(bridge, :list_programs)
    end

    test "takes no best candidate along; done begins again" do
      # Before the sixth example, with two candidates; the next peer finds the same two again, and a better one.
      opts = [options: [die: [[5, 1]]], on_progress: listener()]
      assert {:ok, _} = optimize(start(), opts)
      events = events()
      progress = for {:progress, progress} <- events, do: progress

      assert for(%{done: done, total: 6} <- progress, do: done) == [
               1,
               2,
               3,
               4,
               5,
               1,
               2,
               3,
               4,
               5,
               6
             ]

      assert for(%{best: best} <- progress, do: best) ==
               [nil, nil, 0.2, 0.2] ++ List.duplicate(0.4, 7)

      # Each candidate is announced as the best once, with its state.
      best = for {:candidate, %{best: true} = candidate} <- events, do: candidate
      assert for(%{score: score} <- best, do: score) == [0.2, 0.4, 0.6]
      assert Enum.all?(best, & &1.state)
    end

    test "while the metric runs: that goes on, and its answer is the next peer's" do
      bridge = start()
      test = self()

      metric = fn %{"n" => n}, _prediction ->
        send(test, {:scored, n})
        if n == 4, do: receive(do: (:go_on -> 1)), else: 0
      end

      # From the process of the metric, once.
      waits = fn %{"n" => n} = example, prediction ->
        if n == 4, do: send(test, {:waits, self()})
        metric.(example, prediction)
      end

      task = Task.async(fn -> optimize(bridge, metric: waits) end)
      assert_receive {:waits, pid}, 5_000
      before = Bridge.get_status(bridge).os_pid
      kill(before)
      eventually(fn -> Bridge.get_status(bridge).os_pid not in [nil, before] end)
      send(pid, :go_on)
      assert {:ok, %{metric_calls: 6}} = Task.await(task, 20_000)
      assert scored() == Enum.to_list(1..6)
    end

    test "1 + max_retries times ends the run" do
      bridge = start(max_retries: 2)

      assert {:error, %Error{type: :python_process_died}} =
               optimize(bridge, options: [die: [[3, 3]]])

      assert {:ok, _} = optimize(bridge, options: [die: [[4, 2]]])

      assert {:error, %Error{type: :python_process_died}} =
               optimize(start_pool(max_retries: 0), options: [die: [[3, 1]]])
    end

    test "with retry: false, or after a tool with repeat: false, ends the run" do
      for bridge <- [start(), start_pool([])] do
        assert {:error, %Error{type: :python_process_died}} =
                 optimize(bridge, retry: false, options: [die: [[3, 1]]])
      end

      assert {:ok, _} = optimize(start_pool([]), retry: false)

      for server <- [start(), start_pool([])], die <- [[[0, 1]], [[3, 1]]] do
        opts = [tools: %{look: {fn _ -> 1 end, repeat: false}}, options: [tool: "look", die: die]]

        assert {:error, %Error{type: :python_process_died, retryable: false}} =
                 optimize(server, opts, Agent)

        assert {:ok, _} =
                 optimize(server, [tools: %{look: fn _ -> 1 end}, options: [tool: "look"]], Agent)
      end
    end

    test "in a pool is followed by another, with other calls in both" do
      pool = start_pool(pool_size: 2)

      for {die, n} <- Enum.with_index([[[0, 1]], [[3, 2]], [[2, 1], [5, 1]]]) do
        assert {:ok, %{lm_calls: 6}} = optimize(pool, options: [die: die])
        assert scored() == Enum.to_list(1..6), inspect({n, die})
      end

      eventually(fn -> Enum.sum(PoolProbe.busy(pool)) == 0 end)
      assert {:ok, %{"programs" => []}} = Pool.call(pool, :list_programs)
    end
  end

  test "a pool's peer that optimizes is not checked out, and counts one call more" do
    pool = start_pool(pool_size: 2)
    test = self()
    on_progress = fn event -> if elem(event, 0) == :candidate, do: send(test, :candidate) end

    caller =
      spawn(fn ->
        optimize(pool, options: [hold: true], on_progress: on_progress, metric: metric(test))
      end)

    assert_receive :candidate, 5_000
    assert Enum.sort(PoolProbe.busy(pool)) == [0, 1]
    assert {:ok, %{"programs" => [_one]}} = Pool.call(pool, :list_programs)
    Process.exit(caller, :kill)
    eventually(fn -> match?({:ok, %{"programs" => []}}, Pool.call(pool, :list_programs)) end)
    eventually(fn -> Enum.sum(PoolProbe.busy(pool)) == 0 end)
  end

  defp metric(test) do
    fn %{"n" => n}, _prediction ->
      send(test, {:scored, n})
      0.5
    end
  end

  test "a pool whose peers refuse it as overloaded has tried all of them" do
    pool = start_pool(pool_size: 2)
    assert {:error, %Error{type: :overloaded}} = optimize(pool, options: [refuse: "overloaded"])

    for %{bridge: bridge} <- Pool.status(pool).peers do
      assert {:ok, [["create", id], ["cleanup", id]]} = Bridge.call(bridge, "heard", %{})
    end
  end

  test "a program that the peer has lost meanwhile is created again" do
    assert {:ok, _} = optimize(start(), options: [forget: 2])
    assert {:error, %Error{type: :program_not_found}} = optimize(start(), options: [forget: 9])
    assert {:ok, _} = optimize(start_pool([]), options: [forget: 1])
  end

  describe "the end" do
    test "on_progress stops the run with the best candidate so far" do
      bridge = start()
      stop = &if(match?({:candidate, _}, &1), do: :stop)

      assert {:ok, %Result{} = result} =
               optimize(bridge, options: [hold: true], on_progress: stop)

      assert %{stopped: "caller", score: 0.2, state: %{"n" => 1}, metric_calls: nil} = result
      assert result.definition.state == result.state and result.lm_calls == 2
      assert to_string(result) =~ "stopped by caller"
      assert {:ok, [_create, ["cancel"], ["cleanup", _]]} = Bridge.call(bridge, "heard", %{})

      stop = &if(match?({:candidate, %{number: 2}}, &1), do: :stop)
      assert {:ok, %{score: 0.4, state: %{"n" => 2}}} = optimize(bridge, on_progress: stop)

      definition = Map.put(@definition, :state, %{old: 1})
      assert {:ok, result} = optimize(bridge, [on_progress: fn _ -> :stop end], definition)
      assert %{stopped: "caller", score: nil, state: %{old: 1}} = result

      assert {:ok, result} = optimize(bridge, on_progress: fn _ -> :stop end)
      assert %{state: nil, definition: @definition} = result
      assert to_string(result) =~ "score none"
    end

    test "an exception of on_progress cancels the run, and is the caller's" do
      bridge = start()

      assert_raise RuntimeError, "mine", fn ->
        optimize(bridge, options: [hold: true], on_progress: fn _ -> raise "mine" end)
      end

      assert {:ok, [_create, ["cancel"], ["cleanup", _]]} = Bridge.call(bridge, "heard", %{})
    end

    test "a timeout cancels the run, in which no metric is called any longer" do
      bridge = start()
      opts = [options: [hold: true], timeout: 500]
      assert {:error, %Error{type: :timeout}} = optimize(bridge, opts)
      assert {:ok, [_create, ["cancel"], ["cleanup", _]]} = Bridge.call(bridge, "heard", %{})
      assert scored() == [1, 2]
    end

    test "the caller's death cancels the run and removes the program" do
      bridge = start()
      test = self()
      opts = [options: [hold: true], on_progress: &send(test, &1), metric: metric(test)]
      caller = spawn(fn -> optimize(bridge, opts) end)
      assert_receive {:candidate, _}, 5_000
      Process.exit(caller, :kill)

      eventually(fn ->
        {:ok, heard} = Bridge.call(bridge, "heard", %{})
        Enum.sort(heard) |> Enum.map(&hd/1) == ["cancel", "cleanup", "create"]
      end)
    end

    test "a metric that fails is its error" do
      assert {:error, %Error{type: :tool_error, message: "RuntimeError: mine"}} =
               optimize(start(), metric: fn _, _ -> raise "mine" end)
    end
  end

  test "wrong arguments are named" do
    bridge = start()

    for {opts, text} <- [
          {[metric: nil], ":metric: missing"},
          {[metric: fn -> 1 end], ":metric: expected a function of two or three"},
          {[optimizer: nil], ":optimizer: expected a name"},
          {[trainset: nil], ":trainset: missing"},
          {[trainset: 5], ":trainset: expected an enumerable of examples"},
          {[trainset: [%{}, 5]], ":trainset: examples[1]: expected {inputs, expected}"},
          {[valset: [7]], ":valset: examples[0]"},
          {[budgets: []], "unknown option :budgets, did you mean :budget?"},
          {[timeout: 0], ":timeout"},
          {[timeout: 4_294_967_296], ":timeout: expected 1 to 4294967295 ms"},
          {[trainset: [%{q: 1} | 5]], ":trainset: expected a proper list"},
          {[trainset: fn -> [] end], ":trainset: expected an enumerable of examples"},
          {[trainset: fn example, _acc -> example end], ":trainset: "},
          {[valset: Stream.map([1], fn _ -> raise "no file" end)], ":valset: RuntimeError: no f"},
          {[on_progress: 1], ":on_progress"},
          {[retry: 1], ":retry"},
          {[tools: 1], ":tools"},
          {[tools: nil, metric: {:field, :answer, :equals}], ":tools: expected a map"},
          {[tools: %{find: &List.wrap/1}], "no tool find; it has none"},
          {[options: %{a: {1, 2}}], "optimize.options.a: a tuple has no JSON form"},
          {[trainset: [%{q: "a"}, %{q: self()}]], "inputs[1].q: it has no JSON form"},
          {[valset: [{%{q: "a"}, %{a: <<255>>}}]], "optimize.valset.expected[0].a: a string"}
        ] do
      assert {:error, %Error{type: type, message: message}} = optimize(bridge, opts)
      assert type in [:invalid_args, :invalid_request] and message =~ text, text
    end

    for definition <- [nil, 1, Enum, %{}, %{signature: "a -> b"}, [id: "qa"]] do
      assert {:error, %Error{type: :invalid_request, message: "definition: " <> _}} =
               optimize(bridge, [], definition)
    end

    assert {:error, %Error{message: "definition: args.config.f: a function has no JSON form"}} =
             optimize(bridge, [], Map.put(@definition, :config, %{f: &is_atom/1}))

    assert {:error, %Error{type: :bridge_not_running}} = optimize(__MODULE__.None, [])
    assert {:ok, []} = Bridge.call(bridge, "heard", %{})
  end

  test "a peer that sends no valid result, or chunks, is an error, or ignored" do
    bridge = start()
    good = %{candidates: 1, lm_calls: 1, metric_calls: 1, state: %{}, score: 1, baseline: nil}

    for lie <-
          [nil, [], %{}, %{state: %{}}] ++
            for(
              {key, value} <- [
                candidates: nil,
                lm_calls: "1",
                metric_calls: 1.5,
                state: [1],
                score: "1",
                score: Integer.pow(10, 400),
                baseline: []
              ],
              do: Map.put(good, key, value)
            ) do
      assert {:error, %Error{type: :internal, message: "the peer sent no valid result"}} =
               optimize(bridge, options: %{result: lie}),
             inspect(lie)
    end

    chunks = [
      %{progress: 5},
      %{progress: %{step: "s", done: "1"}},
      %{progress: %{step: "s", best: "1"}},
      %{progress: %{step: 5}},
      %{candidate: %{number: 1, score: "1", best: true, state: %{}}},
      %{candidate: %{number: 1, score: 1, best: true, state: 5}},
      %{candidate: %{number: "1", score: 1, best: true}},
      %{candidate: []}
    ]

    state = %{signature: %{instructions: 5}}
    opts = [options: %{chunks: chunks, result: %{good | state: state}}, on_progress: listener()]
    assert {:ok, result} = optimize(bridge, opts)
    assert "#{result}" =~ "instructions:  (0 demos)"
    assert length(events()) == 9
  end

  test "a key is not in the error of an LM without a JSON form" do
    opts = [prompt_lm: [model: "x", api_key: {:system, "sk-secret"}]]
    assert {:error, %Error{type: :invalid_args, message: message}} = optimize(start(), opts)
    assert message =~ "optimize.prompt_lm.api_key: a tuple" and not (message =~ "secret")
  end

  test "a module gives its definition, and its tools, of which a run may replace some" do
    bridge = start()
    assert {:ok, %{definition: definition}} = optimize(bridge, [], Agent)
    assert %{id: "agent", program_type: _, tools: [_], state: %{}} = definition
    assert {:ok, _} = optimize(bridge, [tools: %{look: fn _ -> 1 end}], Agent)

    assert {:error, %Error{message: message}} =
             optimize(bridge, [tools: %{loook: fn _ -> 1 end}], Agent)

    assert message =~ "no tool loook; it has look"

    declared = %{"id" => "qa", "signature" => "a -> b", "state_path" => "x"}
    assert {:ok, %{definition: %{"state" => _} = definition}} = optimize(bridge, [], declared)
    assert Map.keys(definition) == ["id", "signature", "state"]
  end
end
