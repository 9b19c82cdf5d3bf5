defmodule DSPex.PythonBridge.Client.JournalTest do
  @moduledoc "The journal of a run, by which the next peer goes on where the one before has died, with the real peer."

  use ExUnit.Case,
    async: true,
    parameterize: [%{api: DSPex.PythonBridge.Bridge}, %{api: DSPex.PythonBridge.Pool}]

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.Test.AgentLM

  # Two steps with a tool, one that finishes, and the answer.
  @total 4

  setup_all %{api: api} do
    {lm, asked} = AgentLM.start()
    opts = real_opts(name: Module.concat(api, "OfJournals"), max_retries: 50)
    server = start_supervised!({api, if(api == Pool, do: [pool_size: 1] ++ opts, else: opts)})
    {:ok, _} = api.call(server, :create_program, AgentLM.agent("agent", lm), 30_000)
    %{server: server, asked: asked}
  end

  defp args, do: %{program_id: "agent", inputs: %{question: "a b"}}

  defp run(%{api: api, server: server}, opts),
    do: api.request(server, :execute_program, args(), [timeout: 60_000] ++ opts)

  defp counted(asked, fun) do
    before = :atomics.get(asked, 1)
    result = fun.()
    {:atomics.get(asked, 1) - before, result}
  end

  # A function that tells the test, and then does the rest.
  defp telling(test, tag, then \\ fn _ -> :ok end),
    do: fn it -> send(test, {tag, it}) && then.(it) end

  defp tools(then \\ fn _ -> "done" end),
    do: %{do: fn %{"what" => what} -> telling(self_or_test(), :does, then).(what) end}

  # Tools run in processes of their own.
  defp self_or_test, do: List.last([self() | Process.get(:"$callers", [])])

  defp in_mailbox do
    {:messages, messages} = Process.info(self(), :messages)
    for _ <- messages, do: receive(do: (message -> message))
  end

  defp kill_peer(%{api: Pool, server: server}), do: kill(hd(Pool.status(server).peers).os_pid)
  defp kill_peer(%{server: server}), do: kill(Bridge.get_status(server).os_pid)

  test "a run that is given the first entries of another asks for the rest only", context do
    opts = [tools: tools(), journal: [], keeper: %{on_journal: telling(self(), :entry)}]
    assert {@total, {:ok, result, _meta}} = counted(context.asked, fn -> run(context, opts) end)
    # Each answer comes before the tool call that follows from it.
    assert [entry: one, does: "a", entry: two, does: "b", entry: three, entry: four] =
             in_mailbox()

    entries = [one, two, three, four]
    assert for(entry <- entries, do: JSON.decode!(entry)["n"]) == [1, 2, 3, 4]

    for known <- 0..@total do
      opts = [tools: tools(), journal: Enum.take(entries, known)]
      assert {asked, {:ok, again, meta}} = counted(context.asked, fn -> run(context, opts) end)
      assert asked == @total - known
      assert meta["journal"] == %{"replayed" => known, "live" => asked, "unused" => 0}
      assert Enum.take(AgentLM.numbers(again), known) == Enum.take(AgentLM.numbers(result), known)
    end
  end

  test "one whose entry cannot be kept ends before its next step", context do
    for keep <- [fn _entry -> {:error, "disk full"} end, fn _entry -> raise "disk full" end] do
      opts = [tools: tools(), journal: [], keeper: %{on_journal: keep}]
      assert {1, {:error, error}} = counted(context.asked, fn -> run(context, opts) end)
      assert %Error{type: :cancelled, retryable: false} = error
      assert error.message =~ "disk full"
      assert in_mailbox() == []
    end
  end

  test "one that fits no call is refused, without a request", context do
    entry = &~s({"n":#{&1},"key":"0#{&1}","nth":0,"error":{"type":"LMError"}})
    opts = [tools: tools(), journal: [entry.(1), entry.(2)]]
    assert {0, {:error, error}} = counted(context.asked, fn -> run(context, opts) end)
    assert error.type == :journal_mismatch
  end

  # Wherever the peer is killed: no answer that has come is asked for again, and each tool is called once.
  defp assert_goes_on(context, opts) do
    opts = opts ++ [on_chunk: telling(self(), :chunk)]
    assert {asked, {:ok, result, _meta}} = counted(context.asked, fn -> run(context, opts) end)
    # One request may have been under way.
    assert asked in [@total, @total + 1]
    told = in_mailbox()
    assert for({:does, what} <- told, do: what) == ["a", "b"]
    numbers = AgentLM.numbers(for {:entry, entry} <- told, do: entry)
    assert AgentLM.numbers(result) == numbers
    assert length(numbers) == @total
    chunks = for {:chunk, chunk} <- told, do: chunk
    assert Enum.count(chunks, &(&1["status"] == "restarted")) <= 1
    statuses = for %{"status" => "calling tool" <> _} <- chunks, do: :calling
    assert length(statuses) == 2

    assert result["answer"] ==
             for(%{"field" => "answer", "chunk" => c} <- chunks, into: "", do: c)

    refute Enum.any?(chunks, & &1["reset"])
  end

  test "the peer dies when an answer has come", context do
    for nth <- 1..@total do
      kill = fn entry -> if JSON.decode!(entry)["n"] == nth, do: kill_peer(context) end
      keep = telling(self(), :entry, fn entry -> kill.(entry) && :ok end)
      assert_goes_on(context, tools: tools(), journal: [], keeper: %{on_journal: keep})
    end
  end

  test "the peer dies while a tool runs", context do
    for fatal <- ["a", "b"] do
      tools = tools(fn what -> if(what == fatal, do: kill_peer(context)) && "done" end)

      assert_goes_on(context,
        tools: tools,
        journal: [],
        keeper: %{on_journal: telling(self(), :entry)}
      )
    end
  end
end
