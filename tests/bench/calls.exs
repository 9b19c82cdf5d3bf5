# What a call costs in the BEAM, next to the least server with the same guarantees: reductions of the caller and of the
# server, which do not depend on what else the machine does; and the BEAM's CPU with 256 callers at once.

defmodule Bench.Calls do
  import Bench

  alias Bench.LeastServer
  alias DSPex.PythonBridge.{Bridge, Pool}

  @script Path.expand("../../elixir_harness/priv/python/dspy_bridge.py", __DIR__)
  @calls 10_000

  def figures do
    opts = [python_executable: python(), lm: "offline/echo"]
    {:ok, least} = LeastServer.start({python(), [@script]})
    {:ok, bridge} = Bridge.start_link([name: nil] ++ opts)
    {:ok, pool} = Pool.start_link([name: :bench, pool_size: 1] ++ opts)
    {:ok, _} = Pool.call(:bench, :ping, %{}, 60_000)
    %{peers: [%{bridge: of_pool}]} = Pool.status(:bench)

    calls = [
      least: {least, &LeastServer.call(&1, :ping, %{}, 5_000)},
      bridge: {bridge, &Bridge.call(&1, :ping, %{}, 5_000)},
      pool: {Process.whereis(of_pool), fn _bridge -> Pool.call(:bench, :ping, %{}, 5_000) end}
    ]

    for {_name, {pid, call}} <- calls, do: reductions(pid, call, 1_000)

    each = fn measure -> fn -> Map.new(calls, fn {name, {pid, call}} -> {name, measure.(pid, call)} end) end end
    used = rounds(5, [ratio: {:bridge, :least}, pool_ratio: {:pool, :least}], each.(&reductions(&1, &2, @calls)))
    # Of the throughput of the least server.
    crowd = rounds(7, [crowd_ratio: {:least, :bridge}, crowd_pool_ratio: {:least, :pool}], each.(&crowd/2))
    GenServer.stop(least)
    Bridge.stop(bridge)
    Supervisor.stop(pool)
    Map.merge(used, Map.take(crowd, [:crowd_ratio, :crowd_pool_ratio]))
  end

  # Of the caller and of the server, for a call.
  defp reductions(pid, call, count) do
    Task.await(
      Task.async(fn ->
        before = used(self()) + used(pid)
        repeat(count, pid, call)
        (used(self()) + used(pid) - before) / count
      end),
      :infinity
    )
  end

  defp repeat(0, _pid, _call), do: :ok

  defp repeat(count, pid, call) do
    true = elem(call.(pid), 0) == :ok
    repeat(count - 1, pid, call)
  end

  defp used(pid), do: pid |> Process.info(:reductions) |> elem(1)

  # The BEAM's CPU for a call, with 256 callers at once.
  defp crowd(pid, call) do
    {before, _} = :erlang.statistics(:runtime)
    spread(256, 256, fn _ -> repeat(200, pid, call) end)
    {now, _} = :erlang.statistics(:runtime)
    now - before
  end
end
