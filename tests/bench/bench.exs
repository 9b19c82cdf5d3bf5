# The measuring part of `make bench`: a line of JSON for each figure. Started by run.py, once with BEAM and peers on one
# CPU (`pinned`: round trips; else where the kernel puts the two moves either side of a ratio up to 4x), once without
# (`free`: throughput).

defmodule Bench do
  alias DSPex.PythonBridge.{Bridge, Pool}

  @here __DIR__
  @script Path.expand("../../elixir_harness/priv/python/dspy_bridge.py", @here)
  @model "openai/gpt-4o-mini"

  def python, do: System.fetch_env!("DSPY_BRIDGE_PYTHON")
  def report(name, value), do: IO.puts(JSON.encode!(%{name: name, value: value}))
  def median(list), do: list |> Enum.sort() |> Enum.at(div(length(list), 2))

  def ms(fun) do
    {us, result} = :timer.tc(fun)
    {us / 1000, result}
  end

  ## Raw ports

  def open(args, env \\ []) do
    Port.open({:spawn_executable, python()}, [{:packet, 4}, :binary, args: args, env: env])
  end

  def peer, do: open([@script])
  def echo, do: open([Path.join(@here, "echo_peer.py")])
  def serial, do: open([Path.join(@here, "serial_peer.py")])

  def ping(args \\ ~s({})) do
    ~s({"id":1,"command":"ping","args":#{args},"timestamp":"2026-01-01T00:00:00Z"})
  end

  def ask(port, payload) do
    Port.command(port, payload)

    receive do
      {^port, {:data, reply}} -> reply
    end
  end

  def round_trips(port, payload, count) do
    {ms, _} = ms(fn -> Enum.each(1..count, fn _ -> ask(port, payload) end) end)
    ms * 1000 / count
  end

  def pipelined(port, payload, count, window) do
    {ms, _} =
      ms(fn ->
        Enum.each(1..window, fn _ -> Port.command(port, payload) end)

        Enum.each(1..count, fn n ->
          receive do
            {^port, {:data, _}} -> if n <= count - window, do: Port.command(port, payload)
          end
        end)
      end)

    count * 1000 / ms
  end

  def first_ping(open) do
    {ms, port} = ms(fn -> tap(open.(), &ask(&1, ping())) end)
    # Killed: its orderly end would take CPU from the next one's start.
    {:os_pid, pid} = Port.info(port, :os_pid)
    Port.close(port)
    System.cmd("kill", ["-9", "#{pid}"], stderr_to_stdout: true)
    ms
  end

  ## Bridge

  def bridge(lm_port, opts \\ []) do
    options = %{api_base: "http://127.0.0.1:#{lm_port}/v1", api_key: "x", cache: false}

    {:ok, bridge} =
      Bridge.start_link(
        [name: nil, python_executable: python(), lm: @model, lm_options: options] ++ opts
      )

    {:ok, _} = Bridge.call(bridge, :ping, %{}, 30_000)
    bridge
  end

  def create(bridge, id) do
    args = %{id: id, signature: "question -> answer"}
    {:ok, _} = Bridge.call(bridge, :create_program, args, 60_000)
  end

  def execute(bridge, id, number) do
    args = %{program_id: id, inputs: %{question: "question #{number}"}}
    {:ok, %{"answer" => "Paris"}} = Bridge.call(bridge, :execute_program, args, 120_000)
  end

  # `count` runs of `fun`, `at_once` at a time; in ms.
  def spread(count, at_once, fun) do
    {ms, _} =
      ms(fn ->
        1..count
        |> Task.async_stream(fun, max_concurrency: at_once, timeout: :infinity, ordered: false)
        |> Stream.run()
      end)

    ms
  end

  def calls_per_second(processes, each, fun) do
    ms =
      spread(processes, processes, fn _ -> Enum.each(1..each, fn _ -> fun.() end) end)

    processes * each * 1000 / ms
  end

  def rss(bridge) do
    {:ok, stats} = Bridge.call(bridge, :get_stats, %{}, 30_000)
    stats["memory_usage"]["rss"]
  end

  def lm(delay) do
    port = Port.open({:spawn_executable, python()}, [:binary, {:line, 100}, args: [Path.join(@here, "lm.py"), "#{delay}"]])

    receive do
      {^port, {:data, {:eol, number}}} -> String.to_integer(number)
    end
  end

  def plain(lm_port, count, at_once) do
    options = JSON.encode!(%{api_base: "http://127.0.0.1:#{lm_port}/v1", api_key: "x", cache: false})
    args = [Path.join(@here, "plain_dspy.py"), options, "#{count}", "#{at_once}"]
    {out, 0} = System.cmd(python(), args)
    JSON.decode!(out)
  end

  ## The HTTP sidecar

  def sidecar(lm_port) do
    # mix leaves out what no dependency names.
    Enum.each([:public_key, :ssl, :inets], &Mix.ensure_application!/1)
    {:ok, _} = Application.ensure_all_started(:inets)
    :ok = :httpc.set_options(max_sessions: 256, max_keep_alive_length: 100_000)
    {:ok, socket} = :gen_tcp.listen(0, ip: {127, 0, 0, 1})
    {:ok, port} = :inet.port(socket)
    :gen_tcp.close(socket)
    options = JSON.encode!(%{api_base: "http://127.0.0.1:#{lm_port}/v1", api_key: "x", cache: false})
    started = System.monotonic_time(:microsecond)
    process = open([Path.join(@here, "sidecar.py"), options, "#{port}"])
    wait_for(port)
    {:ok, _} = post(port, "/ping", "{}")
    {process, port, (System.monotonic_time(:microsecond) - started) / 1000}
  end

  defp wait_for(port) do
    case :gen_tcp.connect({127, 0, 0, 1}, port, []) do
      {:ok, socket} -> :gen_tcp.close(socket)
      {:error, :econnrefused} -> wait_for(port)
    end
  end

  def post(port, path, body) do
    url = ~c"http://127.0.0.1:#{port}#{path}"

    case :httpc.request(:post, {url, [], ~c"application/json", body}, [], body_format: :binary) do
      {:ok, {{_, 200, _}, _, reply}} -> {:ok, JSON.decode!(reply)}
      other -> {:error, other}
    end
  end

  def stop(process) do
    {:os_pid, pid} = Port.info(process, :os_pid)
    Port.close(process)
    System.cmd("kill", ["#{pid}"])
  end

  ## What is measured

  def pinned do
    {peer, echo, serial} = {peer(), echo(), serial()}
    bridge = bridge(1)
    for port <- [peer, echo, serial], do: round_trips(port, ping(), 500)

    rounds =
      for _ <- 1..7 do
        %{
          echo: round_trips(echo, ping(), 3000),
          peer: round_trips(peer, ping(), 3000),
          bridge: call_round_trip(bridge, 3000)
        }
      end

    report("round trip us", Map.new([:echo, :peer, :bridge], &{&1, median(Enum.map(rounds, fn r -> r[&1] end))}))

    piped =
      for _ <- 1..5 do
        Map.new([echo: echo, peer: peer, serial: serial], fn {name, port} ->
          {name, pipelined(port, ping(), 8000, 256)}
        end)
      end

    report("pipelined per s", Map.new([:echo, :peer, :serial], &{&1, median(Enum.map(piped, fn r -> r[&1] end))}))

    big = ping(~s({"text":"#{String.duplicate("lorem ipsum ", 87_381)}"}))

    megabyte =
      for _ <- 1..7, do: %{peer: round_trips(peer, big, 20), serial: round_trips(serial, big, 20)}

    report("1 MB ms", Map.new([:peer, :serial], &{&1, median(Enum.map(megabyte, fn r -> r[&1] / 1000 end))}))

    {process, port, first} = sidecar(1)
    report("sidecar first ping ms", first)
    for _ <- 1..200, do: post(port, "/ping", "{}")
    {ms, _} = ms(fn -> for _ <- 1..1000, do: {:ok, _} = post(port, "/ping", "{}") end)
    report("sidecar round trip us", ms)
    body = JSON.encode!(%{text: String.duplicate("lorem ipsum ", 87_381)})
    {ms, _} = ms(fn -> for _ <- 1..50, do: {:ok, _} = post(port, "/ping", body) end)
    report("sidecar 1 MB ms", ms / 50)
    stop(process)
    pool()
  end

  # A pool of one peer next to a bridge. With more peers consecutive pings go to different processes, which on one CPU evict
  # each other's caches: two bridges in turn take 1.5x the time of one, too.
  def pool do
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
    report("Pool.request", ratio(for _ <- 1..25, do: both.(&requests(&1, &2, 1000))))
    report("Pool.stream", ratio(for _ <- 1..9, do: both.(fn module, server -> for(_ <- 1..20, do: tokens(module, server)) |> mean() end)))
    Bridge.stop(bridge)
    Supervisor.stop(:bench)
  end

  defp ratio(rounds), do: %{ratio: median(Enum.map(rounds, &(&1.pool / &1.bridge))), us: median(Enum.map(rounds, & &1.pool))}
  defp mean(list), do: Enum.sum(list) / length(list)

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

  defp call_round_trip(bridge, count) do
    {ms, _} = ms(fn -> Enum.each(1..count, fn _ -> {:ok, _} = Bridge.call(bridge, :ping, %{}, 5000) end) end)
    ms * 1000 / count
  end

  def free do
    starts = for _ <- 1..9, do: %{peer: first_ping(&peer/0), serial: first_ping(&serial/0)}
    report("first ping ms", Map.new([:peer, :serial], &{&1, median(Enum.map(starts, fn r -> r[&1] end))}))

    lm = lm(0)
    bridge = bridge(lm)
    create(bridge, "qa")

    rates = for _ <- 1..5, do: calls_per_second(256, 400, fn -> {:ok, _} = Bridge.call(bridge, :ping, %{}, 5000) end)
    report("calls per s", median(rates))
    beside_large(bridge)

    spread(64, 64, &execute(bridge, "qa", &1))

    runs =
      for _ <- 1..5 do
        plain = plain(lm, 500, 64)
        %{plain: plain["seconds"] * 1000, rss_plain: plain["rss"], bridge: spread(500, 64, &execute(bridge, "qa", &1))}
      end

    report("500 runs ms", %{
      plain: median(Enum.map(runs, & &1.plain)),
      bridge: median(Enum.map(runs, & &1.bridge)),
      ratio: median(Enum.map(runs, &(&1.plain / &1.bridge)))
    })

    report("rss", %{plain: median(Enum.map(runs, & &1.rss_plain)), bridge: rss(bridge)})
    programs(bridge)
    stop_bridge(bridge)

    {process, port, _} = sidecar(lm)
    question = fn n -> JSON.encode!(%{question: "question #{n}"}) end
    spread(64, 64, fn n -> {:ok, _} = post(port, "/predict", question.(n)) end)
    report("sidecar calls per s", calls_per_second(256, 20, fn -> {:ok, _} = post(port, "/ping", "{}") end))
    report("sidecar 500 runs ms", spread(500, 64, fn n -> {:ok, _} = post(port, "/predict", question.(n)) end))
    stop(process)

    many(lm)
    waiting()
    restart()
  end

  # 16,000 calls that one peer has, from the moment that it answers: another serves by then, or none.
  defp restart do
    rounds = for _ <- 1..5, do: %{without: held(fn _bridge -> :ok end), with: held(&Bridge.restart/1)}
    [without, with] = for key <- [:without, :with], do: median(Enum.map(rounds, & &1[key]))
    report("16,000 in a restart", %{ratio: with / without, ms: with})
  end

  defp held(meanwhile) do
    go = Path.join(System.tmp_dir!(), "dspy_bridge_bench_#{System.unique_integer([:positive])}")
    env = %{"FAKE_FILE" => go, "DSPY_BRIDGE_DRAIN_MS" => "600000"}
    holds = Path.expand("../fakes/replies/holds.py", @here)
    {:ok, bridge} = Bridge.start_link(name: nil, python_executable: python(), script_path: holds, env: env)
    calls = for _ <- 1..16_000, do: Task.async(fn -> {:ok, _} = Bridge.call(bridge, :hold, %{}, :infinity) end)
    wait_until(fn -> Bridge.get_status(bridge).pending == 16_000 end)
    # It has read them all.
    {:ok, _} = Bridge.call(bridge, :ping, %{}, 60_000)
    :ok = meanwhile.(bridge)

    {ms, _} =
      ms(fn ->
        File.write!(go, "")
        Task.await_many(calls, :infinity)
      end)

    stop_bridge(bridge)
    File.rm!(go)
    ms
  end

  defp wait_until(fun), do: fun.() || (Process.sleep(5) && wait_until(fun))

  # Small pings of one process while another sends 5 MB at a time.
  defp beside_large(bridge) do
    pinger = Task.async(fn -> pings(bridge, []) end)
    large = %{text: String.duplicate("lorem ipsum ", 436_906)}
    {ms, _} = ms(fn -> for _ <- 1..40, do: {:ok, _} = Bridge.call(bridge, :ping, large, 30_000) end)
    send(pinger.pid, :enough)
    report("during 5 MB", %{ping_p99_ms: p99_ms(Task.await(pinger)), large_ms: ms / 40})
  end

  # 10,000 programs in addition to the one that is called.
  defp programs(bridge) do
    one = for _ <- 1..7, do: spread(500, 64, &execute(bridge, "qa", &1))
    before = rss(bridge)
    spread(10_000, 64, &create(bridge, "p#{&1}"))
    each = (rss(bridge) - before) / 10_000
    many = for _ <- 1..7, do: spread(500, 64, &execute(bridge, "p#{&1 * 17}", &1))
    report("10,000 programs", %{ratio: median(many) / median(one), bytes_each: each})
  end

  # 512 runs of 1 s at once: at best the LM's second and what DSPy needs for 512 calls.
  defp many(free_lm) do
    lm = lm(1)
    bridge = bridge(lm, env: %{"DSPY_BRIDGE_MAX_IN_FLIGHT" => "512"})
    create(bridge, "qa")
    spread(512, 512, &execute(bridge, "qa", &1))
    took = for _ <- 1..3, do: spread(512, 512, &execute(bridge, "qa", &1))
    rate = 500 / plain(free_lm, 500, 64)["seconds"]
    report("512 of 1 s", %{ms: median(took), possible_ms: 1000 + 512 / rate * 1000, alone_ms: plain(lm, 512, 512)["seconds"] * 1000})
    stop_bridge(bridge)
  end

  # 320 runs of 0.2 s, 64 at once, and pings meanwhile.
  defp waiting do
    bridge = bridge(lm(0.2))
    create(bridge, "qa")
    spread(64, 64, &execute(bridge, "qa", &1))
    one_by_one = spread(15, 1, &execute(bridge, "qa", &1)) / 15 * 320
    pinger = Task.async(fn -> pings(bridge, []) end)
    together = spread(320, 64, &execute(bridge, "qa", &1))
    send(pinger.pid, :enough)
    p99 = p99_ms(Task.await(pinger))
    report("320 of 0.2 s", %{ratio: one_by_one / together, ping_p99_ms: p99})
    stop_bridge(bridge)
  end

  defp p99_ms(us), do: us |> Enum.sort() |> Enum.at(floor(length(us) * 0.99)) |> Kernel./(1000)

  defp pings(bridge, took) do
    receive do
      :enough -> took
    after
      1 ->
        {us, {:ok, _}} = :timer.tc(fn -> Bridge.call(bridge, :ping, %{}, 5000) end)
        pings(bridge, [us | took])
    end
  end

  defp stop_bridge(bridge), do: Bridge.stop(bridge)
end

Logger.configure(level: :warning)

case System.argv() do
  ["pinned"] -> Bench.pinned()
  ["free"] -> Bench.free()
  ["pool"] -> Bench.pool()
end
