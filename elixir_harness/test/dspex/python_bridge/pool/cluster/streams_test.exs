defmodule DSPex.PythonBridge.Pool.Cluster.StreamsTest do
  @moduledoc """
  Calls with chunks and tools, and those that must not be made twice, by the pool of another node. The peers of this node
  do not serve.
  """

  # It makes this a distributed node.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Error, Pool}
  alias DSPex.Test.{Nodes, PoolProbe}

  @pool __MODULE__.Pool

  # The other node, which the tests share that do not change it.
  setup_all do
    Nodes.distribute()
    %{node: Nodes.start()}
  end

  setup tags do
    cluster = "streams #{System.unique_integer([:positive])}"
    opts = [name: @pool, cluster: cluster, pool_size: 1]
    fake = fake_opts(tags[:fake] || "plays")
    start_supervised!({Pool, Keyword.merge(fake, opts)})
    up_on(node())
    PoolProbe.stop_serving(@pool)

    start_there = fn opts_there ->
      there = if tags[:own_node], do: Nodes.start(), else: tags.node
      pool = Nodes.start_pool(there, fake |> Keyword.merge(opts) |> Keyword.merge(opts_there))
      unless tags[:own_node], do: on_exit(fn -> end_on(there, pool) end)
      up_on(there)
      eventually(fn -> there in for({pid, _} <- PoolProbe.serving(@pool), do: node(pid)) end)
      there
    end

    %{start_there: start_there}
  end

  defp end_on(node, pool) do
    children = Nodes.on(node, Supervisor, :which_children, [DSPex.ApplicationSupervisor])
    [id] = for {id, ^pool, _, _} <- children, do: id

    for end_child <- [:terminate_child, :delete_child],
        do: :ok = Nodes.on(node, Supervisor, end_child, [DSPex.ApplicationSupervisor, id])
  end

  defp up_on(node) do
    peers = fn -> Nodes.on(node, Pool, :status, [@pool]).peers end
    eventually(fn -> Enum.all?(peers.(), &(&1.state == :running)) end, 20_000)
  end

  defp busy_on(node), do: Nodes.on(node, PoolProbe, :busy, [@pool])
  defp idle_on(node), do: eventually(fn -> Enum.uniq(busy_on(node)) == [0] end)
  defp peers_on(node), do: Nodes.on(node, Pool, :status, [@pool]).peers

  defp ask_on(node, command, args \\ %{}) do
    for %{bridge: bridge} <- peers_on(node) do
      {:ok, answer} =
        Nodes.on(node, DSPex.PythonBridge.Bridge, :call, [bridge, command, args, 5_000])

      answer
    end
  end

  defp go_on(node, name), do: ask_on(node, :go, %{name: name})

  defp cancelled_on(node),
    do: for(%{"heard" => heard} <- ask_on(node, :heard), %{"cancel" => id} <- heard, do: id)

  defp stream(play, opts \\ []), do: Pool.stream(@pool, %{play: play}, opts ++ [timeout: 20_000])

  test "chunks come from there, tools run here, and the call is counted there", context do
    there = context.start_there.([])
    test = self()
    tools = %{where: fn %{"a" => 1} -> send(test, {:on, node()}) && "here" end}

    play = [
      ["count", 2],
      ["tool", 1, "where", %{a: 1}],
      ["result", 1],
      ["raw", ~s({"id":ID,"stream":1})],
      ["count", 1],
      ["reply"]
    ]

    assert [{_, _, "0"}, {_, _, "1"}, {_, _, "0"}, {:ok, %{"1" => %{"result" => "here"}}, _}] =
             Enum.to_list(stream(play, tools: tools))

    assert_received {:on, node} when node == node()
    idle_on(there)

    reader =
      Task.async(fn -> Enum.to_list(stream([["go", "on"], ["count", 1], ["reply", %{}]])) end)

    eventually(fn -> busy_on(there) == [1] end)
    go_on(there, "on")
    assert [{:chunk, "n", "0"}, {:ok, %{}, _}] = Task.await(reader)

    play = [["tool", 2, "where", %{a: 1}], ["result", 2], ["reply"]]

    assert {:ok, %{"2" => %{"result" => "here"}}, _} =
             Pool.request(@pool, :execute_program, %{play: play}, tools: tools)

    assert_received {:on, node} when node == node()
    idle_on(there)
    assert mailbox() == []
  end

  test "a call that is halted, times out, or whose caller is killed is cancelled there",
       context do
    there = context.start_there.([])
    play = [["count", 1], ["go", "on"]]
    assert [{:chunk, "n", "0"}] = play |> stream() |> Enum.take(1)
    eventually(fn -> length(cancelled_on(there)) == 1 end)
    idle_on(there)

    assert [{:chunk, _, _}, {:error, %Error{type: :timeout}}] =
             play |> stream(timeout: 300) |> Enum.to_list()

    eventually(fn -> length(cancelled_on(there)) == 2 end)
    caller = spawn(fn -> [["go", "on"]] |> stream() |> Enum.to_list() end)
    eventually(fn -> busy_on(there) == [1] end)
    Process.exit(caller, :kill)
    eventually(fn -> length(cancelled_on(there)) == 3 end)
    idle_on(there)
    assert mailbox() == []
  end

  @tag :tmp_dir
  test "a peer that dies there, before a chunk or after it, is followed by another one",
       %{tmp_dir: dir} = context do
    env = %{"FAKE_FILE" => Path.join(dir, "starts")}
    there = context.start_there.(env: env)
    dies = [["journal", %{"n" => 1}], ["count", 1], ["go", "die"], ["die"]]
    play = [["first", dies, [["journal", %{"n" => 2}], ["count", 1], ["journal"]]]]

    elements =
      for element <- stream(play) do
        if match?({:chunk, _, _}, element), do: go_on(there, "die")
        element
      end

    # The journal was here, too.
    assert [{:chunk, "n", "0"}, {:status, "restarted"}, {:ok, [%{"n" => 1}], _}] = elements
    up_on(there)
    idle_on(there)
    starts = File.read!(Path.join(dir, "starts"))

    assert {:error, %Error{type: :python_process_died}} =
             Pool.request(@pool, :execute_program, %{play: [["die"]]}, retry: false)

    up_on(there)
    assert File.read!(Path.join(dir, "starts")) == starts <> "x"
    idle_on(there)
  end

  @tag :own_node
  test "after the loss of the node its streams go on here, with their journals", context do
    there = context.start_there.([])

    {:suspended, _, next} =
      [["journal", %{"n" => 1}], ["count", 1], ["go", "on"], ["journal"]]
      |> stream()
      |> Enumerable.reduce({:cont, nil}, &{:suspend, {&1, &2}})

    play = [["count", 1], ["reply", %{}]]
    waits = Task.async(fn -> Enum.to_list(stream([["go", "on"] | play])) end)
    once = Task.async(fn -> Enum.to_list(stream([["go", "on"] | play], retry: false)) end)
    eventually(fn -> busy_on(there) == [3] end)
    Nodes.stop(there)
    assert [error: %Error{type: :python_process_died}] = Task.await(once, 20_000)

    assert {:suspended, {{:status, "restarted"}, _}, next} = next.({:cont, nil})
    PoolProbe.serve_again(@pool)
    on = Task.async(fn -> next.({:cont, nil}) end)
    eventually(fn -> PoolProbe.busy(@pool) == [2] end)
    go_on(node(), "on")
    assert {:suspended, {{:ok, [%{"n" => 1}], _}, _}, _} = Task.await(on, 20_000)
    assert [{:chunk, "n", "0"}, {:ok, %{}, _}] = Task.await(waits, 20_000)
    eventually(fn -> PoolProbe.busy(@pool) == [0] end)
  end

  @tag :own_node
  @tag :tmp_dir
  test "a node that hangs and wakes does not run what was meanwhile run elsewhere",
       %{tmp_dir: dir} = context do
    # There it is held for ever, here it is answered.
    play = [["first", [["reply", %{}]], [["go", "never"]]]]
    file = Path.join(dir, "starts")
    File.write!(file, "x")
    there = context.start_there.(env: %{"FAKE_FILE" => file})
    os_pid = Nodes.on(there, System, :pid, [])
    {_, 0} = System.cmd("/bin/sh", ["-c", "kill -STOP #{os_pid}"])

    try do
      calls = [
        Task.async(fn -> Pool.call(@pool, :execute_program, %{play: play}, 60_000) end),
        Task.async(fn -> play |> stream(timeout: 60_000) |> Enum.to_list() end)
      ]

      # Both have tried that node, and have given it up.
      coordinator = Module.concat(@pool, Coordinator)
      eventually(fn -> map_size(:sys.get_state(coordinator).waiting) == 2 end, 20_000)

      PoolProbe.serve_again(@pool)
      assert [{:ok, %{}}, [{:ok, %{}, _}]] = Task.await_many(calls, 20_000)
      # It delays no change.
      create = %{id: "qa", signature: "question -> answer"}
      assert {:ok, _} = Pool.call(@pool, :create_program, create, 5_000)
    after
      {_, 0} = System.cmd("/bin/sh", ["-c", "kill -CONT #{os_pid}"])
    end

    # These questions come behind what it was sent.
    for _ <- 1..3, do: ask_on(there, :heard)
    idle_on(there)
  end
end
