defmodule DSPex.Contract.FaultsTest do
  @moduledoc "The contract: what happens when Python dies, hangs or is told to stop. Each test ends its own peer."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Monitor}
  alias DSPex.Test.SilentLM

  defp start(opts \\ []) do
    bridge = start_supervised!({Bridge, real_opts(opts)}, id: make_ref())
    {:ok, _} = Bridge.call(bridge, :create_program, %{id: "qa", signature: "question -> answer"})
    bridge
  end

  defp start_silent, do: start(SilentLM.lm_opts(SilentLM.start()))
  defp os_pid(bridge), do: Bridge.get_status(bridge).os_pid

  defp run(bridge, opts \\ []) do
    args = %{program_id: "qa", inputs: %{question: "?"}}
    Bridge.request(bridge, :execute_program, args, opts)
  end

  test "programs are there again after Python was killed" do
    bridge = start()
    old = os_pid(bridge)
    kill(old)
    assert {:ok, %{"answer" => _}, _meta} = run(bridge)
    assert os_pid(bridge) != old
    assert %{state: :running, restarts: 1} = Bridge.get_status(bridge)
  end

  test "calls in flight are sent to the next peer" do
    bridge = start_silent()
    callers = for _ <- 1..20, do: spawn(fn -> run(bridge, timeout: 30_000) end)
    for _ <- callers, do: assert_receive({:lm_request, _line}, 10_000)
    kill(os_pid(bridge))
    for _ <- callers, do: assert_receive({:lm_request, _line}, 10_000)
    assert Bridge.get_status(bridge).pending == 20
    Enum.each(callers, &Process.exit(&1, :kill))
  end

  test "a call with retry: false fails when its peer dies" do
    bridge = start_silent()
    call = Task.async(fn -> run(bridge, retry: false, timeout: 30_000) end)
    assert_receive {:lm_request, _line}, 10_000
    kill(os_pid(bridge))
    assert {:error, %Error{type: :python_process_died}} = Task.await(call)
  end

  test "a peer that hangs is replaced by the monitor" do
    bridge = start()
    opts = [name: nil, bridge: bridge, interval: 50, timeout: 100, max_failures: 3]
    monitor = start_supervised!({Monitor, opts})
    old = os_pid(bridge)
    signal("STOP", old)
    eventually(fn -> os_pid(bridge) not in [old, nil] end, 20_000)
    assert {:ok, _result, _meta} = run(bridge)
    eventually(fn -> Monitor.get_health_status(monitor).status == :healthy end, 10_000)
    refute alive?(old)
  end

  test "stop leaves no process, busy as it is" do
    env = %{"DSPY_BRIDGE_DRAIN_MS" => "300"}
    bridge = start([env: env] ++ SilentLM.lm_opts(SilentLM.start()))
    spawn(fn -> run(bridge) end)
    assert_receive {:lm_request, _line}, 10_000
    old = os_pid(bridge)
    :ok = Bridge.stop(bridge)
    {ms, _} = timed(fn -> eventually(fn -> not alive?(old) end) end)
    assert ms < 1_000
  end

  test "restart gives a new Python process, and loses no call" do
    bridge = start()
    old = os_pid(bridge)
    calls = for _ <- 1..50, do: Task.async(fn -> run(bridge) end)
    assert Bridge.restart(bridge) == :ok
    for result <- Task.await_many(calls, 30_000), do: assert({:ok, _, _} = result)
    assert os_pid(bridge) != old
  end

  test "the status is there at once, whatever the peer does" do
    bridge = start()
    signal("STOP", os_pid(bridge))
    {ms, status} = timed(fn -> Bridge.get_status(bridge) end)
    assert ms < 500
    assert %{state: :running, pending: 0, uptime_ms: _} = status
  end

  @tag :tmp_dir
  test "what Python code and its children print does not reach the frames", %{tmp_dir: dir} do
    code = """
    import os, subprocess, sys
    def prints():
        print("stray")
        os.write(1, b"stray")
        sys.__stdout__.flush()
        subprocess.run(["echo", "stray"], check=True)
    """

    File.write!(Path.join(dir, "noisy.py"), code)
    bridge = start(env: %{"DSPY_BRIDGE_INIT" => "noisy:prints", "PYTHONPATH" => dir})
    assert {:ok, %{"answer" => _}, _meta} = run(bridge)
    assert Bridge.get_status(bridge).unreadable_frames == 0
  end

  test "an interpreter that does not exist is a state and an error, and no crash" do
    opts = real_opts(python_executable: "/nowhere/python3")
    bridge = start_supervised!({Bridge, opts})
    assert {:error, %Error{message: text}} = run(bridge, timeout: 5_000)
    assert text =~ "/nowhere/python3"
    assert %{state: :failed, last_error: error} = Bridge.get_status(bridge)
    assert error =~ "/nowhere/python3"
  end
end
