# Rows that are measured on all CPUs.

defmodule Bench.Free do
  import Bench

  alias DSPex.PythonBridge.{Bridge, Pool}

  def rows do
    [
      {"first-ping", &first_ping/0},
      {"first-answer", &first_answer/0},
      {"callers", &callers/0},
      {"calls", &Bench.Calls.figures/0},
      {"large", &large/0},
      {"runs", &runs/0},
      {"programs", &programs/0},
      {"agent", &agent/0},
      {"journal", &journal/0},
      {"tokens", &tokens/0},
      {"batch", &batch/0},
      {"image", &image/0},
      {"many", &many/0},
      {"waiting", &waiting/0},
      {"optimizing", &Bench.Optimizing.figures/0},
      {"restart", &restart/0},
      {"recovery", &recovery/0},
      {"peers", &peers/0},
      {"litellm", &litellm/0},
      {"installed", &installed/0},
      {"sidecar-runs", &sidecar_runs/0}
    ]
  end

  defp first_ping do
    rounds(9, [ratio: {:peer, :serial}], fn -> %{peer: first_ping(&peer/0), serial: first_ping(&serial/0)} end)
  end

  @plain_first """
  import json, os, sys
  os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "true"
  import dspy
  dspy.configure(lm=dspy.LM(sys.argv[1], **json.loads(sys.argv[2])))
  assert dspy.Predict("question -> answer")(question="Why?").answer == "Paris"
  os._exit(0)
  """
  # From the start of Python to the first answer of a program.
  defp first_answer do
    opts = lm_opts(lm(0))
    args = ["-c", @plain_first, opts[:lm], JSON.encode!(opts[:lm_options])]

    rounds(9, [ratio: {:bridge, :plain}], fn ->
      {plain, {_, 0}} = ms(fn -> System.cmd(python(), args) end)

      {ms, bridge} =
        ms(fn ->
          {:ok, bridge} = Bridge.start_link([name: nil] ++ opts)
          create(bridge, "qa")
          execute(bridge, "qa", 1)
          bridge
        end)

      Bridge.stop(bridge)
      %{plain: plain, bridge: ms}
    end)
  end

  defp callers do
    bridge = bridge(1)
    rates = for _ <- 1..5, do: calls_per_second(256, 400, fn -> {:ok, _} = Bridge.call(bridge, :ping, %{}, 5000) end)
    Bridge.stop(bridge)
    %{rate: rates}
  end

  # Small pings of one process while another sends 5 MB at a time.
  defp large do
    bridge = bridge(1)
    large = %{text: String.duplicate("lorem ipsum ", 436_906)}

    {p99, {ms, _}} =
      ping_p99_during(bridge, fn ->
        ms(fn -> for _ <- 1..40, do: {:ok, _} = Bridge.call(bridge, :ping, large, 30_000) end)
      end)

    Bridge.stop(bridge)
    %{ping_p99_ms: p99, large_ms: ms / 40}
  end

  ## Runs with an LM that answers at once

  defp with_program(more \\ %{}, opts \\ [], fun) do
    lm = lm(0)
    bridge = bridge(lm, opts)
    create(bridge, "qa", more)
    result = fun.(bridge, lm)
    Bridge.stop(bridge)
    result
  end

  @runs 500
  defp runs do
    with_program(fn bridge, lm ->
      spread(64, 64, &execute(bridge, "qa", &1))

      rounds(5, [ratio: {:ms, :plain_ms}, cpu_ratio: {:cpu, :plain_cpu}, rss_ratio: {:rss, :plain_rss}], fn ->
        plain = plain("predict", lm, @runs, 64)
        {cpu, ms} = timed(bridge, fn -> spread(@runs, 64, &execute(bridge, "qa", &1)) end)

        %{
          ms: ms,
          plain_ms: plain["seconds"] * 1000,
          cpu: cpu.peer / @runs,
          plain_cpu: plain["cpu_seconds"] * 1000 / @runs,
          rss: rss(bridge),
          plain_rss: plain["rss"]
        }
      end)
    end)
  end

  # The CPU and the time of `fun`, which gives its own ms.
  defp timed(bridge, fun) do
    caller = self()
    cpu = cpu(bridge, fn -> send(caller, {:ms, fun.()}) end)

    receive do
      {:ms, ms} -> {cpu, ms}
    end
  end

  # 10,000 programs in addition to the one that is called.
  defp programs do
    with_program(fn bridge, _lm ->
      spread(64, 64, &execute(bridge, "qa", &1))
      one = for _ <- 1..7, do: spread(500, 64, &execute(bridge, "qa", &1))
      before = rss(bridge)
      spread(10_000, 64, &create(bridge, "p#{&1}"))
      each = (rss(bridge) - before) / 10_000
      many = for _ <- 1..7, do: spread(500, 64, &execute(bridge, "p#{&1 * 17}", &1))
      %{ratio: Enum.zip_with(Enum.sort(many), Enum.sort(one), &(&1 / &2)), bytes_each: each}
    end)
  end

  @tool %{name: "search", description: "Looks something up.", args: %{query: %{type: "string"}, limit: %{type: "integer"}}}
  @steps 8
  @agents 36
  # 12 at once for the CPU of a step; one alone for its time, of which a call of a tool in the BEAM is a part.
  defp agent do
    with_program(%{program_type: "react", tools: [@tool], options: %{max_iters: 10}}, fn bridge, lm ->
      spread(12, 12, &ask_agent(bridge, &1))

      rounds(3, [ratio: {:peer, :plain}, alone_ratio: {:alone, :plain_alone}], fn ->
        plain = plain("react", lm, @agents, 12)
        alone = plain("react", lm, 12, 1)
        cpu = cpu(bridge, fn -> spread(@agents, 12, &ask_agent(bridge, &1)) end)

        %{
          plain: plain["cpu_seconds"] * 1000 / @agents / @steps,
          peer: cpu.peer / @agents / @steps,
          beam: cpu.beam / @agents / @steps,
          plain_alone: alone["seconds"] * 1000 / 12 / @steps,
          alone: spread(12, 1, &ask_agent(bridge, &1)) / 12 / @steps
        }
      end)
    end)
  end

  # Runs that are not sent again have none.
  defp journal do
    with_program(%{program_type: "react", tools: [@tool], options: %{max_iters: 10}}, fn bridge, _lm ->
      spread(12, 12, &ask_agent(bridge, &1))

      rounds(9, [ratio: {:with, :without}, peer_ratio: {:peer, :peer_without}], fn ->
        without = cpu(bridge, fn -> spread(@agents, 12, &ask_agent(bridge, &1, retry: false)) end)
        journaled = cpu(bridge, fn -> spread(@agents, 12, &ask_agent(bridge, &1)) end)
        count = @agents * @steps
        both = %{with: (journaled.peer + journaled.beam) / count, without: (without.peer + without.beam) / count}
        Map.merge(both, %{peer: journaled.peer / count, peer_without: without.peer / count})
      end)
    end)
  end

  defp ask_agent(bridge, number, opts \\ []) do
    search = fn %{"query" => query, "limit" => limit} -> %{found: [query, "some text of a document"], limit: limit} end
    args = %{program_id: "qa", inputs: %{question: "question #{number}"}}
    opts = [timeout: 60_000, tools: %{"search" => search}] ++ opts
    {:ok, result, _} = Bridge.request(bridge, :execute_program, args, opts)
    32 = map_size(result["trajectory"])
  end

  @streams 60
  @tokens 300
  defp tokens do
    with_program(fn bridge, lm ->
      spread(12, 12, &stream(bridge, &1))

      rounds(3, [ratio: {:peer, :plain}, consumer_ratio: {:both, :plain}], fn ->
        plain = plain("stream", lm, @streams, 12)["cpu_seconds"] * 1000
        cpu = cpu(bridge, fn -> spread(@streams, 12, &stream(bridge, &1)) end)
        count = @streams * @tokens / 1000
        %{plain: plain / count, peer: cpu.peer / count, beam: cpu.beam / count, both: (cpu.peer + cpu.beam) / count}
      end)
    end)
  end

  defp stream(bridge, number) do
    args = %{program_id: "qa", inputs: %{question: "question #{number}"}}
    @tokens = bridge |> Bridge.stream(args, timeout: 60_000) |> Enum.count(&match?({:chunk, "answer", _}, &1))
  end

  # 1,000 inputs as one list, next to 1,000 calls, 64 at once each.
  defp batch do
    with_program(fn bridge, _lm ->
      inputs = for number <- 1..1000, do: %{question: "question #{number}"}

      list = fn ->
        args = %{program_id: "qa", inputs: inputs, max_concurrency: 64}
        {:ok, %{"results" => results}} = Bridge.call(bridge, :execute_program, args, 60_000)
        true = Enum.all?(results, & &1["success"])
      end

      list.()

      rounds(3, [ratio: {:list, :calls}], fn ->
        calls = cpu(bridge, fn -> spread(1000, 64, &execute(bridge, "qa", &1)) end)
        list = cpu(bridge, list)
        %{calls: (calls.peer + calls.beam) / 1000, list: (list.peer + list.beam) / 1000}
      end)
    end)
  end

  # Of 10 MB as base64.
  defp image do
    with_program(%{signature: "picture: dspy.Image, question -> answer"}, fn bridge, lm ->
      picture = "data:image/png;base64," <> Base.encode64("\x89PNG\r\n\x1a\n" <> :binary.copy(<<0>>, 7_500_000))
      args = %{program_id: "qa", inputs: %{picture: picture, question: "What is it?"}}
      ask = fn _ -> {:ok, _} = Bridge.call(bridge, :execute_program, args, 60_000) end
      spread(4, 4, ask)

      rounds(3, [ratio: {:cpu, :plain_cpu}, ms_ratio: {:ms, :plain_ms}], fn ->
        plain = plain("image", lm, 20, 4)
        {cpu, ms} = timed(bridge, fn -> spread(20, 4, ask) end)
        %{cpu: cpu.peer / 20, plain_cpu: plain["cpu_seconds"] * 50, ms: ms / 20, plain_ms: plain["seconds"] * 50}
      end)
    end)
  end

  ## Runs with an LM that takes its time

  # 512 runs of 1 s at once: at best the LM's second and what DSPy needs for 512 calls.
  defp many do
    lm = lm(1)
    bridge = bridge(lm, env: %{"DSPY_BRIDGE_MAX_IN_FLIGHT" => "512"})
    create(bridge, "qa")
    spread(512, 512, &execute(bridge, "qa", &1))
    rate = 500 / plain("predict", lm(0), 500, 64)["seconds"]
    possible = 1000 + 512 / rate * 1000
    took = for _ <- 1..3, do: spread(512, 512, &execute(bridge, "qa", &1))
    Bridge.stop(bridge)
    alone = plain("predict", lm, 512, 512)["seconds"] * 1000
    %{ms: took, ratio: Enum.map(took, &(possible / &1)), alone_ms: alone}
  end

  # 320 runs of 0.2 s, 64 at once, and pings meanwhile.
  defp waiting do
    bridge = bridge(lm(0.2))
    create(bridge, "qa")
    spread(64, 64, &execute(bridge, "qa", &1))
    one_by_one = spread(15, 1, &execute(bridge, "qa", &1)) / 15 * 320
    {p99, together} = ping_p99_during(bridge, fn -> spread(320, 64, &execute(bridge, "qa", &1)) end)
    Bridge.stop(bridge)
    %{ratio: one_by_one / together, ping_p99_ms: p99}
  end

  ## Ends of peers

  # 16,000 calls that one peer has, from the moment that it answers: another serves by then, or none.
  defp restart do
    rounds(5, [ratio: {:with, :without}], fn ->
      %{without: held(fn _bridge -> :ok end), with: held(&Bridge.restart/1)}
    end)
  end

  defp held(meanwhile) do
    go = Path.join(System.tmp_dir!(), "dspy_bridge_bench_#{System.unique_integer([:positive])}")
    env = %{"FAKE_FILE" => go, "DSPY_BRIDGE_DRAIN_MS" => "600000"}
    holds = Path.expand("../fakes/replies/holds.py", __DIR__)
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

    Bridge.stop(bridge)
    File.rm!(go)
    ms
  end

  # From the kill of a peer with a program to its next answer; and in a pool of two.
  defp recovery do
    with_program(fn bridge, lm ->
      {:ok, _} = Pool.start_link([name: :bench, pool_size: 2] ++ lm_opts(lm))
      {:ok, _} = Pool.call(:bench, :create_program, %{id: "qa", signature: "question -> answer"}, 60_000)
      both_up = fn -> Enum.all?(Pool.status(:bench).peers, &(&1.state == :running)) end

      figures =
        rounds(5, [], fn ->
          wait_until(both_up)
          for n <- 1..8, do: {:ok, _} = Pool.call(:bench, :execute_program, %{program_id: "qa", inputs: %{question: "#{n}"}}, 60_000)
          kill(Bridge.get_status(bridge).os_pid)
          {alone, _} = ms(fn -> execute(bridge, "qa", 1) end)
          kill(hd(Pool.status(:bench).peers).os_pid)
          args = %{program_id: "qa", inputs: %{question: "Why?"}}
          {pool, _} = ms(fn -> {:ok, _} = Pool.call(:bench, :execute_program, args, 60_000) end)
          %{bridge_ms: alone, pool_ms: pool}
        end)

      Supervisor.stop(:bench)
      figures
    end)
  end

  defp kill(os_pid), do: System.cmd("kill", ["-9", "#{os_pid}"])

  ## What many peers and a large library take

  # 16 peers in a pool, next to two: from the start until each has loaded the program; memory; runs.
  defp peers do
    lm = lm(0)
    [two, sixteen] = Enum.map([2, 16], &pool_of(&1, lm))
    %{start_ms: sixteen.start_ms, rss_each: sixteen.rss / 16, rate: sixteen.rate, rate_of_two: two.rate, ratio: sixteen.rate / two.rate}
  end

  defp pool_of(size, lm) do
    name = :"bench_#{size}"
    args = %{program_id: "qa", inputs: %{question: "Why?"}}
    started = System.monotonic_time(:millisecond)
    {:ok, _} = Pool.start_link([name: name, pool_size: size, programs: [%{id: "qa", signature: "question -> answer"}]] ++ lm_opts(lm))
    wait_until(fn -> Enum.all?(Pool.status(name).peers, &(&1.state == :running)) end)
    start_ms = System.monotonic_time(:millisecond) - started
    run = fn _ -> {:ok, _} = Pool.call(name, :execute_program, args, 60_000) end
    spread(size * 8, size * 8, run)
    ms = spread(1000, 64, run)
    {:ok, stats} = Pool.call(name, :get_stats, %{}, 60_000)
    Supervisor.stop(name)
    %{start_ms: start_ms, rss: stats["memory_usage"]["rss"], rate: 1_000_000 / ms}
  end

  # The first run that needs LiteLLM, and the next one; pings of others meanwhile.
  defp litellm do
    with_program(%{lm: nil}, fn bridge, lm ->
      own = %{model: "openai/gpt-4o-mini", engine: "litellm", api_base: "http://127.0.0.1:#{lm}/v1", api_key: "x", cache: false}
      execute(bridge, "qa", 1)
      before = rss(bridge)
      create(bridge, "by-litellm", %{lm: own})
      {p99, {first, _}} = ping_p99_during(bridge, fn -> ms(fn -> execute(bridge, "by-litellm", 1) end) end)
      {next, _} = ms(fn -> execute(bridge, "by-litellm", 2) end)
      %{first_ms: first, next_ms: next, ping_p99_ms: p99, rss: rss(bridge) - before}
    end)
  end

  # What `mix dspex.setup` installs, in bytes with bytecode.
  defp installed do
    [plain, litellm] = for extras <- [[], ["litellm"]], do: installed(extras)
    %{size: plain.size, packages: plain.packages, ratio: plain.size / litellm.size}
  end

  defp installed(extras) do
    venv = Path.join(System.tmp_dir!(), "bench_venv_#{System.pid()}")
    {:ok, _python} = DSPex.PythonBridge.Venv.make(venv, with: extras)
    {bytes, 0} = System.cmd("du", ["-sb", venv])
    packages = length(Path.wildcard("#{venv}/lib/python*/site-packages/*.dist-info"))
    File.rm_rf!(venv)
    %{size: bytes |> Integer.parse() |> elem(0), packages: packages}
  end

  defp sidecar_runs do
    {process, port, _} = sidecar(lm(0))
    question = fn n -> JSON.encode!(%{question: "question #{n}"}) end
    spread(64, 64, fn n -> {:ok, _} = post(port, "/predict", question.(n)) end)
    rate = calls_per_second(256, 20, fn -> {:ok, _} = post(port, "/ping", "{}") end)
    ms = spread(500, 64, fn n -> {:ok, _} = post(port, "/predict", question.(n)) end)
    stop(process)
    %{calls_rate: rate, runs_ms: ms}
  end
end
