defmodule DSPex.PythonBridge.Client.RemoteBridgeTest do
  @moduledoc "A bridge of another node, called without a pool."

  # It makes this a distributed node.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Optimize}
  alias DSPex.Test.{FakePeer, Nodes}

  # More than the connection to a node takes before it makes those wait who send.
  @big String.duplicate("x", 5_000_000)

  setup do
    Nodes.distribute()
    node = Nodes.start()
    spec = {Bridge, "plays" |> fake_opts() |> Keyword.put(:name, :far)}
    {:ok, _} = Nodes.on(node, Supervisor, :start_child, [DSPex.ApplicationSupervisor, spec])
    far = {:far, node}
    eventually(fn -> Bridge.get_status(far).state == :running end, 20_000)
    %{far: far, node: node}
  end

  test "works as a local one, with its own errors, and leaves nothing behind", %{far: far} do
    test = self()
    assert {:ok, %{"starts" => 1}} = Bridge.call(far, :ping)
    assert {:error, :timeout} = Bridge.call(far, :execute_program, %{play: [["go", "x"]]}, 50)
    eventually(fn -> Bridge.get_status(far).pending == 0 end)
    assert {:ok, %{"heard" => [%{"cancel" => _id}]}} = Bridge.call(far, :heard, %{}, :infinity)
    play = [["count", 1], ["tool", 1, "where", %{}], ["result", 1], ["reply"]]
    tools = %{where: fn _ -> send(test, {:on, node()}) && 1 end}

    assert [{:chunk, "n", "0"}, {:ok, %{"1" => %{"result" => 1}}, _}] =
             far |> Bridge.stream(%{play: play}, tools: tools) |> Enum.to_list()

    assert_received {:on, node} when node == node()
    assert Bridge.call({:nobody, elem(far, 1)}, :ping) == {:error, :bridge_not_running}
    assert Process.info(self(), :messages) == {:messages, []}
  end

  test "of a node without this project, or of none, is not running, also for an optimization" do
    args = [~c"-setcookie", Atom.to_charlist(Node.get_cookie())]
    name = %{name: :peer.random_name(~c"bare"), host: ~c"127.0.0.1", longnames: true}
    {:ok, _peer, bare} = :peer.start_link(Map.put(name, :args, args))
    opts = [trainset: [%{q: 1}], metric: {:field, :a, :equals}, optimizer: :copro]

    for node <- [bare, :"nobody@nowhere.invalid"] do
      result = Optimize.run({:far, node}, %{id: "p", signature: "q -> a"}, opts)
      assert {:error, %Error{type: :bridge_not_running}} = result
      assert Bridge.call({:far, node}, :ping) == {:error, :bridge_not_running}
    end
  end

  test "whose node has stopped keeps no caller past its timeout", %{far: far, node: node} do
    os_pid = Nodes.on(node, System, :pid, [])
    args = %{play: [], x: @big}

    calls = [
      fn -> Bridge.call(far, :execute_program, args, 300) end,
      # The connection takes nothing more.
      fn -> Bridge.call(far, :ping, %{}, 300) end,
      fn -> Bridge.request(far, :execute_program, args, timeout: 300, tools: %{t: & &1}) end,
      fn -> Bridge.cast(far, :execute_program, args) end
    ]

    while_stopped(os_pid, fn ->
      results =
        for call <- calls do
          task = Task.async(call)
          Task.yield(task, 2_000) || Task.shutdown(task, :brutal_kill)
        end

      assert [
               {:ok, {:error, :timeout}},
               {:ok, {:error, :timeout}},
               {:ok, {:error, %Error{type: :timeout}}},
               {:ok, :ok}
             ] = results
    end)

    # Those of whom the bridge hears now are gone.
    eventually(fn -> Bridge.get_status(far).pending <= 1 end, 10_000)
  end

  test "of this node serves on while a node stands still that has called it", %{node: node} do
    {:ok, near} = start_supervised({Bridge, FakePeer.opts(:plays)})
    play = [["go", "now"], ["long", "reply", byte_size(@big)]]
    for _ <- 1..4, do: Node.spawn(node, Bridge, :call, [near, :execute_program, %{play: play}])
    eventually(fn -> Bridge.get_status(near).pending == 4 end)
    os_pid = Nodes.on(node, System, :pid, [])

    while_stopped(os_pid, fn ->
      assert {:ok, _} = Bridge.call(near, :go, %{name: "now"}, 1_000)
      assert eventually(fn -> Bridge.get_status(near).pending == 0 end)
      assert {:ok, _} = Bridge.call(near, :ping, %{}, 1_000)
    end)
  end
end
