defmodule DSPex.PythonBridge.Tools.FarTest do
  @moduledoc "Tools of a run on another node: the functions are here, the peers are there."

  # It makes this a distributed node.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Error, Pool}
  alias DSPex.Test.{Nodes, PoolProbe}

  @pool __MODULE__.Pool

  setup_all do
    Nodes.distribute()
    %{there: Nodes.start()}
  end

  # The peers of this node are checked out.
  defp far_pool(there) do
    opts = Keyword.merge(fake_opts("plays"), name: @pool, cluster: "far tools")
    Nodes.start_pool(there, [pool_size: 2] ++ opts)
    start_supervised!({Pool, [pool_size: 1] ++ opts})
    for node <- [there, node()], do: eventually(fn -> up?(node) end, 20_000)
    PoolProbe.stop_serving(@pool)
    eventually(fn -> there in for({pid, _} <- PoolProbe.serving(@pool), do: node(pid)) end)
  end

  defp up?(node), do: Enum.all?(peers(node), &(&1.state == :running))
  defp peers(node), do: Nodes.on(node, Pool, :status, [@pool]).peers

  # The bridge that has the run, and its peer.
  defp serving(there) do
    [peer] =
      for {peer, 1} <- Enum.zip(peers(there), Nodes.on(there, PoolProbe, :busy, [@pool])),
          do: peer

    peer
  end

  defp slow do
    test = self()

    fn args ->
      send(test, {:running, args, self(), node()})
      receive do: ({:finish, result} -> result)
    end
  end

  defp assert_not_again(task) do
    assert {:error, %Error{type: :python_process_died} = error} = Task.await(task, 20_000)
    assert error.message =~ "repeat: false" and not error.retryable
    refute_received {:running, _args, _pid, _node}
  end

  test "of a pool there run once, whichever of its peers dies", %{there: there} do
    far_pool(there)

    # As a peer's, its call_ids are those of no other call.
    request = fn n, tool ->
      play = [["tool", n, "t", %{}], ["result", n], ["reply"]]
      opts = [tools: %{t: tool}, timeout: 20_000]
      Task.async(fn -> Pool.request(@pool, :execute_program, %{play: play}, opts) end)
    end

    task = request.(1, slow())
    assert_receive {:running, %{}, pid, _node}, 10_000
    kill(serving(there).os_pid)
    send(pid, {:finish, "once"})
    assert {:ok, %{"1" => %{"result" => "once"}}, _} = Task.await(task, 20_000)
    refute_received {:running, _args, _pid, _node}

    # The end of a peer, or of its bridge.
    endings = [&kill(&1.os_pid), &(&1.bridge |> pid_on(there) |> Process.exit(:kill))]

    for {ending, n} <- Enum.with_index(endings, 2) do
      eventually(fn -> up?(there) end, 20_000)
      task = request.(n, {slow(), repeat: false})
      assert_receive {:running, %{}, _pid, _node}, 10_000
      ending.(serving(there))
      assert_not_again(task)
    end
  end

  defp pid_on(name, node), do: Nodes.on(node, Process, :whereis, [name])
end
