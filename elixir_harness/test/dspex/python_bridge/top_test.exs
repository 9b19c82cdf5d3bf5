defmodule DSPex.PythonBridge.TopTest do
  @moduledoc "Snapshots of a node's bridges and runs, and their tables."

  # It looks at all bridges of this node: those of other tests are there, too.
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers
  import ExUnit.CaptureIO

  alias DSPex.PythonBridge.{Bridge, Evaluate, Pool, Top}
  alias DSPex.Test.{FakePeer, SilentLM}

  # Nobody here waits that long for what comes at all.
  @long 20_000

  defp in_beam(kind, name \\ nil),
    do: start_supervised!({Bridge, opts(kind, name: name)}, id: make_ref())

  defp opts(kind, opts), do: Keyword.merge(FakePeer.opts(kind), opts)

  defp peer(name, timeout \\ @long), do: find(Top.snapshot(timeout: timeout), name)
  defp find(snapshot, name), do: Enum.find(snapshot.peers, &(&1.bridge == inspect(name)))

  test "all bridges are found, however started and named, and none that has ended" do
    start_supervised!({Registry, keys: :unique, name: __MODULE__.Registry})
    via = {:via, Registry, {__MODULE__.Registry, "käse"}}

    named =
      for name <- [:"bare one", via, {:global, :everywhere}, nil],
          do: {in_beam(:who, name), name}

    pool = start_supervised!({Pool, opts(:who, name: __MODULE__.Pool, pool_size: 2)})
    snapshot = Top.snapshot(timeout: 1_000)
    for {pid, name} <- named, do: assert(%{pool: nil} = find(snapshot, name || pid))

    for number <- 1..2 do
      bridge = Module.concat(__MODULE__.Pool, "Bridge#{number}")
      assert %{number: ^number, pool: pool_name} = find(snapshot, bridge)
      assert pool_name == inspect(__MODULE__.Pool) and is_pid(pool)
    end

    [{pid, :"bare one"} | _] = named
    :ok = Bridge.stop(pid)
    refute peer(:"bare one", 1_000)
  end

  test "the figures are those of the bridge and of the peer; its own calls are not counted" do
    lm = SilentLM.lm_opts(SilentLM.start())
    bridge = start_supervised!({Bridge, real_opts(lm)})
    create = %{id: "qa", signature: "question -> answer"}
    {:ok, _} = Bridge.call(bridge, :create_program, create, @long)
    {:error, _} = Bridge.call(bridge, :execute_program, %{program_id: "no", inputs: %{}})
    test = self()

    # An evaluation, which is under way.
    caller =
      spawn(fn ->
        examples = List.duplicate({%{question: "secret"}, nil}, 3)
        send(test, Evaluate.run(bridge, "qa", examples, metric: fn _, _ -> 1 end))
      end)

    assert_receive {:lm_request, _line}, @long
    peer(bridge)
    snapshot = Top.snapshot(timeout: @long)
    peer = find(snapshot, bridge)
    assert %{state: :running, pending: 3, restarts: 0, queued: 0, lm_waiting: 0} = peer
    assert peer.in_flight > 0
    # The bridge's own ping, the creation, the run; one under way is counted when it is over.
    assert %{errors: 1, calls: 3} = peer
    assert peer.os_pid == Bridge.get_status(bridge).os_pid
    assert peer.rss_bytes > 10_000_000 and peer.stats_at_ms > 0
    assert 0 < peer.p50_ms and peer.p50_ms <= peer.p99_ms

    assert %{kind: :evaluate, metadata: %{program_id: "qa"}, figures: %{done: 0, total: 3}} =
             Enum.find(snapshot.runs, &(&1.caller == caller))

    Process.exit(caller, :kill)
    eventually(fn -> not Enum.any?(Top.snapshot().runs, &(&1.caller == caller)) end)
  end

  test "a peer that does not answer has the bridge's figures alone, a suspended bridge its name" do
    mute = in_beam(:silent)
    hangs = in_beam(:who)
    eventually(fn -> Bridge.get_status(mute).state == :running end)
    :sys.suspend(hangs)
    snapshot = Top.snapshot(timeout: 300)
    assert %{state: :running, pending: 0} = found = find(snapshot, mute)
    refute Map.has_key?(found, :calls)
    refute Map.has_key?(find(snapshot, hangs), :state)
    :sys.resume(hangs)
    # The question is taken back.
    eventually(fn -> Bridge.get_status(mute).pending == 0 end)
  end

  describe "the table" do
    @busy %{
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
      calls: 130,
      stats_at_ms: 4_000,
      uptime_ms: 59 * 60_000
    }
    @run %{
      kind: :evaluate,
      metadata: %{program_id: "qa", pool: DSPex.PythonBridge.Pool, bridge: nil},
      figures: %{done: 120, total: 500, score: 0.71249, failed: 3, lm_calls: 480},
      caller: self(),
      elapsed_ms: 12_345
    }
    @unknown %{bridge: ":qa", pool: nil, number: nil, state: :failed}

    defp lines(peers, earlier, runs \\ []) do
      snapshot = &%{node: :app@host, time: "2026-01-01T00:00:00Z", peers: &1, runs: runs}
      earlier = earlier && snapshot.(earlier)
      peers |> snapshot.() |> Top.table(earlier) |> IO.iodata_to_binary() |> String.split("\n")
    end

    test "has a line for each peer, with the calls per second since the last, by the peer's clock" do
      earlier = %{@busy | calls: 100, stats_at_ms: 2_000}

      assert lines([@busy, @unknown], [earlier, @unknown]) == [
               "app@host  2026-01-01T00:00:00Z",
               "bridge        state        pid pending runs queued limited    p50    p99 errors memory restarts calls/s uptime",
               "MyApp.Pool 9  restarting 40117    1234  256    978      77 812 ms 12.1 s  99999 941 MB       12    15.0 59 min",
               ":qa           failed         -       -    -      -       -      -      -      -      -        -       -      -",
               ""
             ]

      # Of another peer nothing is known.
      for earlier <- [nil, [], [%{earlier | os_pid: 1}]],
          do: assert(Enum.at(lines([@busy], earlier), 2) =~ ~r/ 12 +- 59 min$/)
    end

    test "has the runs below, if there are any" do
      other = %{program_id: "a\e[2J\"\n", pool: nil, bridge: :far}
      run = %{@run | kind: :optimize, metadata: other, figures: %{done: 7}, elapsed_ms: 3_600_000}

      assert lines([], nil, [@run, run]) == [
               "app@host  2026-01-01T00:00:00Z",
               "no bridges run here",
               "",
               "run                  on      done score failed LM calls time",
               "evaluate qa          Pool 120/500 0.712      3      480 12 s",
               ~S(optimize a\e[2J\"\n  :far       7     -      -        -  1 h),
               ""
             ]
    end
  end

  test "print/0 prints the table of this node" do
    in_beam(:who, :printed)
    output = capture_io(fn -> assert Top.print() == :ok end)
    assert output =~ ~r/\A#{node()}  \d{4}-/
    assert output =~ ~r/^:printed +running +/m
  end
end
