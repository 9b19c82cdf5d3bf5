defmodule DSPex.PythonBridge.OS.WithoutProcTest do
  @moduledoc "Processes of the system where there is no /proc, as on macOS."

  # It hides /proc from all bridges.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, OS}
  alias DSPex.PythonBridge.OS.Reaper

  setup do: put_config(:proc_root, "/there/is/none")

  # A process of the system, leader of its own group.
  defp start_process do
    port =
      Port.open({:spawn_executable, "/bin/sh"}, [:binary, args: ["-c", "echo; exec sleep 600"]])

    assert_receive {^port, {:data, _}}, 5_000
    {:os_pid, os_pid} = Port.info(port, :os_pid)
    on_exit(fn -> System.cmd("/bin/sh", ["-c", "kill -9 #{os_pid} 2>/dev/null"]) end)
    os_pid
  end

  test "the start time of a process is known, and its end" do
    os_pid = start_process()
    started = OS.Process.start_time(os_pid)
    assert is_binary(started)
    assert started =~ ~r/\d\d:\d\d:\d\d/
    assert OS.Process.start_time(os_pid) == started
    refute OS.Process.gone?(os_pid, started)
    kill(os_pid)
    eventually(fn -> not alive?(os_pid) end)
    assert OS.Process.gone?(os_pid, started)
    assert OS.Process.start_time(os_pid) == :ended
  end

  test "a process that has the reused pid of another is not killed" do
    os_pid = start_process()
    OS.Process.kill_group(os_pid, "Thu Jan  1 00:00:00 1970")
    assert alive?(os_pid)
    OS.Process.kill_group(os_pid, OS.Process.start_time(os_pid))
    eventually(fn -> not alive?(os_pid) end)
  end

  test "without ps, the pid alone has to do" do
    os_pid = start_process()
    put_system_env("PATH", "/there/is/none")
    assert OS.Process.start_time(os_pid) == nil
    refute OS.Process.gone?(os_pid, nil)
    OS.Process.kill_group(os_pid, nil)
    eventually(fn -> OS.Process.gone?(os_pid, nil) end)
  end

  test "a stop in order takes no longer than the peer" do
    os_pid = start_process()
    reaper = Reaper.start(self())
    Reaper.watch(reaper, os_pid)
    kill(os_pid)
    eventually(fn -> not alive?(os_pid) end)
    # The grace is 600 ms.
    {ms, :ok} = timed(fn -> Reaper.finish(reaper) end)
    assert ms < 500
  end

  test "a peer that is gone is reported, one that is there is not" do
    os_pid = start_process()
    {:ok, reaper} = Reaper.init({self(), [], []})
    {:noreply, reaper, look_ms} = Reaper.handle_info({:watch, os_pid}, reaper)
    # Each starts a process.
    assert look_ms >= 1_000
    look = fn reaper -> elem(Reaper.handle_info(:timeout, reaper), 1) end
    reaper = look.(look.(reaper))
    refute_received {:peer_gone, _os_pid}
    kill(os_pid)
    eventually(fn -> not alive?(os_pid) end)
    look.(look.(reaper))
    assert_received {:peer_gone, ^os_pid}
  end

  test "no process is left of a bridge that is killed" do
    spec = Supervisor.child_spec({Bridge, fake_opts("stubborn")}, restart: :temporary)
    {:ok, bridge} = start_supervised(spec)
    {:ok, %{"child" => child}} = Bridge.call(bridge, :ping, %{}, 10_000)
    %{os_pid: os_pid} = Bridge.get_status(bridge)
    Process.exit(bridge, :kill)
    eventually(fn -> not alive?(os_pid) and not alive?(child) end)
  end
end
