defmodule DSPex.PythonBridge.DurableTest do
  @moduledoc "Durable runs of an agent, with the real peer: suspended, resumed, refused, in both stores."

  use ExUnit.Case, async: true, parameterize: [%{kind: :file}, %{kind: :memory}]

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Durable, Error, Pool}
  alias DSPex.PythonBridge.Durable.{FileStore, MemoryStore, Run}
  alias DSPex.Test.AgentLM

  # Two steps with a tool, one that finishes, and the answer.
  @total 4

  setup_all %{kind: kind} do
    {lm, asked} = AgentLM.start()
    name = Module.concat(__MODULE__, kind)
    start_supervised!({Pool, real_opts(name: name, pool_size: 1, max_retries: 50)})
    {:ok, _} = Pool.call(name, :create_program, AgentLM.agent("agent", lm), 30_000)
    %{pool: name, asked: asked}
  end

  setup %{kind: kind} = context do
    store =
      case kind do
        :file -> {FileStore, tmp_dir(context)}
        :memory -> {MemoryStore, start_supervised!({MemoryStore, []})}
      end

    %{store: store}
  end

  defp tmp_dir(context) do
    dir = Path.join(System.tmp_dir!(), "durable-#{System.pid()}-#{:erlang.phash2(context.test)}")
    on_exit(fn -> File.rm_rf!(dir) end)
    dir
  end

  defp args(question \\ "a b"), do: %{program_id: "agent", inputs: %{question: question}}

  defp run(context, id, opts, args \\ args()),
    do: Durable.run(context.pool, args, [id: id, store: context.store, timeout: 60_000] ++ opts)

  defp resume(context, id, opts),
    do: Durable.resume(context.pool, id, [store: context.store, timeout: 60_000] ++ opts)

  defp run_of(context, id) do
    {:ok, runs} = Durable.list(store: context.store)
    Enum.find(runs, &(&1.id == id))
  end

  # A tool that tells the test, and then does the rest.
  defp tool(then \\ fn _what -> "done" end) do
    test = self()
    fn %{"what" => what}, key -> send(test, {:does, what, key}) && then.(what) end
  end

  defp did do
    receive do
      {:does, what, _key} -> [what | did()]
    after
      0 -> []
    end
  end

  defp counted(context, fun) do
    before = :atomics.get(context.asked, 1)
    result = fun.()
    {:atomics.get(context.asked, 1) - before, result}
  end

  test "a run is made once: its result comes again, and other arguments are refused", context do
    opts = [tools: %{do: tool()}]
    assert {@total, {:ok, result, meta}} = counted(context, fn -> run(context, "r", opts) end)
    assert did() == ["a", "b"]
    assert {0, {:ok, ^result, ^meta}} = counted(context, fn -> run(context, "r", opts) end)
    assert {0, {:ok, ^result, ^meta}} = counted(context, fn -> resume(context, "r", opts) end)
    assert did() == []
    assert %Run{state: :done, program_id: "agent", waiting: []} = run_of(context, "r")
    assert {:error, error} = run(context, "r", opts, args("c"))
    assert error.message =~ "other arguments"
  end

  test "a tool that needs an approval waits for it, each call for itself", context do
    opts = [tools: %{do: {tool(), approve: true}}]
    assert {1, {:suspended, run}} = counted(context, fn -> run(context, "r", opts) end)
    assert [%{key: one, tool: "do", args: %{"what" => "a"}, why: "approve"}] = run.waiting
    assert did() == []
    assert %Run{state: :suspended, waiting: [%{key: ^one}]} = run_of(context, "r")

    # No decision, no Python.
    assert {0, {:suspended, _run}} = counted(context, fn -> resume(context, "r", opts) end)
    resumed = fn more -> counted(context, fn -> resume(context, "r", more ++ opts) end) end
    assert {1, {:suspended, run}} = resumed.(approve: one)
    assert did() == ["a"]
    assert [%{key: two, args: %{"what" => "b"}}] = run.waiting
    assert {2, {:ok, result, _meta}} = resumed.(deny: {two, "too much"})
    assert did() == []
    assert inspect(result) =~ "too much"
    assert length(AgentLM.numbers(result)) == @total
  end

  test "an answer takes the place of the tool's; the call key stays", context do
    opts = [tools: %{do: {tool(), approve: true}}]
    assert {:suspended, %Run{waiting: [%{key: one}]}} = run(context, "r", opts, args("a"))
    assert {:ok, result, _} = resume(context, "r", [answer: {one, %{"by" => "hand"}}] ++ opts)
    assert inspect(result) =~ "hand"
    assert {:suspended, %Run{waiting: [%{key: key}]}} = run(context, "s", opts, args("a"))
    assert {:ok, _, _} = resume(context, "s", [approve: [key]] ++ opts)
    assert_received {:does, "a", ^key}
    assert key != one
  end

  test "a tool may suspend its run, until it gives a result", context do
    opts = &[tools: %{do: tool(fn _what -> &1 end)}]
    later = opts.({:suspend, %{until: "Monday"}})
    assert {:suspended, run} = run(context, "r", later, args("a"))
    assert [%{key: key, why: %{"until" => "Monday"}}] = run.waiting

    assert {:suspended, %Run{waiting: [^key]}} =
             resume(context, "r", [approve: key] ++ later) |> keys()

    assert did() == ["a", "a"]
    assert {:ok, result, _} = resume(context, "r", [approve: key] ++ opts.("it is Monday"))
    assert inspect(result) =~ "it is Monday"
  end

  defp keys({:suspended, run}),
    do: {:suspended, %{run | waiting: Enum.map(run.waiting, & &1.key)}}

  test "a spent budget suspends a run, and a new one lets it go on", context do
    opts = [tools: %{do: tool()}, budget: [lm_calls: 2]]
    assert {2, {:suspended, run}} = counted(context, fn -> run(context, "r", opts) end)
    assert [%{key: "budget", tool: nil, why: %{"lm_calls" => 2}}] = run.waiting

    assert {:error, error} =
             resume(context, "r", [approve: "budget"] ++ Keyword.delete(opts, :budget))

    assert error.message =~ "approve"
    more = Keyword.put(opts, :budget, lm_calls: @total)
    assert {2, {:ok, _, _}} = counted(context, fn -> resume(context, "r", more) end)
    assert did() == ["a", "b"]
  end

  test "a tool that raises is an error for the LM once, and not called again", context do
    opts = [tools: %{do: tool(fn "a" -> raise("no a") end)}, budget: [lm_calls: 2]]
    assert {:suspended, _run} = run(context, "r", opts, args("a"))
    assert did() == ["a"]
    more = Keyword.put(opts, :budget, lm_calls: 10)
    assert {:ok, result, _} = resume(context, "r", more)
    assert did() == []
    assert inspect(result) =~ "no a"
  end

  test "a batch whose budget is spent is not over: a new one lets it go on", context do
    batch = %{program_id: "agent", inputs: for(word <- ~w(a b c), do: %{question: word})}
    opts = [tools: %{do: tool()}, budget: [lm_calls: 5]]
    assert {5, {:suspended, run}} = counted(context, fn -> run(context, "r", opts, batch) end)
    assert [%{key: "budget", why: %{"lm_calls" => 5}}] = run.waiting
    more = Keyword.put(opts, :budget, lm_calls: 9)

    assert {4, {:ok, %{"results" => results}, _}} =
             counted(context, fn -> resume(context, "r", more) end)

    assert for(result <- results, do: result["success"]) == [true, true, true]
    assert Enum.sort(did()) == ["a", "b", "c"]
  end

  test "a tool whose process is killed is an error for the LM once, and not called again",
       context do
    kill = tool(fn _what -> Process.exit(self(), :kill) end)
    once = &[tools: %{do: {&1, repeat: false}}, budget: [lm_calls: &2]]
    assert {:suspended, run} = run(context, "r", once.(kill, 2), args("a"))
    assert [%{key: "budget"}] = run.waiting
    assert {:ok, result, _} = resume(context, "r", once.(tool(), 10))
    assert inspect(result) =~ "exit: :killed"
    assert did() == ["a"]
  end

  test "what a caller's function raises ends the claim", context do
    opts = [tools: %{do: tool()}]
    raises = [on_chunk: fn _chunk -> throw(:enough) end] ++ opts
    assert catch_throw(run(context, "r", raises)) == :enough
    assert %Run{state: :interrupted} = run_of(context, "r")
    assert {:ok, _, _} = resume(context, "r", opts)
    assert did() == ["a", "b"]
  end

  # Of the tools of one answer of the LM, the first needs an approval, and the others begin after it.
  test "what has begun ends before a run is suspended", context do
    test = self()

    slow = fn %{"what" => what} ->
      send(test, {:begun, what, self()}) && receive(do: (:go -> what))
    end

    tools = %{ask: {tool(), approve: true}, slow: {slow, repeat: false}}
    {lm, _asked} = AgentLM.start()
    program = Map.merge(AgentLM.parallel("parallel", lm), %{})
    {:ok, _} = Pool.call(context.pool, :create_program, program, 30_000)
    args = %{program_id: "parallel", inputs: %{question: "ask:x slow:y slow:z"}}
    task = Task.async(fn -> run(context, "r", [tools: tools], args) end)
    assert_receive {:begun, one, first}, 30_000
    assert_receive {:begun, two, second}
    assert Enum.sort([one, two]) == ["y", "z"]
    # Longer than parallel calls are waited for.
    refute Task.yield(task, 300)
    for pid <- [first, second], do: send(pid, :go)
    assert {:suspended, %Run{waiting: [%{tool: "ask", key: key}]}} = Task.await(task)
    assert {:ok, _, _} = resume(context, "r", tools: tools, approve: key)
    assert did() == ["x"]
    refute_received {:begun, _, _}
  end

  test "a run whose process ends is interrupted, and goes on in another; meanwhile it is claimed",
       context do
    test = self()
    stops = tool(fn _what -> send(test, {:at_work, self()}) && Process.sleep(:infinity) end)
    {pid, monitor} = spawn_monitor(fn -> run(context, "r", tools: %{do: stops}) end)
    assert_receive {:at_work, _tool}, 30_000
    assert {:error, :claimed} = resume(context, "r", tools: %{do: tool()})
    assert {:error, :claimed} = run(context, "r", tools: %{do: tool()})
    assert {:error, :claimed} = Durable.cancel("r", store: context.store)
    assert {:error, :claimed} = Durable.delete("r", store: context.store)
    assert %Run{state: :running} = run_of(context, "r")
    Process.exit(pid, :kill)
    assert_receive {:DOWN, ^monitor, :process, ^pid, :killed}
    eventually(fn -> run_of(context, "r").state == :interrupted end)
    assert did() == ["a"]

    # Its first call has no outcome that anybody knows.
    once = [tools: %{do: {tool(), repeat: false}}]
    assert {0, {:suspended, run}} = counted(context, fn -> resume(context, "r", once) end)
    assert [%{key: key, why: "unknown_outcome"}] = run.waiting

    assert {3, {:ok, _, _}} =
             counted(context, fn -> resume(context, "r", [approve: key] ++ once) end)

    assert did() == ["a", "b"]
  end

  test "a run that failed can be resumed; a program that asks something else is an error with a way on",
       context do
    {lm, asked} = AgentLM.start()
    id = "agent-#{System.unique_integer([:positive])}"
    create = &Pool.call(context.pool, :create_program, Map.merge(AgentLM.agent(id, lm), &1))
    {:ok, _} = create.(%{})
    opts = [tools: %{do: tool()}, budget: [lm_calls: 2]]
    assert {:suspended, _} = run(context, "r", opts, %{args() | program_id: id})

    {:ok, _} = create.(%{config: %{temperature: 0.5}})
    more = Keyword.put(opts, :budget, lm_calls: 10)
    assert {:error, %Error{type: :journal_mismatch}} = resume(context, "r", more)
    assert %Run{state: :interrupted, error: "" <> _} = run_of(context, "r")
    assert {:error, error} = resume(context, "r", [keep: 3] ++ more)
    assert error.message =~ "keep: the run has 2"
    assert :atomics.get(asked, 1) == 2
    assert did() == ["a", "b"]
    assert {:ok, _, _} = resume(context, "r", [keep: 0] ++ more)
    assert :atomics.get(asked, 1) == 2 + @total
    # Their results stay.
    assert did() == []
  end

  test "wrong options and decisions are refused by name, and leave the run as it was", context do
    opts = [tools: %{do: {tool(), approve: true}}]
    assert {:suspended, %Run{waiting: [%{key: key}]}} = run(context, "r", opts)
    text = fn {:error, %Error{type: :invalid_request, message: text}} -> text end
    assert text.(resume(context, "r", [approve: "x"] ++ opts)) =~ "no call of the run waits"
    assert text.(resume(context, "r", [approve: key, deny: {key, "no"}] ++ opts)) =~ "twice"
    assert text.(resume(context, "r", [deny: key] ++ opts)) =~ ":deny: expected"
    assert text.(resume(context, "r", [deny: {key, <<255>>}] ++ opts)) =~ ":deny: expected"
    assert text.(resume(context, "r", [answer: {key, self()}] ++ opts)) =~ ":answer: expected"
    assert text.(resume(context, "r", approve: key)) =~ "called: do"
    assert text.(resume(context, "r", approve: key, tools: %{other: tool()})) =~ "called: do"
    assert text.(resume(context, "r", [attempts: 2] ++ opts)) =~ "attempts"
    assert text.(run(context, "r", tools: %{do: {tool(), approve: 1}})) =~ ":approve: expected"
    assert text.(run(context, "r", lease: 5)) =~ ":lease: expected"
    assert text.(run(context, "", opts)) =~ ":id: expected"
    assert text.(run(context, "s", [approve: "x"] ++ opts)) =~ "no call of the run waits"
    assert text.(Durable.run(context.pool, args(), store: context.store)) =~ ":id is missing"
    assert text.(Durable.run(context.pool, args(), id: "r")) =~ ":store is missing"
    assert text.(Durable.run(context.pool, args(), id: "r", store: String)) =~ ":store: expected"

    with_key = Map.put(args(), :lm, %{model: "openai/x", api_key: "sk-1"})
    assert text.(run(context, "s", opts, with_key)) =~ "lm.api_key"
    assert text.(run(context, "s", opts, Map.put(args(), :optimize, %{}))) =~ "optimize"
    assert text.(run(context, "s", opts, Map.put(args(), :budget, %{}))) =~ ":budget"
    assert {:error, %Error{type: :invalid_args}} = run(context, "s", opts, %{inputs: {1}})
    assert text.(Pool.request(context.pool, :execute_program, args(), opts)) =~ "Durable"
    assert did() == []
    assert {:ok, [%Run{id: "r", state: :suspended}]} = Durable.list(store: context.store)
  end

  test "runs are cancelled and erased; what is not there is not found", context do
    opts = [tools: %{do: {tool(), approve: true}}]
    store = [store: context.store]
    assert {:error, :not_found} = resume(context, "r", opts)
    assert {:error, :not_found} = Durable.cancel("r", store)
    assert :ok = Durable.delete("r", store)
    assert {:ok, []} = Durable.list(store)
    assert {:suspended, _} = run(context, "r", opts)
    assert :ok = Durable.cancel("r", store)
    assert {:error, %Error{type: :cancelled}} = resume(context, "r", opts)
    assert {:error, %Error{type: :cancelled}} = run(context, "r", opts)
    assert %Run{state: :cancelled, waiting: []} = run_of(context, "r")
    assert :ok = Durable.delete("r", store)
    assert {:ok, []} = Durable.list(store)
  end

  test "its peer's death is not noticed: each tool once", context do
    kill_once = tool(fn _ -> kill(hd(all_up(context.pool)).os_pid) && "done" end)

    assert {asked, {:ok, result, _}} =
             counted(context, fn -> run(context, "r", tools: %{do: kill_once}) end)

    assert did() == ["a", "b"]
    assert asked == @total
    assert length(AgentLM.numbers(result)) == @total
  end

  test "an inspection of a run shows no contents", context do
    assert {:suspended, run} = run(context, "r", tools: %{do: {tool(), approve: true}})
    refute inspect(run) =~ "what"
  end
end
