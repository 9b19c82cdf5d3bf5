defmodule DSPex.PythonBridge.ReaperTest do
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Reaper

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
    assert Reaper.kill_if(os_pid, Reaper.start_time(os_pid)) == :ok
    eventually(fn -> not alive?(os_pid) and not alive?(child) end)
  end

  test "kills what a process that is gone has left behind" do
    {os_pid, child} = start_process()
    started = Reaper.start_time(os_pid)
    kill(os_pid)
    eventually(fn -> Reaper.start_time(os_pid) == nil end)
    assert alive?(child)
    Reaper.kill_if(os_pid, started)
    eventually(fn -> not alive?(child) end)
  end

  test "spares a process that only got the number of another" do
    if Reaper.start_time(String.to_integer(System.pid())) do
      {os_pid, child} = start_process()
      Reaper.kill_if(os_pid, "1")
      assert alive?(os_pid) and alive?(child)
      Reaper.kill_if(os_pid, Reaper.start_time(os_pid))
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
