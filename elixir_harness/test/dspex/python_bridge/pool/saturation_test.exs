defmodule DSPex.PythonBridge.Pool.SaturationTest do
  @moduledoc "A peer of a pool that gets more than it can read: slow but alive."

  # It configures all monitors.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Monitor, Pool}
  alias DSPex.PythonBridge.Pool.Handle

  @pool __MODULE__.Pool
  # More than a pipe and the port before it take.
  @big String.duplicate("x", 200_000)

  @tag :capture_log
  test "a slow peer is not replaced as long as it sends something, however late pings get through" do
    put_config(:python_bridge_monitor, timeout: 500)
    opts = "reads_slowly" |> fake_opts() |> Keyword.delete(:name)
    start_supervised!({Pool, [name: @pool, pool_size: 1] ++ opts})
    assert {:ok, %{"pid" => os_pid}} = Pool.call(@pool, :who, %{}, 10_000)

    # One and a half seconds' work; a ping behind it is missed three times over.
    calls = for _ <- 1..30, do: Task.async(fn -> Pool.call(@pool, :who, %{x: @big}, 30_000) end)
    eventually(fn -> match?([%{pending: n}] when n > 5, Pool.status(@pool).peers) end)
    assert Pool.call(@pool, :who, %{}, 1) == {:error, :timeout}

    assert calls |> Task.await_many(30_000) |> Enum.uniq() == [{:ok, %{"pid" => os_pid}}]
    # The monitor has asked, and by then it may have been answered.
    eventually(fn -> Monitor.get_health_status(Handle.monitor(@pool, 1)).status == :healthy end)
    assert [%{os_pid: ^os_pid}] = Pool.status(@pool).peers
  end
end
