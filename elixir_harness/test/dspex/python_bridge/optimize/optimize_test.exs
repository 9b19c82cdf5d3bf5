defmodule DSPex.PythonBridge.OptimizeTest do
  @moduledoc "Optimizations by a fake peer, which plays what an optimizer sends."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Optimize, Pool}
  alias DSPex.PythonBridge.Optimize.{Request, Result}
  alias DSPex.Test.FakePeer

  @definition %{id: "qa", signature: "question -> answer", demos: [%{answer: "x"}]}
  @trainset for n <- 1..4, do: {%{question: "q#{n}"}, %{answer: "a", n: n}}

  defmodule Agent do
    use DSPex.PythonBridge.Program,
      id: "agent",
      program_type: "react",
      signature: "question -> answer",
      tools: [look: [args: [what: :string], function: &List.wrap/1]]
  end

  defp start(more \\ []),
    do: start_supervised!({Bridge, FakePeer.opts(:plays, more)}, id: make_ref())

  defp start_pool do
    pool = Module.concat(__MODULE__, "Pool#{System.unique_integer([:positive])}")
    opts = Keyword.merge(FakePeer.opts(:plays), name: pool, pool_size: 1)
    start_supervised!({Pool, opts}, id: pool)
    all_up(pool)
    pool
  end

  # A peer that answers pings alone. The test gets each other command, and the function that answers it.
  defp start_told do
    test = self()

    transport = fn ->
      bridge = self()
      spawn_link(fn -> told(bridge, test) end)
    end

    start_supervised!({Bridge, name: nil, transport: transport}, id: make_ref())
  end

  defp told(bridge, test) do
    receive do
      {^bridge, {:command, frame}} ->
        peer = self()
        request = frame |> IO.iodata_to_binary() |> JSON.decode!()
        reply = ~s({"id":#{request["id"]},"success":true,"result":{}})
        answer = fn -> send(bridge, {peer, {:data, reply}}) end
        command = request["command"]
        if command == "ping", do: answer.(), else: send(test, {command, request["args"], answer})
        told(bridge, test)

      {^bridge, :close} ->
        :ok
    end
  end

  ## What the peer plays

  defp score(n, tool \\ "metric:score") do
    args = %{example: %{n: n}, prediction: %{answer: "a"}, purpose: "score"}
    [["tool", n, tool, args], ["result", n]]
  end

  defp progress(done, best \\ nil) do
    item = %{step: "fake", done: done, total: 4, lm_calls: done, best: best}
    [["stream", %{progress: item}]]
  end

  defp candidate(number, score, best?) do
    item = %{number: number, score: score, of: 2, best: best?, state: if(best?, do: %{n: number})}
    [["stream", %{candidate: item}]]
  end

  @result %{state: %{n: 2}, score: 0.4, baseline: 0.0, candidates: 2, stopped: nil}
          |> Map.merge(%{lm_calls: 4, metric_calls: 4})
  defp reply(result \\ @result), do: [["reply", result, %{lm_calls: 4, cost_usd: nil}]]

  defp all do
    score(1) ++
      progress(1) ++
      score(2) ++
      candidate(1, 0.2, true) ++
      score(3) ++ progress(3, 0.2) ++ score(4) ++ candidate(2, 0.4, true) ++ reply()
  end

  # The metric sends the test which example it scores, and on_progress each event.
  defp optimize(server, play, opts \\ [], definition \\ @definition) do
    test = self()

    metric = fn %{"n" => n}, %{"answer" => "a"} ->
      send(test, {:scored, n})
      n / 10
    end

    given = [trainset: @trainset, metric: metric, optimizer: :copro, options: [play: play]]
    given = given ++ [on_progress: &send(test, {:event, &1})]
    Optimize.run(server, definition, Keyword.merge(given, opts))
  end

  defp received(kind),
    do: receive(do: ({^kind, value} -> [value | received(kind)]), after: (0 -> []))

  defp heard(bridge) do
    {:ok, %{"heard" => heard}} = Bridge.call(bridge, "heard", %{})
    Enum.flat_map(heard, &Map.keys/1) -- ["tool_result", "tool_result", "tool_result"]
  end

  test "gives the definition with the new state in the place of the old one and of demos" do
    definition = Map.put(@definition, :state, %{old: 1})
    assert {:ok, %Result{} = result} = optimize(start(), all(), [], definition)
    state = %{"n" => 2}
    assert result.definition == %{id: "qa", signature: "question -> answer", state: state}
    assert %{state: ^state, score: 0.4, baseline: +0.0, candidates: 2, stopped: nil} = result
    assert %{lm_calls: 4, metric_calls: 4, usage: %{"lm_calls" => 4}} = result
    assert received(:scored) == [1, 2, 3, 4]

    assert received(:event) == [
             progress: %{step: "fake", done: 1, total: 4, lm_calls: 1, best: nil},
             candidate: %{number: 1, score: 0.2, of: 2, best: true, state: %{"n" => 1}},
             progress: %{step: "fake", done: 3, total: 4, lm_calls: 3, best: 0.2},
             candidate: %{number: 2, score: 0.4, of: 2, best: true, state: state}
           ]

    text = to_string(result)
    assert text =~ ~r/^score 0.400, before 0.000, 2 candidates, 4 LM calls, 4 metric calls, /
    assert inspect(result) =~ text and not (inspect(result) =~ "old")

    string_keys = %{"id" => "qa", "signature" => "a -> b", "state_path" => "x"}
    assert {:ok, %{definition: definition}} = optimize(start(), reply(), [], string_keys)
    assert definition == %{"id" => "qa", "signature" => "a -> b", "state" => state}
  end

  test "the result as a text has the instructions of each predictor, and how many demos" do
    state = %{one: %{signature: %{instructions: "Do\nit."}, demos: [1]}, two: %{signature: %{}}}
    assert {:ok, result} = optimize(start(), reply(%{@result | state: state, score: nil}))
    assert [summary, "one: Do it. (1 demos)", "two:  (0 demos)"] = String.split("#{result}", "\n")
    assert summary =~ "score none"
  end

  test "the arguments are those of the wire" do
    opts =
      [trainset: [%{q: 1}], valset: [{%{q: 2}, %{a: 3}}], metric: {:field, :a, :f1}] ++
        [optimizer: :copro, options: [], budget: [lm_calls: 5], lm: [model: "m"], seed: 0]

    assert {:ok, %Request{args: args}} = Request.new(opts, nil)
    valset = %{inputs: [%{q: 2}], expected: [%{a: 3}]}
    optimize = %{optimizer: :copro, options: %{}, budget: %{lm_calls: 5}, seed: 0, valset: valset}
    args_of_metric = %{metric: %{field: "a", match: :f1}, lm: %{model: "m"}}
    assert args == Map.merge(args_of_metric, %{inputs: [%{q: 1}], optimize: optimize})
  end

  test "a peer that dies is followed by one that repeats no call of the metric, also in a pool" do
    for server <- [start(), start_pool()] do
      first = score(1) ++ progress(1) ++ score(2) ++ candidate(1, 0.2, true) ++ [["die"]]
      play = [["first", first, all()]]

      assert {:ok, %{score: 0.4}} = optimize(server, play)
      assert received(:scored) == [1, 2, 3, 4]
      events = received(:event)

      progress = for {:progress, %{done: done, best: best}} <- events, do: {done, best}
      assert progress == [{1, nil}, {1, 0.2}, {3, 0.2}]

      # Each candidate is announced as the best once, with its state.
      assert for({:candidate, %{number: n, state: %{}}} <- events, do: n) == [1, 2]

      assert {:error, %Error{type: :python_process_died}} =
               optimize(server, [["die"]], retry: false)
    end
  end

  test "a pool's peer that optimizes serves other calls" do
    pool = start_pool()
    test = self()
    play = progress(1) ++ [["go", "on"]] ++ reply()
    run = Task.async(fn -> optimize(pool, play, on_progress: &send(test, &1)) end)
    assert_receive {:progress, _item}, 5_000

    {:ok, _} = Pool.call(pool, "go", %{name: "on"})
    assert {:ok, %Result{}} = Task.await(run)
  end

  describe "the end" do
    test "on_progress stops the run with the best candidate so far" do
      bridge = start()
      play = candidate(1, 0.2, true) ++ [["go", "never"]]
      stop = &if(match?({:candidate, _}, &1), do: :stop)
      assert {:ok, %Result{} = result} = optimize(bridge, play, on_progress: stop)
      assert %{stopped: "caller", score: 0.2, state: %{"n" => 1}, metric_calls: nil} = result
      assert to_string(result) =~ "stopped by caller" and heard(bridge) == ["cancel"]

      definition = Map.put(@definition, :state, %{old: 1})
      opts = [on_progress: fn _ -> :stop end]
      assert {:ok, result} = optimize(bridge, progress(1) ++ play, opts, definition)
      assert %{stopped: "caller", score: nil, state: %{old: 1}} = result
      assert {:ok, %{state: nil, definition: @definition}} = optimize(bridge, progress(1), opts)
    end

    test "an exception of on_progress cancels the run, and is the caller's" do
      bridge = start()
      opts = [on_progress: fn _ -> raise "mine" end]
      assert_raise RuntimeError, "mine", fn -> optimize(bridge, progress(1), opts) end
      assert heard(bridge) == ["cancel"]
    end

    test "a timeout, and the caller's death, cancel the run" do
      bridge = start()
      play = score(1) ++ [["go", "never"]]
      assert {:error, %Error{type: :timeout}} = optimize(bridge, play, timeout: 100)
      test = self()
      opts = [on_progress: &send(test, &1)]
      caller = spawn(fn -> optimize(bridge, progress(1) ++ play, opts) end)
      assert_receive {:progress, _}, 5_000
      Process.exit(caller, :kill)
      eventually(fn -> "cancel" in (heard(bridge) -- ["cancel"]) end)
    end

    test "the caller's death while the program is created: it is removed once it is there" do
      bridge = start_told()
      caller = spawn(fn -> optimize(bridge, reply()) end)
      assert_receive {"create_program", %{"id" => id}, created}, 5_000
      Process.exit(caller, :kill)
      refute_receive {"cleanup", _args, _answer}, 50
      created.()
      assert_receive {"cleanup", %{"program_ids" => [^id]}, _answer}, 5_000
    end

    test "the end of the process that creates the program is an error of the run" do
      bridge = start_told()
      task = Task.async(fn -> optimize(bridge, reply()) end)
      assert_receive {"create_program", _args, _answer}, 5_000
      {:monitored_by, by} = Process.info(task.pid, :monitored_by)
      Enum.each(by -- [self(), bridge], &Process.exit(&1, :kill))
      assert {:error, %Error{type: :internal}} = Task.await(task)
    end

    test "the caller does not wait for the end of the program" do
      run = fn _nth ->
        bridge = start_told()
        task = Task.async(fn -> timed(fn -> optimize(bridge, reply(), timeout: 100) end) end)
        assert_receive {"create_program", _args, created}, 5_000
        created.()
        {ms, result} = Task.await(task)
        assert {:error, %Error{type: :timeout}} = result
        assert_receive {"cleanup", _args, _never}, 5_000
        ms
      end

      # A loaded machine may be late, but hardly each time.
      assert Enum.any?(1..5, &(run.(&1) < 1_000))
    end

    test "a peer that sends no valid result is an error" do
      for lie <- [nil, [], %{}, %{state: %{}}] do
        assert {:error, %Error{type: :internal, message: "the peer sent no valid result"}} =
                 optimize(start(), reply(lie))
      end
    end
  end

  test "wrong arguments are named" do
    bridge = start()

    for {opts, text} <- [
          {[metric: nil], ":metric: missing"},
          {[trainset: nil], ":trainset: ** (Protocol.UndefinedError)"},
          {[trainset: [%{}, 5]], ":trainset: examples[1]: expected {inputs, expected}"},
          {[valset: Stream.map([1], fn _ -> raise "no file" end)],
           ":valset: ** (RuntimeError) no f"},
          {[trainset: fn _acc, _fun -> raise "no file" end], ":trainset: ** (RuntimeError) no f"},
          {[budgets: []], "unknown option :budgets, did you mean :budget?"},
          {[timeout: 4_294_967_296], ":timeout: expected 1 to 4294967295 ms"},
          {[retry: 1], ":retry"},
          {[tools: nil], ":tools: expected a map"},
          {[tools: %{find: &List.wrap/1}], "has no tool find; it has none"},
          {[valset: [{%{q: "a"}, %{a: <<255>>}}]], "optimize.valset.expected[0].a: a string"},
          {[prompt_lm: [model: "x", api_key: {:system, "sk-secret"}]],
           "optimize.prompt_lm.api_key: a tuple"}
        ] do
      assert {:error, %Error{type: type, message: message}} = optimize(bridge, all(), opts)
      assert type in [:invalid_args, :invalid_request] and message =~ text
      refute message =~ "secret"
    end

    for definition <- [nil, 1, Enum, %{}, %{signature: "a -> b"}] do
      assert {:error, %Error{type: :invalid_request, message: "definition: " <> _}} =
               optimize(bridge, all(), [], definition)
    end

    assert {:error, %Error{message: "args.config.f: a function has no JSON form"}} =
             optimize(bridge, all(), [], Map.put(@definition, :config, %{f: &is_atom/1}))

    assert {:error, %Error{type: :bridge_not_running}} = optimize(__MODULE__.None, all())
  end

  test "a module gives its definition, and its tools, of which a run may replace some" do
    bridge = start()
    test = self()
    play = [["tool", 1, "look", %{}], ["result", 1]] ++ reply()
    assert {:ok, %{definition: definition}} = optimize(bridge, play, [], Agent)
    assert %{id: "agent", program_type: _, tools: [_], state: %{}} = definition
    look = fn _args -> send(test, :looked) && 1 end
    assert {:ok, _} = optimize(start(), play, [tools: %{look: look}], Agent)
    assert_received :looked

    assert {:error, %Error{message: message}} =
             optimize(bridge, play, [tools: %{loook: look}], Agent)

    assert message =~ "has no tool loook; it has look"
  end
end
