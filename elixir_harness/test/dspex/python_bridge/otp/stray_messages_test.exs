defmodule DSPex.PythonBridge.OTP.StrayMessagesTest do
  @moduledoc "What reaches a process by mistake: messages, casts and calls that are not for it."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers
  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.{Bridge, Error, Monitor, Pool}
  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.OS.Reaper
  alias DSPex.PythonBridge.Pool.Handle

  @contents "the contents"

  # Of each tag that some process here knows, shapes that it does not; and what none knows.
  defp messages(port, stranger) do
    ref = make_ref()
    me = self()
    request = %Request{ref: ref, pid: me, timeout: 5, body: @contents}

    [:any, {}, {:any}, @contents, %{}, [1 | 2], 1.5, ref, me] ++
      [{:request}, {:request, 1}, {:request, %{}}, {:request, 1, 2}, request] ++
      for what <- [
            {:create, 5, nil},
            {:create, "x", :stamp},
            {:cleanup, [1 | 2], nil},
            {:cleanup, :some, nil},
            :what
          ] do
        {:request, %{request | change: what}}
      end ++
      [
        {:request, %{request | pid: {:no, :pid}}},
        {:request, %{request | body: {:no, :body}}},
        {:request, %{request | timeout: :soon}},
        {:request, %{request | timeout: -1}},
        {:request, %{request | ref: :no_ref}},
        {:request, %{request | ref: nil, pid: nil, timeout: :infinity}},
        {:request, %{request | deaths: :many}},
        {:request, %{request | retry: :there}},
        {:request, %{request | stream?: 1}},
        {:request, %{request | tools?: 2}},
        {:request, Map.from_struct(request)},
        {:request, ref, me, 5, @contents, {:here, 0}},
        {:request, ref, me, 5, @contents, {:there, 0, nil}},
        {:request, ref, me, 5, @contents, {:here, 0, nil}, %{}},
        {:request, ref, me, 5, {:no, :body}, {:here, 0, nil}, %{stream?: false, tools?: false}},
        {:tool_result, port, nil, {:no, :frame}},
        {:tool_result, :port, nil, @contents},
        {:tool_result, 1},
        {:abandon, :x},
        {:abandon, ref},
        {{:caller_down, :x}, ref, :process, me, @contents},
        {:timeout, nil, :open},
        {:timeout, nil, :check},
        {:timeout, ref, :start_timeout},
        {:timeout, ref, {:cast, :x}},
        {:timeout, ref, :acquit},
        {:DOWN, nil, :process, me, @contents},
        {:DOWN, ref, :process, :x, @contents},
        {:dropped, :many},
        {:drain_timeout, :x},
        {:start_failure, 1, 2, 3, 4},
        {:start_failure, nil, "why", %{}, "then"},
        {port, {:data, ~s({"id":1,"success":true,"result":1})}},
        {port, {:data, ~s({"id":1,"tool_call":{"call_id":1}})}},
        {port, {:data, {:no, :frame}}},
        {port, {:exit_status, %{}}},
        {port, {:exit_status, 1}},
        {port, :closed},
        {:EXIT, port, {:a, @contents}},
        {:EXIT, me, @contents},
        {:EXIT, :x, :y},
        {:peer_gone, nil},
        {:peer_gone, :x},
        {:peer_gone, -1},
        {ref, :reply},
        {ref, :chunk, @contents},
        {:next, :nobody},
        {:answered, me, @contents},
        {:fetch, :nobody, :ref, "name"},
        {:proxy, :x},
        {:record, nil, {:no, :frame}},
        {:record, 1},
        {:watch, :x},
        {:kill, :x},
        # A process of the system, but no peer.
        {:kill, stranger},
        {{:finish, :long}, ref},
        {{:finish, 0}, :nobody},
        {:"ETS-TRANSFER", 1, 2, 3},
        {:wait, :nobody, :x, :y, :z},
        {:wait, ref, me, [1 | 2], []},
        {:slot, :x, :down},
        {:slot, 1, :up},
        {{:waiter_gone, 1}, ref, :process, me, :x},
        {:changed, 1, me},
        :greet_again,
        {ref, :join, :group, [me]},
        {:"$gen_cast", :unknown},
        {:"$gen_cast", {:replace, @contents}}
      ]
  end

  # It answers an unknown call, after all that was sent before, and is the same process as before.
  defp assert_unharmed(pid) do
    assert GenServer.call(pid, {:unknown, @contents}) == {:error, :unknown_call}
    assert Process.alive?(pid)
  end

  # What was logged while each message reached the process.
  defp pester(pid) do
    port = Port.open({:spawn_executable, "/bin/cat"}, [:binary])
    {:os_pid, stranger} = Port.info(port, :os_pid)

    capture_log(fn ->
      Enum.each(messages(port, stranger), &send(pid, &1))
      assert_unharmed(pid)
      assert alive?(stranger)
    end)
  end

  defp assert_one_line(log, pid) do
    assert [_before, _after] = String.split(log, "#{inspect(pid)}: dropped a message")
    refute log =~ @contents
  end

  defp start_bridge do
    bridge = start_supervised!({Bridge, fake_opts("plays")})
    eventually(fn -> Bridge.get_status(bridge).state == :running end, 10_000)
    bridge
  end

  defp start_pool(name) do
    opts = "plays" |> fake_opts(pool_size: 1) |> Keyword.put(:name, name)
    pool = start_supervised!({Pool, opts})
    eventually(fn -> match?([%{state: :running}], Pool.status(pool).peers) end, 10_000)
    pool
  end

  test "none ends a bridge, nor a call that waits; one line is logged, without contents" do
    bridge = start_bridge()

    waiting =
      Task.async(fn ->
        Bridge.call(bridge, :execute_program, %{play: [["go", "on"], ["reply"]]})
      end)

    eventually(fn -> Bridge.get_status(bridge).pending == 1 end)
    os_pid = Bridge.get_status(bridge).os_pid
    assert_one_line(pester(bridge), bridge)
    {:ok, _} = Bridge.call(bridge, :go, %{name: "on"})
    assert {:ok, _} = Task.await(waiting)
    assert %{os_pid: ^os_pid, restarts: 0, pending: 0} = Bridge.get_status(bridge)
  end

  test "none ends the helper processes of a bridge" do
    bridge = start_bridge()
    %{reaper: reaper, log_forwarder: log} = :sys.get_state(bridge)
    os_pid = Bridge.get_status(bridge).os_pid
    for pid <- [reaper, log.pid], do: assert_one_line(pester(pid), pid)
    assert alive?(os_pid)
    assert {:ok, _} = Bridge.call(bridge, :ping)
    assert Reaper.finish(reaper) == :ok
  end

  test "none ends a monitor" do
    monitor = start_supervised!({Monitor, name: nil, bridge: start_bridge(), interval: 600_000})
    assert_one_line(pester(monitor), monitor)
    assert %{status: :healthy} = Monitor.force_health_check(monitor)
  end

  test "none ends a coordinator or a bridge of a pool", %{test: name} do
    pool = start_pool(name)
    coordinator = Process.whereis(Handle.coordinator(name))
    assert_one_line(pester(coordinator), coordinator)
    assert {:ok, _} = Pool.call(pool, :ping)
    assert {:ok, bridge} = Pool.checkout(pool)
    bridge = Process.whereis(bridge)
    assert_one_line(pester(bridge), bridge)
    assert {:ok, _} = Pool.call(pool, :ping)
    assert Process.whereis(Handle.coordinator(name)) == coordinator
  end

  test "none ends a call with chunks and tools, or stays in a mailbox" do
    bridge = start_bridge()
    test = self()
    play = [["count", 2], ["tool", 1, "t", %{}], ["result", 1], ["reply"]]
    tool = fn _ -> send(test, {:tool, self()}) && receive(do: (:go -> 7)) end
    opts = [tools: %{t: tool}, on_chunk: &send(test, {:chunk, &1["chunk"]})]
    call = Task.async(fn -> Bridge.request(bridge, :execute_program, %{play: play}, opts) end)
    assert_receive {:tool, running}, 5_000
    {:parent, proxy} = Process.info(running, :parent)
    # It watches the process of the tool, as the proxy does; the other one is the bridge.
    {:monitored_by, watchers} = Process.info(running, :monitored_by)
    [holder] = watchers -- [proxy]

    for pid <- [proxy, holder] do
      assert_one_line(pester(pid), pid)
      assert {:messages, []} = {:messages, :erlang.process_info(pid, :messages) |> elem(1)}
      assert {:message_queue_len, 0} = Process.info(pid, :message_queue_len)
    end

    send(running, :go)
    assert {:ok, %{"1" => %{"result" => 7}}, _meta} = Task.await(call)
    assert_received {:chunk, "0"}
    assert_received {:chunk, "1"}
  end

  test "a process that links itself to a bridge and fails takes nothing along" do
    bridge = start_bridge()

    log =
      capture_log(fn ->
        {pid, monitor} =
          spawn_monitor(fn ->
            Process.link(bridge)
            exit({:failed, @contents})
          end)

        assert_receive {:DOWN, ^monitor, :process, ^pid, _reason}
        assert_unharmed(bridge)
      end)

    refute log =~ @contents
    assert {:ok, _} = Bridge.call(bridge, :ping)
  end

  test "a server of another kind is refused, and unharmed", %{test: name} do
    bridge = start_bridge()
    pool = start_pool(name)
    monitor = start_supervised!({Monitor, name: nil, bridge: bridge, interval: 600_000})
    coordinator = Process.whereis(Handle.coordinator(name))
    foreign = start_supervised!({Agent, fn -> nil end})
    supervisor = start_supervised!({DynamicSupervisor, strategy: :one_for_one})
    processes = [bridge, pool, monitor, coordinator, foreign, supervisor]

    log =
      capture_log(fn ->
        for server <- [monitor, coordinator, foreign, supervisor, Handle.bridges_supervisor(name)] do
          assert {:error, :bridge_not_running} =
                   Bridge.call(server, :ping, %{a: @contents}, 60_000)

          assert {:error, %Error{type: :bridge_not_running}} = Bridge.request(server, :ping, %{})

          assert [error: %Error{type: :bridge_not_running}] =
                   Enum.to_list(Bridge.stream(server, %{}))

          assert :ok = Bridge.cast(server, :ping, %{a: @contents})
          assert %{state: :failed, os_pid: nil} = Bridge.get_status(server)
          assert {:error, :bridge_not_running} = Bridge.restart(server)
          assert :ok = Bridge.stop(server)
        end

        for server <- [pool, bridge, coordinator, foreign, supervisor],
            ask <- [
              &Monitor.get_health_status/1,
              &Monitor.force_health_check/1,
              &Monitor.reset_stats/1
            ] do
          assert_raise ArgumentError, ~r/is not a monitor of a bridge/, fn -> ask.(server) end
        end

        for server <- [bridge, monitor, coordinator, foreign, supervisor] do
          refused = Pool.call(server, :ping)
          if server == bridge, do: assert({:error, "#PID<" <> _} = refused)
          if server != bridge, do: assert({:error, :bridge_not_running} = refused)
          assert {:error, :bridge_not_running} = Pool.checkout(server)
          assert {:error, :bridge_not_running} = Pool.checkin(server, bridge)
          assert %{peers: [], nodes: []} = Pool.status(server)
        end
      end)

    refute log =~ @contents
    for pid <- processes, do: assert(Process.alive?(pid))
    assert {:ok, _} = Bridge.call(bridge, :ping)
    assert {:ok, _} = Pool.call(pool, :ping)
  end

  test "a request that reaches another process here is answered at once" do
    monitor = start_supervised!({Monitor, name: nil, bridge: start_bridge(), interval: 600_000})

    log =
      capture_log(fn ->
        refused = Caller.send_and_wait(monitor, :infinity, %Request{body: @contents})
        assert refused == {:error, :bridge_not_running}
      end)

    assert_one_line(log, monitor)
  end
end
