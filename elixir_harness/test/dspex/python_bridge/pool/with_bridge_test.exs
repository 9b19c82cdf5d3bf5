defmodule DSPex.PythonBridge.Pool.WithBridgeTest do
  @moduledoc "`Pool.with_bridge`, and checkouts that are undone: no bridge stays checked out by nobody."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Pool}
  alias DSPex.PythonBridge.Pool.{CoordinatorClient, Handle}

  setup tags do
    name = Module.concat(__MODULE__, "Pool#{System.unique_integer([:positive])}")
    opts = Keyword.put(fake_opts("who", pool_size: tags[:size] || 1), :name, name)
    start_supervised!({Pool, opts})
    eventually(fn -> Enum.all?(Pool.status(name).peers, &(&1.state == :running)) end, 20_000)
    %{pool: name, coordinator: Handle.coordinator(name)}
  end

  defp checked_out(pool), do: Enum.count(Pool.status(pool).peers, & &1.checked_out)

  test "gives what its function returns, and checks the bridge in", %{pool: pool} do
    assert {:ok, {:mine, pid}} =
             Pool.with_bridge(pool, fn bridge ->
               assert checked_out(pool) == 1
               {:ok, %{"pid" => pid}} = Bridge.call(bridge, :who)
               {:mine, pid}
             end)

    assert checked_out(pool) == 0
    assert {:ok, %{"pid" => ^pid}} = Pool.call(pool, :who)
    assert Pool.with_bridge(:no_pool, & &1) == {:error, :bridge_not_running}
    assert_raise ArgumentError, ~r/with_bridge/, fn -> Pool.with_bridge(pool, :who) end
  end

  test "passes on what its function raises, throws or exits with", %{pool: pool} do
    assert_raise RuntimeError, "mine", fn -> Pool.with_bridge(pool, fn _ -> raise "mine" end) end
    assert catch_throw(Pool.with_bridge(pool, fn _ -> throw(:mine) end)) == :mine
    assert catch_exit(Pool.with_bridge(pool, fn _ -> exit(:mine) end)) == :mine
    assert checked_out(pool) == 0
    assert {:ok, _} = Pool.call(pool, :who)
  end

  @tag size: 2
  test "within another one has another bridge, until there is none", %{pool: pool} do
    assert {:ok, {:ok, [one, two]}} =
             Pool.with_bridge(pool, fn one ->
               Pool.with_bridge(pool, fn two ->
                 assert Pool.with_bridge(pool, fn _ -> flunk() end) == {:error, :pool_exhausted}
                 [one, two]
               end)
             end)

    assert one != two
    assert checked_out(pool) == 0
  end

  test "is checked in when its process is killed", %{pool: pool} do
    test = self()

    borrower =
      spawn(fn ->
        Pool.with_bridge(pool, fn _ ->
          send(test, :mine)
          Process.sleep(:infinity)
        end)
      end)

    assert_receive :mine, 5_000
    assert Pool.with_bridge(pool, & &1) == {:error, :pool_exhausted}
    Process.exit(borrower, :kill)
    assert eventually(fn -> match?({:ok, _}, Pool.with_bridge(pool, & &1)) end)
  end

  test "does not check in what its function has, and another process has checked out", context do
    %{pool: pool} = context

    assert {:ok, _} =
             Pool.with_bridge(pool, fn bridge ->
               :ok = Pool.checkin(pool, bridge)
               {borrower, [{:ok, ^bridge}]} = DSPex.Test.PoolProbe.check_out_all(pool)
               send(self(), {:borrower, borrower})
             end)

    assert checked_out(pool) == 1
    assert_received {:borrower, borrower}
    send(borrower, :end)
    eventually(fn -> checked_out(pool) == 0 end)
  end

  @tag :capture_log
  test "is checked in by the next coordinator, if this one is killed before it has heard of it",
       context do
    %{pool: pool, coordinator: coordinator} = context

    assert {:ok, :done} =
             Pool.with_bridge(pool, fn _bridge ->
               old = Process.whereis(coordinator)
               :sys.suspend(old)
               # It has the question by then, and never reads it.
               spawn(fn ->
                 eventually(fn ->
                   {:message_queue_len, 1} == Process.info(old, :message_queue_len)
                 end)

                 Process.exit(old, :kill)
               end)

               :done
             end)

    eventually(fn -> Process.whereis(coordinator) && checked_out(pool) == 0 end)
  end

  describe "a checkout whose caller waits no more" do
    test "is undone by the coordinator, when that goes on", context do
      %{pool: pool, coordinator: coordinator} = context
      :sys.suspend(coordinator)
      assert CoordinatorClient.checkout(Handle.fetch(pool), 20) == {:error, :bridge_not_running}
      :sys.resume(coordinator)
      # This process lives, and had the bridge for a moment.
      assert {:ok, _bridge} = Pool.checkout(pool)
      assert checked_out(pool) == 1
    end

    # The coordinator has made the checkout and was killed before its reply; the next one comes late.
    @tag :capture_log
    test "is undone by the next coordinator, however late that comes", context do
      %{pool: pool, coordinator: name} = context
      handle = Handle.fetch(pool)
      coordinator = Process.whereis(name)
      :sys.suspend(coordinator)
      parent = Process.whereis(pool)
      test = self()
      ref = make_ref()

      borrower =
        spawn(fn ->
          send(test, {:answer, CoordinatorClient.checkout(handle, 5_000, ref)})
          Process.sleep(:infinity)
        end)

      eventually(fn ->
        {:message_queue_len, 1} == Process.info(coordinator, :message_queue_len)
      end)

      # As far as it has got.
      :ets.insert(handle.checkouts, {1, borrower, make_ref(), ref})
      DSPex.PythonBridge.Calls.LoadCounters.check_out(handle.counters, 1)
      :sys.suspend(parent)
      Process.exit(coordinator, :kill)
      assert_receive {:answer, {:error, :bridge_not_running}}, 5_000
      :sys.resume(parent)
      eventually(fn -> Process.whereis(name) not in [nil, coordinator] end)
      assert {:ok, _bridge} = Pool.checkout(pool)
      assert Process.alive?(borrower)
    end
  end
end
