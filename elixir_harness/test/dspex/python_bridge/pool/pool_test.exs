defmodule DSPex.PythonBridge.Pool.PoolTest do
  # The default name.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.PythonBridge.Pool.LoadCounters
  alias DSPex.PythonBridge.Pool.Handle
  alias DSPex.Test.PoolProbe

  # The name of a pool whose processes still end.
  setup do
    eventually(fn -> Process.whereis(Pool) == nil end)
    :ok
  end

  defp who(opts), do: "who" |> fake_opts() |> Keyword.delete(:name) |> Keyword.merge(opts)

  defp start(opts), do: start_supervised!({Pool, who(opts)})

  defp start_up(opts \\ []) do
    pool = start(opts)
    all_up(pool)
    pool
  end

  defp bridges(pool \\ Pool), do: Enum.map(Pool.status(pool).peers, & &1.bridge)

  defp pid_of(pool \\ Pool) do
    {:ok, %{"pid" => pid}} = Pool.call(pool, :who)
    pid
  end

  # A call that no peer answers.
  defp hold(pool \\ Pool), do: Task.async(fn -> Pool.call(pool, :hold, %{}, 60_000) end)

  defp pending, do: Pool.status().peers |> Enum.map(& &1.pending) |> Enum.sort()

  describe "start_link/1" do
    test "has 3 peers under the pool's usual name; the pool goes by its name or pid" do
      pool = start_up()
      assert Process.whereis(Pool) == pool
      assert [Pool.Bridge1, Pool.Bridge2, Pool.Bridge3] = bridges()
      assert bridges(pool) == bridges()
      assert Pool.status().nodes == [node()]
      os_pids = Enum.map(Pool.status().peers, & &1.os_pid)
      assert length(Enum.uniq(os_pids)) == 3
      assert pid_of(pool) in os_pids

      assert {:ok, %{"pid" => _}} = Pool.call(:who)
      assert {:ok, %{"pid" => _}} = Pool.call("who", %{})
      assert {:ok, %{"pid" => _}} = Pool.call(Pool, "who")
      assert {:ok, %{"pid" => _}} = Pool.call(:who, %{}, 5_000)
      assert {:ok, %{"pid" => _}} = Pool.call(pool, :who, %{})
      assert {:ok, %{"pid" => _}} = Pool.call(pool, :who, %{}, :infinity)
    end

    test "refuses a wrong option with an error that names it" do
      for {opts, text} <- [
            {[pool_size: 0], ":pool_size"},
            {[pool_size: "3"], ":pool_size"},
            {[pool_size: 100_000], ":pool_size"},
            {[name: nil], ":name"},
            {[name: {:global, :pool}], ":name"},
            {[cluster: 5], ":cluster"},
            {[cluster: ""], ":cluster"},
            {[lm: 5], ":lm"},
            {[slot: 1], ":slot"},
            {[no_such: 1], ":no_such"},
            {:text, "keyword"}
          ] do
        assert {:error, %ArgumentError{message: message}} = Pool.start_link(opts)
        assert message =~ text
      end
    end

    test "a pool that was killed is not running" do
      Process.flag(:trap_exit, true)

      {:ok, pool} =
        Pool.start_link(fake_opts("echo") |> Keyword.merge(name: __MODULE__.Killed, pool_size: 1))

      assert {:ok, _} = Pool.call(__MODULE__.Killed, :ping, %{}, 10_000)
      Process.exit(pool, :kill)
      assert_receive {:EXIT, ^pool, :killed}

      for pool <- [pool, __MODULE__.Killed],
          command <- [:ping, :cleanup],
          do: assert(Pool.call(pool, command) == {:error, :bridge_not_running})
    end

    test "a pool that ends leaves no process, and calls to it get an answer" do
      pool = start_up(env: %{"DSPY_BRIDGE_DRAIN_MS" => "100"})
      os_pids = Enum.map(Pool.status().peers, & &1.os_pid)
      held = hold()
      eventually(fn -> Enum.sum(pending()) == 1 end)
      stop_supervised!(Pool)
      assert {:error, :bridge_not_running} = Task.await(held)
      assert Enum.filter(os_pids, &alive?/1) == []

      for pool <- [pool, Pool, :no_such_pool, self(), "no pool"] do
        assert Pool.call(pool, :who, %{}, 1_000) == {:error, :bridge_not_running}
        assert Pool.checkout(pool) == {:error, :bridge_not_running}
        assert Pool.checkin(pool, Pool.Bridge1) == {:error, :bridge_not_running}
        assert Pool.status(pool) == %{peers: [], nodes: []}
      end

      assert Handle.fetch(pool) == nil
    end
  end

  describe "call/4" do
    test "counts a call out however it ends" do
      start_up(pool_size: 1, max_frame_bytes: 100_000)
      %{counters: counters} = Handle.fetch(Pool)
      assert {:ok, _} = Pool.call(:who)
      assert LoadCounters.busy(counters, 1) == 0
      assert Pool.call(:hold, %{}, 20) == {:error, :timeout}
      assert {:error, text} = Pool.call(:who, %{text: String.duplicate("x", 200_000)})
      assert text =~ "max_frame_bytes"
      held = hold()
      eventually(fn -> LoadCounters.busy(counters, 1) == 1 end)
      Task.shutdown(held, :brutal_kill)
      eventually(fn -> LoadCounters.busy(counters, 1) == 0 end)
    end

    test "waits for the first peer within its timeout" do
      start(script_path: fake("starts_late"), env: %{"FAKE_START_MS" => "2000"})
      {ms, result} = timed(fn -> Pool.call(:ping, %{}, 50) end)
      assert result == {:error, :timeout}
      assert ms < 1_000
      assert {:ok, %{"status" => "ok"}} = Pool.call(:ping, %{}, 20_000)
      refute_received _stray
    end

    test "is refused as overloaded only when all peers are" do
      start_up(pool_size: 2, max_pending: 2)
      held = for _ <- 1..4, do: hold()
      eventually(fn -> pending() == [2, 2] end)
      assert Pool.call(:who) == {:error, :overloaded}
      Task.shutdown(hd(held), :brutal_kill)
      # The monitor, which is notified, pings at once: its ping may take the slot for a moment.
      for _ <- 1..5, do: eventually(fn -> match?({:ok, _}, Pool.call(:who)) end)
      # So does the peer's own word for it.
      Task.shutdown(Enum.at(held, 1), :brutal_kill)
      assert Pool.call(:overloaded) == {:error, :overloaded}
    end

    test "that all peers refuse has the text and the meta of the last one" do
      start_up(pool_size: 2)

      assert {:error, %Error{type: :overloaded, retryable: true} = error} =
               Pool.request(:overloaded, %{})

      assert {error.message, error.meta} == {"too much to do", %{"wait_ms" => 1.5}}
    end

    test "is not sent to another peer if the overloaded one has done some of it" do
      start_up(pool_size: 2)

      assert Pool.call(:overloaded_halfway) == {:error, :overloaded}
      counts = for bridge <- bridges(), do: Bridge.call(bridge, :halfway)
      assert Enum.sort(counts) == [{:ok, %{"count" => 0}}, {:ok, %{"count" => 1}}]
    end

    test "moves to another peer when its own dies" do
      start_up(pool_size: 2)
      held = for _ <- 1..4, do: hold()
      eventually(fn -> pending() == [2, 2] end)
      [dying, other] = Pool.status().peers
      kill(dying.os_pid)

      # All four are at the other one before the dead one has a successor.
      eventually(fn -> Bridge.get_status(other.bridge).pending == 4 end)
      assert for(task <- held, do: Task.yield(task, 0)) == [nil, nil, nil, nil]
      eventually(fn -> Bridge.get_status(dying.bridge).state == :running end)
      assert {:ok, _} = Pool.call(:who)
    end

    test "is given up after 1 + max_retries peers, and never has more than two of a pool's down" do
      start_up()
      assert Pool.call(:die, %{}, 20_000) == {:error, :python_process_died}
      all_up(Pool)
      restarts = for bridge <- bridges(), do: Bridge.get_status(bridge).restarts
      assert Enum.sort(restarts) == [0, 1, 3]
    end

    test "goes on when a bridge's own process ends; it comes back" do
      start_up(pool_size: 2)
      held = for _ <- 1..2, do: hold()
      eventually(fn -> pending() == [1, 1] end)

      for bridge <- bridges() do
        pid = Process.whereis(bridge)
        Process.exit(pid, :kill)
        assert {:ok, _} = Pool.call(:who)
        eventually(fn -> Bridge.get_status(bridge).state == :running end)
      end

      # One of them has seen both bridges end.
      assert for(task <- held, do: Task.yield(task, 0)) == [nil, nil]
      Enum.each(held, &Task.shutdown(&1, :brutal_kill))
      eventually(fn -> pending() == [0, 0] end)
      %{counters: counters} = Handle.fetch(Pool)
      eventually(fn -> for(index <- [1, 2], do: LoadCounters.busy(counters, index)) == [0, 0] end)
    end
  end

  test "calls wait for a peer, also while the coordinator is restarted; one that ends is forgotten" do
    start_up(pool_size: 1)
    coordinator = Process.whereis(Pool.Coordinator)
    PoolProbe.stop_serving(Pool)
    {ms, result} = timed(fn -> Pool.call(:who, %{}, 50) end)
    assert result == {:error, :timeout}
    assert ms < 1_000
    waiting = fn -> map_size(:sys.get_state(Pool.Coordinator).waiting) end
    eventually(fn -> waiting.() == 0 end)
    [caller, other] = for _ <- 1..2, do: Task.async(fn -> Pool.call(:who, %{}, 20_000) end)
    eventually(fn -> waiting.() == 2 end)

    ExUnit.CaptureLog.capture_log(fn ->
      Process.exit(coordinator, :kill)
      eventually(fn -> Process.whereis(Pool.Coordinator) not in [coordinator, nil] end)
      eventually(fn -> waiting.() == 2 end)
    end)

    Task.shutdown(other, :brutal_kill)
    eventually(fn -> waiting.() == 1 end)
    PoolProbe.serve_again(Pool)
    assert {:ok, _} = Task.await(caller, 20_000)
    assert waiting.() == 0
  end

  describe "checkout/1 and with_bridge/2" do
    test "give the least busy bridge, which the pool goes on using" do
      start_up(pool_size: 2)
      held = hold()
      eventually(fn -> pending() == [0, 1] end)
      idle = Enum.find(Pool.status().peers, &(&1.pending == 0))
      assert {:ok, bridge} = Pool.checkout()
      assert bridge == idle.bridge
      asked = {:ok, {:ok, %{"pid" => idle.os_pid}}}
      # For some ms it counts as busier.
      eventually(fn -> Pool.with_bridge(&Bridge.call(&1, :who)) == asked end)
      assert for(peer <- Pool.status().peers, do: peer.checked_out) == [false, false]
      eventually(fn -> pid_of() == idle.os_pid end)
      assert Pool.checkin(bridge) == :ok
      Task.shutdown(held, :brutal_kill)
      assert catch_throw(Pool.with_bridge(fn _ -> throw(:mine) end)) == :mine
      assert_raise ArgumentError, ~r/with_bridge/, fn -> Pool.with_bridge(Pool, :who) end
    end

    test "spread over the bridges; without a running peer the pool is exhausted" do
      start_up(pool_size: 2)
      assert Enum.sort(for _ <- 1..2, do: elem(Pool.checkout(), 1)) == bridges()
      PoolProbe.stop_serving(Pool)
      assert Pool.checkout() == {:error, :pool_exhausted}
      assert Pool.with_bridge(fn _ -> flunk() end) == {:error, :pool_exhausted}
    end
  end
end
