defmodule DSPex.PythonBridge.ReaperTest do
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{OsProcess, Reaper}

  # A process of the system, leader of its own group, with a child in it.
  defp start_process do
    script = "sleep 600 & echo $!; wait"
    port = Port.open({:spawn_executable, "/bin/sh"}, [:binary, args: ["-c", script]])
    {:os_pid, os_pid} = Port.info(port, :os_pid)
    assert_receive {^port, {:data, child}}, 5_000
    {os_pid, child |> String.trim() |> String.to_integer()}
  end

  test "kills the process and what it started" do
    {os_pid, child} = start_process()
    assert OsProcess.kill_group(os_pid, OsProcess.start_time(os_pid)) == :ok
    eventually(fn -> not alive?(os_pid) and not alive?(child) end)
  end

  test "kills what a process that is gone has left behind" do
    {os_pid, child} = start_process()
    started = OsProcess.start_time(os_pid)
    kill(os_pid)
    eventually(fn -> OsProcess.start_time(os_pid) in [:ended, nil] end)
    assert alive?(child)
    OsProcess.kill_group(os_pid, started)
    eventually(fn -> not alive?(child) end)
  end

  test "spares a process that only got the number of another" do
    if OsProcess.start_time(String.to_integer(System.pid())) do
      {os_pid, child} = start_process()
      OsProcess.kill_group(os_pid, "1")
      assert alive?(os_pid) and alive?(child)
      OsProcess.kill_group(os_pid, OsProcess.start_time(os_pid))
    end
  end

  test "is no part of the application whose process started it" do
    reaper = Reaper.start(self())

    eventually(fn ->
      Process.info(reaper, :group_leader) == {:group_leader, Process.whereis(:init)}
    end)
  end

  test "tells once of a peer that is gone" do
    {os_pid, child} = start_process()
    reaper = Reaper.start(self())
    Reaper.watch(reaper, os_pid)
    kill(os_pid)
    assert_receive {:peer_gone, ^os_pid}, 5_000
    refute_receive {:peer_gone, ^os_pid}, 300
    assert alive?(child)
    assert Reaper.finish(reaper) == :ok
    eventually(fn -> not alive?(child) end, 500)
  end

  test "tells of a peer that was gone before it was looked at, where that can be seen" do
    {os_pid, child} = start_process()
    kill(os_pid)
    kill(child)

    if OsProcess.start_time(String.to_integer(System.pid())) do
      eventually(fn -> OsProcess.start_time(os_pid) == :ended end)
      reaper = Reaper.start(self())
      Reaper.watch(reaper, os_pid)
      assert_receive {:peer_gone, ^os_pid}, 5_000
    end
  end

  test "ends the processes of its owner some time after the owner's end, and itself" do
    {os_pid, child} = start_process()
    owner = spawn(fn -> Process.sleep(:infinity) end)
    reaper = Reaper.start(owner)
    monitor = Process.monitor(reaper)
    Reaper.watch(reaper, os_pid)
    Process.exit(owner, :kill)
    assert_receive {:DOWN, ^monitor, :process, ^reaper, :normal}, 2_000
    eventually(fn -> not alive?(os_pid) and not alive?(child) end)
  end
end
