defmodule DSPex.PythonBridge.MonitorTest do
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Monitor, Pool}
  alias DSPex.Test.FakePeer

  # No check comes by itself during a test that does not want one.
  @never 4_000_000_000

  defp start_monitor(bridge, opts \\ []) do
    opts = Keyword.merge([name: nil, bridge: bridge, interval: @never, timeout: 100], opts)
    start_supervised!({Monitor, opts})
  end

  test "before the first check the health is unknown" do
    monitor = start_monitor(:nobody)

    assert Monitor.get_health_status(monitor) == %{
             status: :unknown,
             failures: 0,
             last_check: nil,
             checks: 0,
             success_rate: 0.0,
             response_ms: %{last: nil, p50: nil, p99: nil}
           }
  end

  test "a forced check counts like any other, until reset_stats/1" do
    monitor = :echo |> FakePeer.opts() |> start_and_wait() |> start_monitor(timeout: 5_000)
    before = Monitor.get_health_status(monitor)

    assert %{status: :healthy, failures: 0, checks: 1, success_rate: 1.0} =
             health = Monitor.force_health_check(monitor)

    assert %DateTime{} = health.last_check
    assert %{last: last, p50: last, p99: last} = health.response_ms
    for _ <- 1..9, do: Monitor.force_health_check(monitor)
    assert %{checks: 10, response_ms: %{p50: p50, p99: p99}} = Monitor.get_health_status(monitor)
    assert p50 > 0 and p50 <= p99
    assert Monitor.reset_stats(monitor) == :ok
    assert Monitor.get_health_status(monitor) == before
  end

  test "a peer that does not answer is replaced after max_failures misses, which then count from 0" do
    # Answers the start's ping and two checks.
    bridge = start_and_wait(FakePeer.opts(:silent, answers: 3))
    monitor = start_monitor(bridge, max_failures: 3, timeout: 500)
    old = FakePeer.of(bridge)

    assert %{status: :healthy} = Monitor.force_health_check(monitor)
    assert %{status: :healthy} = Monitor.force_health_check(monitor)
    assert %{status: :unhealthy, failures: 1} = Monitor.force_health_check(monitor)
    assert %{status: :unhealthy, failures: 2} = Monitor.force_health_check(monitor)
    assert Bridge.get_status(bridge).restarts == 0

    assert %{status: :unhealthy, failures: 0, checks: 5, success_rate: 0.4} =
             Monitor.force_health_check(monitor)

    eventually(fn -> match?(%{restarts: 1, state: :running}, Bridge.get_status(bridge)) end)
    eventually(fn -> not Process.alive?(old) end)
    assert %{status: :healthy, failures: 0} = Monitor.force_health_check(monitor)
  end

  test "the misses of a peer that died are not its successor's" do
    bridge = start_and_wait(fake_opts("silent"))
    monitor = start_monitor(bridge, max_failures: 3)
    for n <- 1..2, do: assert(%{failures: ^n} = Monitor.force_health_check(monitor))
    kill(Bridge.get_status(bridge).os_pid)
    eventually(fn -> match?(%{restarts: 1, state: :running}, Bridge.get_status(bridge)) end)
    assert %{failures: 1} = Monitor.force_health_check(monitor)
    assert Bridge.get_status(bridge).restarts == 1
  end

  test "a peer that closed its output is replaced by the regular checks" do
    bridge = start_and_wait(fake_opts("closes_stdout"))
    start_monitor(bridge, interval: 20, timeout: 50, max_failures: 2)
    eventually(fn -> Bridge.get_status(bridge).restarts >= 1 end)
  end

  test "after a call was given up it pings at once and again, each time with the full timeout" do
    bridge = start_and_wait(FakePeer.opts(:silent))
    monitor = start_monitor(bridge, timeout: 500, max_failures: 3)
    old = FakePeer.of(bridge)

    {ms, _} =
      timed(fn ->
        GenServer.cast(monitor, :unanswered)
        # It does not wait for one answer before it asks for the next.
        eventually(fn -> Bridge.get_status(bridge).pending >= 3 end)
        eventually(fn -> FakePeer.of(bridge) not in [nil, old] end)
      end)

    # The full timeout for the third, too, 200 ms after the first.
    assert ms >= 690
    assert %{checks: checks, success_rate: +0.0} = Monitor.get_health_status(monitor)
    assert checks >= 3
  end

  test "after many such calls it pings no more often; after an answer it stops" do
    bridge = start_and_wait(FakePeer.opts(:echo))
    monitor = start_monitor(bridge, timeout: 2_000)
    for _ <- 1..1_000, do: GenServer.cast(monitor, :unanswered)
    eventually(fn -> Monitor.get_health_status(monitor).checks == 2 end)
    eventually(fn -> :sys.get_state(monitor).doubt == nil end)
    assert %{checks: 2, success_rate: 1.0} = Monitor.get_health_status(monitor)
  end

  test "when the peer has sent something, missed pings in doubt do not count, but checks do" do
    bridge = start_and_wait(FakePeer.opts(:silent))
    monitor = start_monitor(bridge, timeout: 200, max_failures: 1_000)
    assert %{failures: 1} = Monitor.force_health_check(monitor)
    GenServer.cast(monitor, :unanswered)
    eventually(fn -> Monitor.get_health_status(monitor).failures > 2 end)

    GenServer.cast(monitor, :unanswered)
    GenServer.cast(monitor, :heard)
    assert %{failures: 1, checks: checks} = Monitor.get_health_status(monitor)
    # Neither the pings under way count nor are there others.
    eventually(fn -> :sys.get_state(monitor).doubt == nil end)
    eventually(fn -> Bridge.get_status(bridge).pending == 0 end)
    assert %{failures: 1, checks: ^checks} = Monitor.get_health_status(monitor)

    assert %{failures: 2} = Monitor.force_health_check(monitor)
    GenServer.cast(monitor, :heard)
    assert %{failures: 2} = Monitor.get_health_status(monitor)
  end

  @tag :tmp_dir
  test "misses while the peer still starts lead to no restart", %{tmp_dir: dir} do
    file = Path.join(dir, "start")
    opts = fake_opts("waits_for_a_file", env: %{"FAKE_FILE" => file})
    bridge = start_supervised!({Bridge, opts})
    monitor = start_monitor(bridge, timeout: 200, max_failures: 1)

    for _ <- 1..5 do
      assert %{status: :unhealthy, failures: 0} = Monitor.force_health_check(monitor)
    end

    File.write!(file, "")
    eventually(fn -> Bridge.get_status(bridge).state == :running end)
    assert %{status: :healthy, checks: 6} = Monitor.force_health_check(monitor)
    assert Bridge.get_status(bridge).restarts == 0
  end

  test "a bridge with too many calls is not unhealthy" do
    bridge = start_and_wait(FakePeer.opts(:silent, max_pending: 1))
    monitor = start_monitor(bridge, max_failures: 1)
    task = Task.async(fn -> Bridge.call(bridge, :ping, %{}, 20_000) end)
    eventually(fn -> Bridge.get_status(bridge).pending == 1 end)

    for n <- 1..3 do
      assert %{status: :unknown, failures: 0, checks: ^n} = Monitor.force_health_check(monitor)
    end

    assert %{restarts: 0, pending: 1} = Bridge.get_status(bridge)
    Task.shutdown(task, :brutal_kill)
  end

  test "a bridge that is not running is a miss" do
    monitor = start_monitor(:nobody, max_failures: 2)
    assert %{status: :unhealthy, failures: 1} = Monitor.force_health_check(monitor)
    assert %{status: :unhealthy, failures: 0} = Monitor.force_health_check(monitor)
    assert %{status: :unhealthy, failures: 1} = Monitor.force_health_check(monitor)
  end

  test "what is no monitor that runs has the health of one before its first check" do
    pool = Keyword.merge(FakePeer.opts(:echo), name: __MODULE__.Pool, pool_size: 1)
    pool = start_supervised!({Pool, pool})
    silent = spawn_link(fn -> Process.sleep(:infinity) end)
    unknown = Monitor.get_health_status(start_monitor(:nobody))

    for server <-
          [nil, 5, "text", :nobody, {:global, :nobody}, {:nobody, :nowhere@invalid}] ++
            [{:via, NoSuchModule, 1}, self(), spawn(fn -> :ok end), silent, pool] do
      assert Monitor.get_health_status(server) == unknown
      assert Monitor.force_health_check(server) == unknown
      assert Monitor.reset_stats(server) == :ok
    end

    assert Pool.status(pool).peers != []
  end

  test "get_health_status/1 answers while a check runs; who asks for one meanwhile shares it" do
    bridge = start_and_wait(FakePeer.opts(:silent))
    monitor = start_monitor(bridge, timeout: 300, max_failures: 100)
    tasks = for _ <- 1..3, do: Task.async(fn -> Monitor.force_health_check(monitor) end)
    eventually(fn -> length(:sys.get_state(monitor).waiting) == 3 end)
    {ms, %{checks: 0}} = timed(fn -> Monitor.get_health_status(monitor) end)
    assert ms < 100
    assert tasks |> Task.await_many() |> Enum.map(& &1.checks) == [1, 1, 1]
  end

  test "a wrong option is refused with an error that names it" do
    for {key, value} <- [
          interval: 0,
          timeout: :infinity,
          max_failures: 0,
          bridge: nil,
          name: 5,
          other: 1
        ] do
      assert {:error, %ArgumentError{message: message}} = Monitor.start_link([{key, value}])
      assert message =~ inspect(key)
    end
  end
end
