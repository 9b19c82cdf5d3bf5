# Rows that are measured with BEAM and peers on one CPU: else where the kernel puts the two moves either side of a ratio up
# to 4x.

defmodule Bench.Pinned do
  import Bench

  alias DSPex.PythonBridge.{Bridge, Pool}

  def rows do
    [
      {"round-trip", &round_trip/0},
      {"pipelined", &pipelined/0},
      {"megabyte", &megabyte/0},
      {"pool", &pool/0},
      {"sidecar-pings", &sidecar_pings/0}
    ]
  end

  # As the Bridge writes it, and as Elixir writes a map, whose keys are sorted.
  @sorted ~s({"args":{},"command":"ping","id":1})

  defp round_trip do
    {peer, echo} = {peer(), echo()}
    bridge = bridge(1)
    for port <- [peer, echo], do: round_trips(port, ping(), 500)

    rounds(9, [peer_ratio: {:peer, :echo}, sorted_ratio: {:sorted, :echo_sorted}, bridge_ratio: {:bridge, :echo}], fn ->
      %{
        echo: round_trips(echo, ping(), 3000),
        peer: round_trips(peer, ping(), 3000),
        echo_sorted: round_trips(echo, @sorted, 3000),
        sorted: round_trips(peer, @sorted, 3000),
        bridge: call_round_trip(bridge, 3000)
      }
    end)
  end

  defp call_round_trip(bridge, count) do
    {ms, _} = ms(fn -> Enum.each(1..count, fn _ -> {:ok, _} = Bridge.call(bridge, :ping, %{}, 5000) end) end)
    ms * 1000 / count
  end

  defp pipelined do
    {peer, echo, serial} = {peer(), echo(), serial()}
    for port <- [peer, echo, serial], do: round_trips(port, ping(), 500)

    rounds(5, [to_echo: {:peer, :echo}, to_serial: {:peer, :serial}], fn ->
      Map.new([echo: echo, peer: peer, serial: serial], fn {name, port} -> {name, pipelined(port, ping(), 8000, 256)} end)
    end)
  end

  defp megabyte do
    {peer, serial} = {peer(), serial()}
    big = ping(~s({"text":"#{String.duplicate("lorem ipsum ", 87_381)}"}))
    for port <- [peer, serial], do: round_trips(port, big, 5)

    rounds(7, [ratio: {:peer, :serial}], fn ->
      %{peer: round_trips(peer, big, 20) / 1000, serial: round_trips(serial, big, 20) / 1000}
    end)
  end

  defp sidecar_pings do
    {process, port, first} = sidecar(1)
    for _ <- 1..200, do: post(port, "/ping", "{}")
    {trip, _} = ms(fn -> for _ <- 1..1000, do: {:ok, _} = post(port, "/ping", "{}") end)
    body = JSON.encode!(%{text: String.duplicate("lorem ipsum ", 87_381)})
    {big, _} = ms(fn -> for _ <- 1..50, do: {:ok, _} = post(port, "/ping", body) end)
    stop(process)
    %{first_ms: first, trip_us: trip, megabyte_ms: big / 50}
  end

  # A pool of one peer next to a bridge. With more peers consecutive pings go to different processes, which on one CPU evict
  # each other's caches: two bridges in turn take 1.5x the time of one, too.
  defp pool do
    opts = [python_executable: python(), lm: "offline/echo"]
    {:ok, bridge} = Bridge.start_link([name: nil] ++ opts)
    {:ok, _} = Pool.start_link([name: :bench, pool_size: 1] ++ opts)
    servers = [bridge: {Bridge, bridge}, pool: {Pool, :bench}]

    for {_, {module, server}} <- servers do
      args = %{id: "qa", signature: "question -> answer"}
      {:ok, _} = module.call(server, :create_program, args, 60_000)
      tokens(module, server)
    end

    both = fn fun -> Map.new(servers, fn {name, {module, server}} -> {name, fun.(module, server)} end) end
    both.(&requests(&1, &2, 1000))
    requests = rounds(25, [ratio: {:pool, :bridge}], fn -> both.(&requests(&1, &2, 1000)) end)

    streams =
      rounds(9, [ratio: {:pool, :bridge}], fn ->
        both.(fn module, server -> Enum.sum(for _ <- 1..20, do: tokens(module, server)) / 20 end)
      end)

    Bridge.stop(bridge)
    Supervisor.stop(:bench)
    %{request_us: requests.pool, request_ratio: requests.ratio, chunk_us: streams.pool, chunk_ratio: streams.ratio}
  end

  defp requests(module, server, count) do
    {ms, _} = ms(fn -> Enum.each(1..count, fn _ -> {:ok, _, _} = module.request(server, :ping, %{}, timeout: 5000) end) end)
    ms * 1000 / count
  end

  # The BEAM's CPU for each chunk of a stream, in µs. That of Python does not depend on who asks.
  defp tokens(module, server) do
    args = %{program_id: "qa", inputs: %{question: Enum.map_join(1..2000, " ", &"#{&1}")}}
    {before, _} = :erlang.statistics(:runtime)
    chunks = server |> module.stream(args, timeout: 60_000) |> Enum.count(&match?({:chunk, _, _}, &1))
    {now, _} = :erlang.statistics(:runtime)
    true = chunks > 500
    (now - before) * 1000 / chunks
  end
end
