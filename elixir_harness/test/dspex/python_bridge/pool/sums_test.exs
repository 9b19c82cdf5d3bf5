defmodule DSPex.PythonBridge.Pool.SumsTest do
  @moduledoc "`get_stats` and `list_programs` of a pool: what all its peers answer, added."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Pool}

  # Nobody here waits that long for what comes at all.
  @long 60_000

  defp up(name) do
    name |> all_up(@long) |> Enum.map(& &1.bridge)
  end

  @real __MODULE__.Real

  # The tests of real peers share them.
  setup_all do
    start_supervised!({Pool, real_opts(name: @real, pool_size: 2, default_timeout: @long)})
    :ok
  end

  # Without programs. The first question imports psutil, which takes long on a busy machine.
  defp real do
    bridges = up(@real)
    {:ok, _} = Pool.call(@real, :cleanup)
    for bridge <- bridges, do: {:ok, _} = Bridge.call(bridge, :get_stats)
    {@real, bridges}
  end

  # The monitor may have replaced it meanwhile.
  defp go_on(os_pid), do: System.cmd("/bin/sh", ["-c", "kill -CONT #{os_pid} 2>/dev/null"])

  @tag timeout: 120_000
  test "get_stats adds what the peers count; the programs are the pool's" do
    {pool, [one, two]} = real()
    before = executes(pool)
    create = %{id: "qa", signature: "question -> answer"}
    {:ok, _} = Pool.call(pool, :create_program, create)
    execute = %{program_id: "qa", inputs: %{question: "Why?"}}
    for bridge <- [one, one, two], do: {:ok, _} = Bridge.call(bridge, :execute_program, execute)
    {:error, _} = Bridge.call(two, :execute_program, %{program_id: "qa", inputs: %{}})

    [of_one, of_two] =
      for bridge <- [one, two] do
        {:ok, stats} = Bridge.call(bridge, :get_stats)
        stats
      end

    assert {:ok, stats} = Pool.call(pool, :get_stats)
    assert {:ok, %{"peers" => 2}} = Pool.call(pool, "get_stats")

    assert %{"peers" => 2, "missing" => [], "programs_count" => 1} = stats
    assert %{"in_flight" => 0, "queued" => 0, "degraded" => []} = stats
    executes = stats["commands"]["execute_program"]
    assert executes["count"] - before["count"] == 4
    assert executes["errors"] - before["errors"] == 1

    for quantile <- ["p50_ms", "p99_ms"] do
      [first, second] =
        for peer <- [of_one, of_two], do: peer["commands"]["execute_program"][quantile]

      assert executes[quantile] == max(first, second)
    end

    assert stats["memory_usage"]["rss"] > 1.5 * of_one["memory_usage"]["rss"]
    assert stats["uptime"] >= max(of_one["uptime"], of_two["uptime"])
    assert stats["versions"] == of_one["versions"]
    refute is_map_key(stats, "pid")
    # Else a peer has what the sum does not show.
    assert Map.keys(of_one) -- Map.keys(stats) == ["pid"]
  end

  defp executes(pool) do
    {:ok, %{"commands" => commands}} = Pool.call(pool, :get_stats)
    commands["execute_program"] || %{"count" => 0, "errors" => 0}
  end

  @tag timeout: 120_000
  test "list_programs has the programs of all peers, and adds their runs" do
    {pool, [one, two]} = real()
    create = &Pool.call(pool, :create_program, %{id: &1, signature: "question -> answer"})
    for id <- ["qa", "other"], do: {:ok, _} = create.(id)
    execute = %{program_id: "qa", inputs: %{question: "Why?"}}
    for bridge <- [one, two, two], do: {:ok, _} = Bridge.call(bridge, :execute_program, execute)
    {:ok, _} = Bridge.call(two, :create_program, %{id: "late", signature: "q -> a"})

    assert {:ok, %{"programs" => ["qa", "other", "late"], "peers" => 2, "missing" => []} = listed} =
             Pool.call(pool, :list_programs)

    refute is_map_key(listed, "details")

    assert {:ok, %{"programs" => ["qa", "other"], "details" => [qa, other]}} =
             Pool.call(pool, :list_programs, %{details: true, program_ids: ["qa", "other"]})

    {:ok, %{"details" => [of_two]}} =
      Bridge.call(two, :list_programs, %{details: true, program_ids: ["qa"]})

    assert %{"id" => "qa", "execution_count" => 3, "program_type" => "predict"} = qa
    assert qa["last_executed"] == of_two["last_executed"]
    assert qa["created_at"] <= of_two["created_at"]
    assert %{"id" => "other", "execution_count" => 0, "last_executed" => nil} = other

    # The same in all peers: not added.
    assert {:ok, %{"details" => [%{"state" => state}]}} =
             Pool.call(pool, :list_programs, %{state: true, program_ids: ["qa"]})

    {:ok, %{"details" => [%{"state" => ^state}]}} =
      Bridge.call(one, :list_programs, %{state: true, program_ids: ["qa"]})
  end

  @tag timeout: 120_000
  test "a peer that does not answer in time is left out, and named" do
    {pool, [_one, two]} = real()
    hung = Bridge.get_status(two).os_pid
    signal("STOP", hung)
    missing = [inspect(two)]

    # Within its own time, and with more of it after two seconds.
    for {command, timeout} <- [get_stats: 500, list_programs: @long] do
      {ms, answer} = timed(fn -> Pool.call(pool, command, %{}, timeout) end)
      assert {:ok, %{"peers" => 1, "missing" => ^missing}} = answer
      assert ms < @long / 2
    end

    # What was asked is taken back.
    eventually(fn -> Bridge.get_status(two).pending == 0 end, @long)
    go_on(hung)
    eventually(fn -> match?({:ok, %{"peers" => 2}}, Pool.call(pool, :get_stats)) end, @long)
    assert mailbox() == []
  end

  test "what all peers refuse is refused; what has no JSON form is not sent" do
    {pool, _bridges} = real()
    assert {:error, text} = Pool.call(pool, :list_programs, %{program_ids: 5})
    assert text =~ "program_ids"
    assert {:error, "args.a: a tuple " <> _} = Pool.call(pool, :get_stats, %{a: {1}})
    assert Pool.call(:no_such_pool, :get_stats) == {:error, :bridge_not_running}
  end
end
