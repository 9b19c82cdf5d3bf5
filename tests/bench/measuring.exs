# What the rows of the benchmark use: peers, baselines, LMs, and how a figure is taken.

defmodule Bench do
  alias DSPex.PythonBridge.Bridge

  @here __DIR__
  @script Path.expand("../../elixir_harness/priv/python/dspy_bridge.py", @here)
  @model "openai/gpt-4o-mini"

  def python, do: System.fetch_env!("DSPY_BRIDGE_PYTHON")

  ## Figures

  # A line of JSON for run.py. A list has one figure of each round: its median counts, its quartiles are the spread.
  def report(row, figures) do
    figures = Map.new(figures, fn {name, value} -> {name, summary(value)} end)
    IO.puts(JSON.encode!(%{row: row, figures: figures}))
  end

  defp summary(rounds) when is_list(rounds) do
    sorted = Enum.sort(rounds)
    at = fn share -> Enum.at(sorted, round((length(sorted) - 1) * share)) end
    %{median: at.(0.5), low: at.(0.25), high: at.(0.75)}
  end

  defp summary(value), do: %{median: value, low: value, high: value}

  # The figures of `count` rounds, each of which is a map, and the ratios of each round: `name => {of, to}`.
  def rounds(count, ratios, fun) do
    all = for _ <- 1..count, do: fun.()

    all
    |> Enum.map(fn round ->
      Enum.into(ratios, round, fn {name, {of, to}} -> {name, round[of] / round[to]} end)
    end)
    |> then(fn all -> Map.new(Map.keys(hd(all)), fn name -> {name, Enum.map(all, & &1[name])} end) end)
  end

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

  def lm_opts(lm_port) do
    options = %{api_base: "http://127.0.0.1:#{lm_port}/v1", api_key: "x", cache: false}
    [python_executable: python(), lm: @model, lm_options: options]
  end

  def bridge(lm_port, opts \\ []) do
    {:ok, bridge} = Bridge.start_link([name: nil] ++ lm_opts(lm_port) ++ opts)

    {:ok, _} = Bridge.call(bridge, :ping, %{}, 30_000)
    bridge
  end

  def create(bridge, id, more \\ %{}) do
    args = Map.merge(%{id: id, signature: "question -> answer"}, more)
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

  # What plain DSPy takes: see plain_dspy.py.
  def plain(what, lm_port, count, at_once) do
    options = JSON.encode!(%{api_base: "http://127.0.0.1:#{lm_port}/v1", api_key: "x", cache: false})
    args = [Path.join(@here, "plain_dspy.py"), what, options, "#{count}", "#{at_once}"]
    {out, 0} = System.cmd(python(), args)
    JSON.decode!(out)
  end

  ## CPU time, which other work on the machine changes less than the time on the wall

  # Of the peer and of the BEAM during `fun`, in ms.
  def cpu(bridge, fun) do
    pid = Bridge.get_status(bridge).os_pid
    {beam, _} = :erlang.statistics(:runtime)
    before = cpu_ms(pid)
    fun.()
    peer = cpu_ms(pid) - before
    {now, _} = :erlang.statistics(:runtime)
    %{peer: peer, beam: now - beam}
  end

  defp cpu_ms(pid) do
    code = "import psutil, sys; times = psutil.Process(int(sys.argv[1])).cpu_times(); print(times.user + times.system)"
    {out, 0} = System.cmd(python(), ["-c", code, "#{pid}"])
    out |> String.trim() |> String.to_float() |> Kernel.*(1000)
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

  def wait_until(fun), do: fun.() || (Process.sleep(5) && wait_until(fun))

  # The latencies of pings, one each ms or `every_ms`, while `fun` runs: their p99 in ms.
  def ping_p99_during(bridge, every_ms \\ 1, fun) do
    pinger = Task.async(fn -> pings(bridge, every_ms, []) end)
    result = fun.()
    send(pinger.pid, :enough)
    took = Task.await(pinger)
    {took |> Enum.sort() |> Enum.at(floor(length(took) * 0.99)) |> Kernel./(1000), result}
  end

  defp pings(bridge, every_ms, took) do
    receive do
      :enough -> took
    after
      every_ms ->
        {us, {:ok, _}} = :timer.tc(fn -> Bridge.call(bridge, :ping, %{}, 5000) end)
        pings(bridge, every_ms, [us | took])
    end
  end

  def stop(process) do
    {:os_pid, pid} = Port.info(process, :os_pid)
    Port.close(process)
    System.cmd("kill", ["#{pid}"])
  end
end
