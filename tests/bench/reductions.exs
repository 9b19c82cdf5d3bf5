# What a call costs in the BEAM: reductions of the caller and of the server for one call, and calls per second of 256
# callers by the BEAM's CPU time; `Bridge` and `Pool` beside the least server. Reductions do not depend on what else the
# machine does.
#
#     cd elixir_harness && DSPY_BRIDGE_PYTHON=… mix run ../tests/bench/reductions.exs

Code.require_file("least_server.exs", __DIR__)

defmodule Bench.Reductions do
  alias DSPex.PythonBridge.{Bridge, Pool}
  alias Bench.LeastServer

  @script Path.expand("../../elixir_harness/priv/python/dspy_bridge.py", __DIR__)
  @calls 10_000
  @rounds 5

  def run do
    servers = start()

    calls = [
      least: {servers.least, &LeastServer.call(&1, :ping, %{}, 5_000)},
      bridge: {servers.bridge, &Bridge.call(&1, :ping, %{}, 5_000)},
      bridge_by_name: {servers.named, fn _pid -> Bridge.call(:ping) end},
      bridge_request: {servers.bridge, &Bridge.request(&1, :ping, %{}, timeout: 5_000)},
      pool: {servers.of_pool, fn _pid -> Pool.call(:bench, :ping, %{}, 5_000) end},
      pool_request: {servers.of_pool, fn _pid -> Pool.request(:bench, :ping, %{}, timeout: 5_000) end}
    ]

    for {_name, {pid, call}} <- calls, do: reductions(pid, call, 1_000)

    rounds = for _ <- 1..@rounds, do: Map.new(calls, fn {name, {pid, call}} -> {name, reductions(pid, call, @calls)} end)
    least = median(for round <- rounds, do: sum(round.least))

    for {name, _call} <- calls do
      {caller, server} = {median(for(round <- rounds, do: elem(round[name], 0))), median(for(round <- rounds, do: elem(round[name], 1)))}
      ratio = Float.round((caller + server) / least, 3)
      IO.puts("#{name}: #{Float.round(caller + server, 1)} reductions (caller #{Float.round(caller, 1)}, server #{Float.round(server, 1)}), #{ratio}x")
    end

    tokens(servers)
    crowd(calls)
  end

  defp start do
    python = System.fetch_env!("DSPY_BRIDGE_PYTHON")
    opts = [python_executable: python, lm: "offline/echo"]
    {:ok, least} = LeastServer.start({python, [@script]})
    {:ok, bridge} = Bridge.start_link([name: nil] ++ opts)
    # That of the application.
    named = Process.whereis(Bridge)
    {:ok, _} = Bridge.call(:ping, %{}, 60_000)
    {:ok, _} = Pool.start_link([name: :bench, pool_size: 1] ++ opts)
    %{peers: [%{bridge: of_pool}]} = Pool.status(:bench)
    {:ok, _} = Pool.call(:bench, :ping, %{}, 60_000)
    {:ok, _} = Bridge.call(bridge, :create_program, %{id: "qa", signature: "question -> answer"}, 60_000)
    %{least: least, bridge: bridge, named: named, of_pool: Process.whereis(of_pool)}
  end

  # Of the caller and of the server, for a call.
  defp reductions(pid, call, count) do
    Task.await(
      Task.async(fn ->
        before = {used(self()), used(pid)}
        repeat(count, pid, call)
        now = {used(self()), used(pid)}
        {(elem(now, 0) - elem(before, 0)) / count, (elem(now, 1) - elem(before, 1)) / count}
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
  defp sum({caller, server}), do: caller + server
  defp median(list), do: list |> Enum.sort() |> Enum.at(div(length(list), 2))

  # All of the node: the caller, the proxy and the bridge.
  defp tokens(%{bridge: bridge}) do
    args = %{program_id: "qa", inputs: %{question: Enum.map_join(1..2000, " ", &"#{&1}")}}

    rounds =
      for _ <- 1..@rounds do
        {before, _} = :erlang.statistics(:reductions)
        chunks = bridge |> Bridge.stream(args, timeout: 60_000) |> Enum.count(&match?({:chunk, _, _}, &1))
        {now, _} = :erlang.statistics(:reductions)
        (now - before) / chunks
      end

    IO.puts("a streamed token: #{Float.round(median(rounds), 1)} reductions")
  end

  # 256 callers at once: CPU of the BEAM for a call, in µs, and calls per second; in alternation.
  defp crowd(calls) do
    calls = Keyword.take(calls, [:least, :bridge, :pool])
    rounds = for _ <- 1..7, do: Map.new(calls, fn {name, {pid, call}} -> {name, crowd_of(pid, call)} end)

    for name <- [:bridge, :pool], {what, at} <- [cpu: 0, wall: 1] do
      ratio = median(for round <- rounds, do: elem(round.least, at) / elem(round[name], at))
      each = median(for round <- rounds, do: elem(round[name], at))
      IO.puts("256 callers, #{name}, #{what}: #{Float.round(each, 2)} us a call; #{Float.round(ratio, 3)} of the least server's throughput")
    end
  end

  defp crowd_of(pid, call) do
    each = 200
    {cpu, _} = :erlang.statistics(:runtime)

    {us, _} =
      :timer.tc(fn ->
        1..256 |> Enum.map(fn _ -> Task.async(fn -> repeat(each, pid, call) end) end) |> Task.await_many(:infinity)
      end)

    {now, _} = :erlang.statistics(:runtime)
    {(now - cpu) * 1000 / (256 * each), us / (256 * each)}
  end
end

Logger.configure(level: :warning)
Bench.Reductions.run()
