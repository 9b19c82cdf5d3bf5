defmodule DSPex.PythonBridge.TelemetryTest do
  @moduledoc "Each event by real work; and all works in an application without `:telemetry`."

  # Whether the application has it is global to the BEAM.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import DSPex.Test.Telemetry, only: [events: 0]

  alias DSPex.PythonBridge.{Bridge, Error, Monitor, Pool, Telemetry}
  alias DSPex.PythonBridge.Telemetry.CallSpan
  alias DSPex.Test.FakePeer
  alias DSPex.Test.Telemetry, as: Host

  @compile {:no_warn_undefined, :telemetry}

  @start [:bridge, :call, :start]
  @stop [:bridge, :call, :stop]
  @exception [:bridge, :call, :exception]
  @pool_start [:pool, :call, :start]
  @pool_stop [:pool, :call, :stop]
  @up [:bridge, :peer, :up]
  @down [:bridge, :peer, :down]
  @resend [:bridge, :resend]
  @check [:monitor, :check]
  @checkout [:pool, :checkout]

  setup context do
    if context[:without] do
      :ok
    else
      Host.install()
      on_exit(&Host.remove/0)
      Host.attach()
    end
  end

  defp start(opts, name \\ :observed) do
    start_and_wait([{:name, name} | opts])
    name
  end

  defp fake_bridge(kind, opts \\ []),
    do: kind |> FakePeer.opts(opts) |> Keyword.delete(:name) |> start()

  defp start_pool(opts) do
    opts = Keyword.merge(opts, name: :observed_pool)
    start_supervised!({Pool, opts})
    all_up(:observed_pool)
    :observed_pool
  end

  defp os_pid(bridge), do: Bridge.get_status(bridge).os_pid

  defp of_calls,
    do: for({[:bridge, :call | _] = event, _, metadata} <- events(), do: {event, metadata})

  defp of_pool_calls,
    do: for({[:pool, :call | _] = event, _, metadata} <- events(), do: {event, metadata})

  describe "[:bridge, :call]" do
    test "is a span around call and request: names and the kind of the result, no contents" do
      bridge = start(Keyword.delete(real_opts(), :name))
      events()
      secret = "the contents"
      create = %{id: "qa", signature: %{inputs: [%{name: "q"}], outputs: [%{name: "a"}]}}
      before = System.monotonic_time()
      assert {:ok, _} = Bridge.call(bridge, :create_program, create, 20_000)
      took = System.monotonic_time() - before

      assert [
               {@start, %{monotonic_time: started, system_time: _}, start},
               {@stop, %{monotonic_time: ended, duration: duration}, stop}
             ] = events()

      assert ended - started == duration and duration <= took
      assert duration > took / 2
      assert %{bridge: :observed, pool: nil, command: "create_program", program_id: "qa"} = start
      assert is_reference(start.telemetry_span_context)
      assert stop == Map.put(start, :result, :ok)

      args = %{program_id: "qa", inputs: %{q: secret}}
      assert {:ok, _, _} = Bridge.request(bridge, "execute_program", args, timeout: 20_000)

      assert [{@start, start}, {@stop, %{result: :ok, program_id: "qa"} = stop}] = of_calls()
      assert start.command == "execute_program"
      refute inspect([start, stop]) =~ secret

      missing = %{program_id: "none", inputs: %{q: secret}}
      assert {:error, "Program not found: none"} = Bridge.call(bridge, :execute_program, missing)
      assert [_, {@stop, %{result: :program_not_found, program_id: "none"}}] = of_calls()

      # A process is identified by its name.
      pid = Process.whereis(bridge)
      assert {:error, _} = Bridge.call(pid, :no_such, %{}, 5_000)
      assert [_, {@stop, %{bridge: :observed, result: :unknown_command}}] = of_calls()
    end

    test "ends with :exception when what is called with a chunk raises; its contents are not reported" do
      bridge = fake_bridge(:plays)
      events()
      play = %{play: [["count", 3], ["reply"]], program_id: "p"}

      assert_raise ArgumentError, fn ->
        on_chunk = fn chunk -> raise ArgumentError, inspect(chunk) end
        Bridge.request(bridge, :execute_program, play, on_chunk: on_chunk)
      end

      assert [
               {@start, _, start},
               {@exception, %{duration: _, monotonic_time: _}, exception}
             ] = events()

      assert %{kind: :error, reason: ArgumentError, program_id: "p"} = exception
      assert exception.telemetry_span_context == start.telemetry_span_context
      assert Exception.format_stacktrace(exception.stacktrace) =~ "telemetry_test.exs"
      refute inspect(exception) =~ "chunk\" =>"

      assert catch_throw(
               Enum.each(Bridge.stream(bridge, play), fn element -> throw({:seen, element}) end)
             )

      assert [_, {@exception, %{kind: :throw, reason: :seen}}] = of_calls()
    end

    test "is a span around each enumeration of a stream, from its first element asked for" do
      bridge = fake_bridge(:plays)
      events()
      stream = Bridge.stream(bridge, %{play: [["count", 3], ["reply"]], program_id: "p"})
      assert of_calls() == []
      assert [_, _, _, {:ok, _, _}] = Enum.to_list(stream)
      assert [{@start, _}, {@stop, stop}] = of_calls()
      assert %{bridge: :observed, command: "execute_program", result: :ok, program_id: "p"} = stop
      assert [_] = Enum.take(stream, 1)
      assert [{@start, _}, {@stop, %{result: :cancelled}}] = of_calls()
      # Which suspends it.
      assert [{_, 1}] = stream |> Stream.zip([1]) |> Enum.to_list()
      assert [{@start, _}, {@stop, %{result: :cancelled}}] = of_calls()
      assert [{:error, %Error{}}] = Enum.to_list(Bridge.stream(:nobody, %{}))
      assert [{@start, _}, {@stop, %{result: :bridge_not_running}}] = of_calls()
    end
  end

  test "[:pool, :call] is one span around a call to a pool, whichever peers serve" do
    pool = start_pool(FakePeer.opts(:who, pool_size: 2))
    events()
    create = %{id: "qa", signature: "question -> answer"}
    assert {:ok, _} = Pool.call(pool, :create_program, create, 20_000)
    assert [{@pool_start, start}, {@pool_stop, stop}] = of_pool_calls()
    assert %{pool: ^pool, bridge: nil, command: "create_program", program_id: "qa"} = start
    assert stop == Map.put(start, :result, :ok)
    assert {:ok, _, _} = Pool.request(Process.whereis(pool), :ping, %{}, timeout: 5_000)
    assert [_, {@pool_stop, %{pool: ^pool, result: :ok}}] = of_pool_calls()
    assert {:error, :timeout} = Pool.call(pool, :ping, %{}, 0)
    assert [_, {@pool_stop, %{result: :timeout}}] = of_pool_calls()
    assert {:error, :bridge_not_running} = Pool.call(:no_pool, :ping)
    assert [_, {@pool_stop, %{pool: :no_pool, result: :bridge_not_running}}] = of_pool_calls()
    # The monitors' pings are calls to bridges.
    refute_received {@start, _, %{command: "create_program"}}
  end

  describe "[:bridge, :peer]" do
    test "reports when a peer is up, and why it is down" do
      bridge = "echo" |> fake_opts() |> Keyword.delete(:name) |> start()
      first = os_pid(bridge)
      assert_received {@up, %{duration: duration}, up}
      assert System.convert_time_unit(duration, :native, :millisecond) in 1..10_000
      assert up == %{bridge: :observed, os_pid: first, reason: :start}

      kill(first)
      assert_receive {@down, %{uptime: uptime}, down}, 5_000
      assert System.convert_time_unit(uptime, :native, :millisecond) >= 1
      assert %{bridge: :observed, os_pid: ^first, reason: :died, was_up: true} = down
      assert down.detail == "exit status 137"
      assert_receive {@up, _, %{reason: :restart, os_pid: second}}, 10_000

      eventually(fn -> Bridge.get_status(bridge).state == :running end)
      assert Bridge.restart(bridge) == :ok
      assert_receive {@up, _, %{reason: :restart, os_pid: third}}
      assert_receive {@down, _, %{reason: :replaced, os_pid: ^second, detail: nil}}, 5_000

      assert Bridge.stop(bridge) == :ok
      assert_received {@down, _, %{reason: :stopped, os_pid: ^third, was_up: true}}
      refute_received {@down, _, _}
    end
  end

  test "[:bridge, :resend] reports how many calls are sent again, and why" do
    bridge = fake_bridge(:silent)
    calls = for _ <- 1..3, do: Task.async(fn -> Bridge.call(bridge, :ping, %{}, 500) end)
    once = Task.async(fn -> Bridge.request(bridge, :ping, %{}, retry: false) end)
    eventually(fn -> Bridge.get_status(bridge).pending == 4 end)
    FakePeer.kill(bridge)
    assert_receive {@resend, %{count: 3}, metadata}, 5_000
    assert metadata == %{bridge: :observed, pool: nil, reason: :died}
    assert {:error, %Error{type: :python_process_died}} = Task.await(once)
    Task.await_many(calls)
    refute_received {@resend, _, _}
  end

  test "[:bridge, :resend] comes from a pool's caller, too, with the name of the peer that died" do
    # In its end it would wait for what the monitor has asked.
    env = %{"DSPY_BRIDGE_DRAIN_MS" => "0"}
    pool = start_pool(FakePeer.opts(:silent, pool_size: 1, env: env))
    call = Task.async(fn -> Pool.call(pool, :ping, %{}, 500) end)
    [%{bridge: bridge}] = Pool.status(pool).peers
    eventually(fn -> Bridge.get_status(bridge).pending == 1 end)
    FakePeer.kill(bridge)
    assert_receive {@resend, %{count: 1}, metadata}, 5_000
    assert metadata == %{bridge: bridge, pool: pool, reason: :died}
    Task.await(call)
  end

  test "[:monitor, :check] reports what each check found, also of the one that has the peer replaced" do
    bridge = fake_bridge(:silent, answers: 2)

    monitor =
      start_supervised!(
        {Monitor,
         name: nil, bridge: bridge, interval: 4_000_000_000, timeout: 300, max_failures: 2}
      )

    events()
    check = fn -> Monitor.force_health_check(monitor) end
    assert %{status: :healthy} = check.()
    assert_received {@check, %{duration: duration}, metadata}
    assert metadata == %{bridge: :observed, result: :ok, failures: 0}
    assert System.convert_time_unit(duration, :native, :millisecond) < 300
    assert %{failures: 1} = check.()
    assert_received {@check, _, %{result: :timeout, failures: 1}}
    assert %{failures: 0} = check.()
    assert_received {@check, %{duration: duration}, %{result: :timeout, failures: 2}}
    assert System.convert_time_unit(duration, :native, :millisecond) >= 300
    assert_receive {@down, _, %{reason: :unresponsive}}, 5_000
    Bridge.stop(bridge)
    check.()
    assert_received {@check, _, %{result: :bridge_not_running}}
  end

  test "[:pool, :checkout] reports the bridge that was given, or why none was" do
    pool = start_pool(FakePeer.opts(:echo, pool_size: 1))
    assert {:ok, _} = Pool.call(pool, :ping, %{}, 5_000)
    events()
    assert {:ok, bridge} = Pool.checkout(pool)
    assert_received {@checkout, %{duration: duration}, metadata}
    assert is_integer(duration)
    assert metadata == %{pool: pool, bridge: bridge, result: :ok}
    DSPex.Test.PoolProbe.stop_serving(pool)
    assert {:error, :pool_exhausted} = Pool.checkout(pool)
    assert_received {@checkout, _, %{result: :pool_exhausted, bridge: nil}}
    assert {:error, :bridge_not_running} = Pool.checkout(:no_pool)
    assert_received {@checkout, _, %{pool: :no_pool, result: :bridge_not_running}}
  end

  describe "an application without :telemetry" do
    @describetag :without

    defp work do
      bridge = fake_bridge(:plays)
      assert {:ok, _, _} = Bridge.request(bridge, :heard)
      play = %{play: [["count", 1], ["reply"]]}
      assert [{:chunk, _, _}, {:ok, _, _}] = Enum.to_list(Bridge.stream(bridge, play))
      assert [_] = Enum.take(Bridge.stream(bridge, play), 1)
      monitor = start_supervised!({Monitor, name: nil, bridge: :nobody})
      assert %{status: :unhealthy} = Monitor.force_health_check(monitor)
      FakePeer.kill(bridge)
      pool = start_pool(FakePeer.opts(:echo, pool_size: 1))
      assert {:ok, _} = Pool.call(pool, :ping, %{}, 5_000)
      assert {:ok, _bridge} = Pool.checkout(pool)
      assert Bridge.stop(bridge) == :ok
    end

    test "is what the tests run on: no event is sent, and all works as before" do
      refute Code.ensure_loaded?(:telemetry)
      refute Telemetry.look()
      assert Telemetry.execute([:bridge, :resend], %{}, %{}) == :ok
      assert CallSpan.begin(:bridge, :a, :ping, %{}, meta: true) == {nil, [meta: true]}
      work()
    end
  end
end
