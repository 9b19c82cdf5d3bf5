defmodule DSPex.PythonBridge.Pool.Cluster.ClusterTest do
  @moduledoc """
  Pools of one cluster on several nodes: this one, and others that the tests start on loopback.
  """

  # It makes this a distributed node.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Pool
  alias DSPex.PythonBridge.Pool.Handle
  alias DSPex.Test.{Nodes, PoolProbe}

  @pool __MODULE__.Pool

  setup_all do
    Nodes.distribute()
    :ok
  end

  setup do
    # No test hears of another's pools.
    %{cluster: "cluster #{System.unique_integer([:positive])}"}
  end

  defp who(cluster, opts),
    do: "who" |> fake_opts() |> Keyword.merge([name: @pool, cluster: cluster] ++ opts)

  defp start_here(cluster, opts \\ []) do
    start_supervised!({Pool, who(cluster, opts)})
    up_on(node())
  end

  defp start_there(cluster, opts \\ []) do
    node = Nodes.start()
    Nodes.start_pool(node, who(cluster, opts))
    up_on(node)
    node
  end

  # Up, and known to be up by the coordinator.
  defp up_on(node) do
    eventually(fn -> Enum.all?(peers_on(node), &(&1.state == :running)) end, 20_000)
  end

  defp on(node, module, function, args), do: Nodes.on(node, module, function, args)
  defp peers_on(node), do: on(node, Pool, :status, [@pool]).peers

  defp call_on(node, command, args, ms \\ 10_000),
    do: on(node, Pool, :call, [@pool, command, args, ms])

  defp call(command, args \\ %{}, ms \\ 10_000), do: Pool.call(@pool, command, args, ms)
  defp os_pids_on(node), do: for(%{os_pid: os_pid} <- peers_on(node), do: os_pid)
  defp nodes_on(node), do: on(node, Pool, :status, [@pool]).nodes

  defp see_each_other(nodes) do
    eventually(fn -> Enum.all?(nodes, &(nodes_on(&1) == Enum.sort(nodes))) end)
    others = length(nodes) - 1
    # Also sent when they meet: which nodes can serve.
    eventually(fn -> Enum.all?(nodes, &(length(serving_on(&1)) == others)) end)
  end

  defp serving_on(node), do: on(node, PoolProbe, :serving, [@pool])
  defp known_on(node), do: on(node, PoolProbe, :known, [@pool])
  defp programs_on(node), do: on(node, PoolProbe, :programs, [@pool])
  defp stop_serving_on(node), do: on(node, PoolProbe, :stop_serving, [@pool])
  defp serve_again_on(node), do: on(node, PoolProbe, :serve_again, [@pool])

  defp create(id, signature \\ "q -> a"), do: %{id: id, signature: signature}

  test "a call that no peer here can serve runs on another node", context do
    start_here(context.cluster)
    there = start_there(context.cluster)
    see_each_other([node(), there])
    {:ok, %{"pid" => pid}} = call(:who)
    assert pid in os_pids_on(node())

    stop_serving_on(node())
    assert Pool.checkout(@pool) == {:error, :pool_exhausted}
    pids = for _ <- 1..10, do: elem(call(:who), 1)["pid"]
    assert Enum.uniq(pids) -- os_pids_on(there) == []
    # Errors and limits are the same from there.
    assert {:error, "Program not found: none"} = call(:execute_program, %{program_id: "none"})
    {ms, result} = timed(fn -> call(:hold, %{}, 100) end)
    assert result == {:error, :timeout}
    assert ms < 1_000
    eventually(fn -> Enum.all?(peers_on(there), &(&1.pending == 0)) end)
    refute_received _stray

    serve_again_on(node())
    eventually(fn -> elem(call(:who), 1)["pid"] in os_pids_on(node()) end)
  end

  test "with a full queue calls go to another node", context do
    start_here(context.cluster, pool_size: 1, max_pending: 1)
    there = start_there(context.cluster, pool_size: 1, max_pending: 1)
    see_each_other([node(), there])
    here = Task.async(fn -> call(:hold, %{}, 60_000) end)
    eventually(fn -> match?([%{pending: 1}], peers_on(node())) end)
    {:ok, %{"pid" => pid}} = call(:who)
    assert [pid] == os_pids_on(there)

    remote = Task.async(fn -> call(:hold, %{}, 60_000) end)
    eventually(fn -> match?([%{pending: 1}], peers_on(there)) end)
    assert call(:who) == {:error, :overloaded}
    # A caller's death frees the place there, too.
    Task.shutdown(remote, :brutal_kill)
    # The monitor, which is notified, pings at once: its ping may take the slot for a moment.
    eventually(fn -> match?({:ok, _}, call(:who)) end)
    Task.shutdown(here, :brutal_kill)
  end

  test "programs are created and removed on all nodes, late ones too", context do
    start_here(context.cluster, pool_size: 2)
    assert {:ok, _} = call(:create_program, create("one"))
    there = start_there(context.cluster, pool_size: 2)
    see_each_other([node(), there])

    eventually(fn ->
      programs_on(there) == List.duplicate(%{"one" => "q -> a"}, 2)
    end)

    # Whichever node is called.
    assert {:ok, _} = call(:create_program, create("two"))
    assert {:ok, _} = call_on(there, :create_program, create("one", "b -> c"))
    both = List.duplicate(%{"one" => "b -> c", "two" => "q -> a"}, 2)
    for node <- [node(), there], do: eventually(fn -> programs_on(node) == both end)

    third = start_there(context.cluster, pool_size: 1)
    see_each_other([node(), there, third])
    eventually(fn -> programs_on(third) == tl(both) end)

    assert {:ok, _} = call_on(there, :cleanup, %{program_ids: ["two"]})
    for node <- [node(), there, third], do: eventually(fn -> known_on(node) == ["one"] end)
    assert {:ok, _} = call(:cleanup)

    for node <- [node(), there, third],
        do: eventually(fn -> Enum.all?(programs_on(node), &(&1 == %{})) end)
  end

  describe "declared programs" do
    defp declared(signature), do: [pool_size: 1, programs: [create("qa", signature)]]

    defp execute_on(node, id), do: call_on(node, :execute_program, %{program_id: id})

    defp start_again(node) do
      pool = on(node, Process, :whereis, [@pool])
      on(node, Supervisor, :stop, [pool])
      eventually(fn -> on(node, Process, :whereis, [@pool]) not in [pool, nil] end)
      up_on(node)
    end

    test "of each node are those of its own release; one that joins overwrites nothing",
         context do
      start_here(context.cluster, declared("old -> old"))
      assert {:ok, _} = call(:create_program, create("other", "created -> here"))
      there = start_there(context.cluster, declared("new -> new"))
      see_each_other([node(), there])
      eventually(fn -> Enum.sort(known_on(there)) == ["other", "qa"] end)
      assert {:ok, %{"signature" => "old -> old"}} = execute_on(node(), "qa")
      assert {:ok, %{"signature" => "new -> new"}} = execute_on(there, "qa")

      # What is created while they run counts on all nodes, also on one that starts later.
      assert {:ok, _} = call(:create_program, create("qa", "created -> here"))
      start_again(there)
      see_each_other([node(), there])
      eventually(fn -> programs_on(there) == programs_on(node()) end)
      assert {:ok, %{"signature" => "created -> here"}} = execute_on(there, "qa")
    end
  end

  test "calls on a node that is lost run on another one", context do
    start_here(context.cluster, pool_size: 1)
    [first, second] = for _ <- 1..2, do: start_there(context.cluster, pool_size: 1)
    see_each_other([node(), first, second])
    stop_serving_on(node())
    held = for _ <- 1..6, do: Task.async(fn -> call(:hold, %{}, 60_000) end)

    pending = fn node -> hd(peers_on(node)).pending end
    eventually(fn -> pending.(first) + pending.(second) == 6 end)
    Nodes.stop(first)
    eventually(fn -> pending.(second) == 6 end)
    assert for(task <- held, do: Task.yield(task, 0)) == List.duplicate(nil, 6)
    eventually(fn -> nodes_on(node()) == Enum.sort([node(), second]) end)

    # The last other one: they come back to this one as soon as it can serve them.
    Nodes.stop(second)
    serve_again_on(node())
    eventually(fn -> pending.(node()) == 6 end)
    Enum.each(held, &Task.shutdown(&1, :brutal_kill))
  end

  @tag :slow
  test "a stopped node blocks no caller past its timeout", context do
    start_here(context.cluster, pool_size: 1)
    there = start_there(context.cluster, pool_size: 1)
    see_each_other([node(), there])
    stop_serving_on(node())
    os_pid = on(there, System, :pid, [])

    while_stopped(os_pid, fn ->
      {ms, result} = timed(fn -> call(:who, %{text: String.duplicate("x", 20_000_000)}, 300) end)
      assert result == {:error, :timeout}
      assert ms < 1_500

      # One that has time left is not lost there: it goes on when this node can serve it.
      waiting = Task.async(fn -> call(:who, %{}, 30_000) end)
      coordinator = Handle.coordinator(@pool)
      eventually(fn -> map_size(:sys.get_state(coordinator).waiting) == 1 end)
      serve_again_on(node())
      assert {:ok, _} = Task.await(waiting)

      # It delays no change.
      {ms, result} = timed(fn -> call(:create_program, create("one"), 1_000) end)
      assert {:ok, %{"status" => "created"}} = result
      assert ms < 500
    end)

    # It hears of what it missed.
    eventually(fn -> known_on(there) == ["one"] end, 10_000)
    eventually(fn -> programs_on(there) == [%{"one" => "q -> a"}] end)
  end

  test "pools of other clusters, and without one, do not take part", context do
    start_here(context.cluster, pool_size: 1)
    Nodes.start_pool(node = Nodes.start(), who("another", pool_size: 1))
    up_on(node)
    alone = Nodes.start()
    Nodes.start_pool(alone, who(nil, pool_size: 1))
    up_on(alone)
    assert {:ok, _} = call(:create_program, create("one"))

    for other <- [node, alone] do
      assert nodes_on(other) == [other]
      assert known_on(other) == []
    end

    stop_serving_on(node())
    assert call(:who, %{}, 100) == {:error, :timeout}
    serve_again_on(node())
  end
end
