defmodule DSPex.PythonBridge.Top.TopTest do
  @moduledoc "Snapshots of a node's bridges, and their table."

  # It looks at all bridges of this node, and those of other tests may hang.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import ExUnit.CaptureIO

  alias DSPex.PythonBridge.{Bridge, Evaluate, Pool, Top}
  alias DSPex.PythonBridge.Telemetry.RunSpan
  alias DSPex.PythonBridge.Top.{Finder, Table}
  alias DSPex.Test.{SilentLM, Telemetry}

  doctest Table

  # Nobody here waits that long for what comes at all.
  @long 20_000
  @of_stats [
              :in_flight,
              :queued,
              :lm_waiting,
              :p50_ms,
              :p99_ms,
              :rss_bytes,
              :executes,
              :errors,
              :calls
            ] ++
              [:stats_at_ms]

  defp start(opts, name) do
    opts = Keyword.put(opts, :name, name)
    bridge = start_supervised!(Map.put(Bridge.child_spec(opts), :id, make_ref()))
    eventually(fn -> Bridge.get_status(bridge).state == :running end, @long)
    bridge
  end

  defp real(name, opts \\ []), do: start(real_opts(opts), name)
  defp fake(file, name, opts \\ []), do: start(fake_opts(file, opts), name)

  defp peer(name, timeout \\ @long), do: find(Top.snapshot(timeout: timeout), name)
  defp find(snapshot, name), do: Enum.find(snapshot.peers, &(&1.bridge == inspect(name)))
  defp blank?(peer), do: Enum.all?(@of_stats, &(peer[&1] == nil))

  describe "the bridges of a node" do
    test "are found, however started and named" do
      start_supervised!({Registry, keys: :unique, name: __MODULE__.Registry})
      via = {:via, Registry, {__MODULE__.Registry, "käse"}}
      fake("echo", :"bare one")
      fake("echo", via)
      fake("echo", {:global, :everywhere})
      unnamed = fake("echo", nil)
      opts = Keyword.put(fake_opts("echo"), :name, :supervised)
      start_supervised!({DSPex.PythonBridge.Supervisor, name: nil, bridge: opts})
      pool = Keyword.put(fake_opts("echo", pool_size: 2), :name, __MODULE__.Pool)
      start_supervised!({Pool, pool})

      names = [:"bare one", :supervised, unnamed, via, {:global, :everywhere}]
      members = [__MODULE__.Pool.Bridge1, __MODULE__.Pool.Bridge2]
      found = Finder.bridges()
      for name <- names ++ members, do: assert(find(%{peers: found}, name))
      assert Enum.uniq_by(found, & &1.bridge) == found

      for {name, number} <- Enum.with_index(members, 1) do
        pool = inspect(__MODULE__.Pool)

        assert find(%{peers: found}, name) ==
                 %{server: name, bridge: inspect(name), pool: pool, number: number}
      end

      # Each is one that can be asked.
      for %{server: server} <- found,
          do: eventually(fn -> Bridge.get_status(server).state == :running end)

      names = for %{bridge: bridge, pool: pool} <- found, do: pool || bridge
      assert names == Enum.sort(names)
    end

    test "are not listed after they have ended" do
      bridge = fake("echo", nil)
      assert peer(bridge)
      :ok = Bridge.stop(bridge)
      refute peer(bridge)
    end
  end

  describe "a snapshot" do
    test "has the figures of the bridge and of the real peer; its own calls are not counted" do
      real(:measured, SilentLM.lm_opts(SilentLM.start()))
      create = %{id: "qa", signature: "question -> answer"}
      {:ok, _} = Bridge.call(:measured, :create_program, create, @long)

      {:error, "Program not found: no"} =
        Bridge.call(:measured, :execute_program, %{program_id: "no", inputs: %{}})

      execute = %{program_id: "qa", inputs: %{question: "Why?"}}
      task = Task.async(fn -> Bridge.call(:measured, :execute_program, execute, @long) end)
      assert_receive {:lm_request, _line}, @long

      peer(:measured)
      peer = peer(:measured)
      status = Bridge.get_status(:measured)

      assert %{state: :running, pending: 1, restarts: 0, in_flight: 1, queued: 0, lm_waiting: 0} =
               peer

      assert peer.os_pid == status.os_pid
      assert peer.uptime_ms in 1..status.uptime_ms
      assert peer.stats_at_ms in 1..status.uptime_ms
      assert peer.rss_bytes > 10_000_000

      # The one under way is counted when it is over. The bridge's own ping, the creation, the run.
      assert %{executes: 1, errors: 1, calls: 3, calls_per_s: nil, pool: nil, number: nil} = peer
      assert is_float(peer.p50_ms) and is_float(peer.p99_ms)
      assert 0 < peer.p50_ms and peer.p50_ms <= peer.p99_ms
      Task.shutdown(task, :brutal_kill)
    end

    test "has no quantiles before the first run, and shows that a peer was replaced" do
      bridge = real(nil)
      first = peer(bridge)
      assert %{p50_ms: nil, p99_ms: nil, executes: 0, errors: 0, calls: 1, restarts: 0} = first
      kill(first.os_pid)

      eventually(
        fn -> match?(%{state: :running, restarts: 1}, Bridge.get_status(bridge)) end,
        @long
      )

      assert %{calls: 1, restarts: 1, os_pid: os_pid} = peer(bridge)
      assert os_pid != first.os_pid
    end

    test "has only the bridge's figures of a silent peer, and all of others" do
      bridge = fake("silent", :mute)
      fake("together", :eloquent, env: %{"FAKE_MINE" => "/dev/null", "FAKE_THEIRS" => "/"})
      snapshot = Top.snapshot(timeout: 1_000)
      assert %{state: :running, pending: 0, os_pid: os_pid} = mute = find(snapshot, :mute)
      assert os_pid == Bridge.get_status(bridge).os_pid
      assert blank?(mute)
      assert %{calls: 3} = find(snapshot, :eloquent)
      # The question is taken back.
      eventually(fn -> Bridge.get_status(bridge).pending == 0 end)
    end

    @tag :tmp_dir
    test "asks all peers before it waits for any", %{tmp_dir: dir} do
      [one, two] = for name <- ["one", "two"], do: Path.join(dir, name)
      fake("together", :one, env: %{"FAKE_MINE" => one, "FAKE_THEIRS" => two})
      fake("together", :two, env: %{"FAKE_MINE" => two, "FAKE_THEIRS" => one})
      snapshot = Top.snapshot(timeout: @long)

      for name <- [:one, :two] do
        assert %{in_flight: 1, queued: 2, rss_bytes: 4_000_000, calls: 3, stats_at_ms: 6_500} =
                 find(snapshot, name)
      end
    end

    test "has no figures of a peer with other stats, and only the name of a bridge that hangs" do
      fake("who", :another_kind)
      hangs = fake("echo", :hangs)
      :sys.suspend(hangs)
      snapshot = Top.snapshot(timeout: 500)
      assert %{state: :running} = another = find(snapshot, :another_kind)
      assert blank?(another)
      assert %{state: nil, os_pid: nil, pending: nil} = hanging = find(snapshot, :hangs)
      assert blank?(hanging)
      :sys.resume(hangs)
    end

    test "waits for no peer that does not serve yet" do
      opts = [start_timeout: 600_000, env: %{"FAKE_START_MS" => "600000"}]
      bridge = start_supervised!({Bridge, fake_opts("starts_late", opts)})
      # A question would wait for the peer: longer than this test may take.
      assert %{state: :starting} = starting = peer(bridge, 600_000)
      assert blank?(starting)
    end

    test "emits no telemetry events" do
      fake("together", :heard, env: %{"FAKE_MINE" => "/dev/null", "FAKE_THEIRS" => "/"})
      Telemetry.install()
      on_exit(&Telemetry.remove/0)
      Telemetry.attach()
      assert %{calls: 3} = peer(:heard)
      {:ok, _} = Bridge.call(:heard, :ping)
      assert_receive {[:bridge, :call, :start], _, %{command: "ping"}}
      refute_received {[:bridge, :call, _], _, %{command: "get_stats"}}
    end
  end

  describe "the runs of a node" do
    test "are evaluations that are under way, on bridges and pools, here or not" do
      lm = SilentLM.lm_opts(SilentLM.start())
      real(:evaluated, lm)
      create = %{id: "qa", signature: "question -> answer"}
      {:ok, _} = Bridge.call(:evaluated, :create_program, create, @long)
      examples = List.duplicate({%{question: "secret"}, nil}, 3)
      evaluate = fn -> Evaluate.run(:evaluated, "qa", examples, metric: fn _, _ -> 1 end) end
      caller = spawn(evaluate)
      assert_receive {:lm_request, _line}, @long
      runs = fn -> Enum.filter(Top.snapshot().runs, &(&1.caller == inspect(caller))) end

      assert [%{elapsed_ms: elapsed_ms} = run] = runs.()
      assert is_integer(elapsed_ms)

      assert Map.delete(run, :elapsed_ms) == %{
               kind: :evaluate,
               program: "qa",
               server: ":evaluated",
               caller: inspect(caller),
               done: 0,
               total: 3,
               score: nil,
               failed: 0,
               lm_calls: nil
             }

      assert JSON.encode!(Top.snapshot()) =~ ~s("kind":"evaluate")
      Process.exit(caller, :kill)
      eventually(fn -> runs.() == [] end)
    end

    test "stay when rates are added" do
      about = %{program_id: nil, telemetry_metadata: %{}}

      RunSpan.run(:optimize, __MODULE__.NoPool, about, %{done: 1}, fn _run ->
        rated = Top.with_rates(Top.snapshot(), Top.snapshot())

        assert [%{kind: :optimize, done: 1}] =
                 Enum.filter(rated.runs, &(&1.caller == inspect(self())))

        {:ok, nil}
      end)
    end
  end

  describe "calls per second" do
    defp rate({os_pid, calls, at}, {os_pid_then, calls_then, then}) do
      now = snapshot([[os_pid: os_pid, calls: calls, stats_at_ms: at]])
      earlier = snapshot([[os_pid: os_pid_then, calls: calls_then, stats_at_ms: then]])
      %{peers: [peer]} = Top.with_rates(now, earlier)
      peer.calls_per_s
    end

    test "are those between two snapshots, by the peer's clock" do
      assert rate({7, 130, 4_000}, {7, 100, 2_000}) == 15.0
      assert rate({7, 100, 3_000}, {7, 100, 2_000}) == 0.0
      assert rate({7, 101, 5_000}, {7, 100, 2_000}) == 0.33
    end

    test "are unknown for a peer that is new, did not answer, or whose clock stands still" do
      assert rate({8, 130, 4_000}, {7, 100, 2_000}) == nil
      assert rate({7, 130, 4_000}, {7, nil, nil}) == nil
      assert rate({7, nil, nil}, {7, 100, 2_000}) == nil
      assert rate({7, 100, 2_000}, {7, 100, 2_000}) == nil
      assert %{peers: []} = Top.with_rates(snapshot([]), snapshot([[]]))
      assert %{peers: [%{calls_per_s: nil}]} = Top.with_rates(snapshot([[]]), snapshot([]))
    end
  end

  # Peers by what is known of them.
  defp snapshot(peers) do
    unknown = [:state, :os_pid, :pending, :restarts, :uptime_ms, :pool, :number, :calls_per_s]
    blank = Map.new(unknown ++ @of_stats, &{&1, nil}) |> Map.put(:bridge, ":qa")
    peers = for known <- peers, do: Map.merge(blank, Map.new(known))
    %{node: :app@host, time: "2026-01-01T00:00:00Z", peers: peers, runs: []}
  end

  describe "the table" do
    defp lines(peers),
      do: peers |> snapshot() |> Table.render() |> IO.iodata_to_binary() |> String.split("\n")

    defp cell(known, column) do
      [_heading, header, line, ""] = lines([known])
      {at, length} = :binary.match(header, column)

      # A number, and its unit, right below the end of the column's name.
      hd(Regex.run(~r/\S+( [a-zA-Z]+)?$/, String.slice(line, 0, at + length)))
    end

    @busy [
      bridge: "MyApp.Pool.Bridge9",
      pool: "MyApp.Pool",
      number: 9,
      state: :restarting,
      os_pid: 40_117,
      pending: 1_234,
      in_flight: 256,
      queued: 978,
      lm_waiting: 77,
      p50_ms: 812.4,
      p99_ms: 12_099.9,
      errors: 99_999,
      rss_bytes: 941_000_000,
      restarts: 12,
      calls_per_s: 1_314.77,
      uptime_ms: 59 * 60_000
    ]

    test "has a line for each peer, in columns, within 110 of a terminal's" do
      assert lines([@busy, [bridge: ":qa", state: :failed]]) == [
               "app@host  2026-01-01T00:00:00Z",
               "bridge        state        pid pending runs queued limited    p50  p99 errors memory restarts calls/s uptime",
               "MyApp.Pool 9  restarting 40117    1234  256    978      77 812 ms 12 s  99999 941 MB       12    1315 59 min",
               ":qa           failed         -       -    -      -       -      -    -      -      -        -       -      -",
               ""
             ]

      assert Enum.all?(lines([@busy]), &(String.length(&1) <= 110))
    end

    @run %{
      kind: :evaluate,
      program: "qa",
      server: "DSPex.PythonBridge.Pool",
      caller: "#PID<0.1.0>",
      done: 120,
      total: 500,
      score: 0.71249,
      failed: 3,
      lm_calls: 480,
      elapsed_ms: 12_345
    }

    test "has the runs below, if there are any" do
      unknown = %{done: nil, total: nil, score: nil, failed: nil, lm_calls: nil}
      optimize = Map.merge(@run, Map.merge(unknown, %{kind: :optimize, server: ":far"}))
      long = "a\e[2J\"\n" <> String.duplicate("é", 50)

      runs = [
        @run,
        %{optimize | program: nil},
        %{optimize | program: long, done: 7, score: 1.0e9},
        %{optimize | done: nil, total: 20}
      ]

      text = [] |> snapshot() |> Map.put(:runs, runs) |> Table.render() |> IO.iodata_to_binary()
      id = "a\\e[2J\\\"\\n" <> String.duplicate("é", 33)

      assert String.split(text, "\n") == [
               "app@host  2026-01-01T00:00:00Z",
               "no bridges run here",
               "",
               pad("run", 54) <> "on      done score failed LM calls time",
               pad("evaluate qa", 54) <> "Pool 120/500 0.712      3      480 12 s",
               pad("optimize -", 54) <> ":far       -     -      -        - 12 s",
               pad("optimize #{id}", 54) <> ":far       7 1.0e9      -        - 12 s",
               pad("optimize qa", 54) <> ":far    -/20     -      -        - 12 s",
               ""
             ]
    end

    defp pad(text, width), do: String.pad_trailing(text, width)

    test "shows names of the library without its prefix" do
      assert ["Bridge" <> _, _] =
               lines([[bridge: "DSPex.PythonBridge.Bridge"]]) |> Enum.drop(2)

      assert ["Pool 2 " <> _, _] =
               lines([[bridge: "x", pool: "DSPex.PythonBridge.Pool", number: 2]]) |> Enum.drop(2)
    end

    test "has units that keep a number short" do
      for {ms, text} <-
            [{0.04, "0.0 ms"}, {9.94, "9.9 ms"}, {9.96, "10 ms"}, {999.4, "999 ms"}] ++
              [{999.6, "1.0 s"}, {61_000, "61 s"}],
          do: assert(cell([p50_ms: ms], "p50") == text)

      for {bytes, text} <-
            [{9_900_000, "9.9 MB"}, {81_400_000, "81 MB"}, {9_999_000_000, "9999 MB"}] ++
              [{10_000_000_000, "10 GB"}],
          do: assert(cell([rss_bytes: bytes], "memory") == text)

      for {ms, text} <-
            [{0, "0 s"}, {59_999, "59 s"}, {60_000, "1 min"}, {3_599_999, "59 min"}] ++
              [{3_600_000, "1 h"}, {172_799_999, "47 h"}, {172_800_000, "2 d"}],
          do: assert(cell([uptime_ms: ms], "uptime") == text)

      for {rate, text} <- [{0.0, "0.0"}, {9.94, "9.9"}, {14.5, "15"}],
          do: assert(cell([calls_per_s: rate], "calls/s") == text)
    end
  end

  test "print/0 prints the table of this node" do
    fake("together", :printed, env: %{"FAKE_MINE" => "/dev/null", "FAKE_THEIRS" => "/"})
    output = capture_io(fn -> assert Top.print() == :ok end)
    assert output =~ ~r/\A#{node()}  \d{4}-/
    # The fake's clock stands.
    assert output =~ ~r/^:printed +running +\d+ +0 +1 +2 +- +- +- +0 +4.0 MB +0 +- +\d+ s$/m
  end
end
