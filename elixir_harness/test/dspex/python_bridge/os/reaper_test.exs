defmodule DSPex.PythonBridge.OS.ReaperTest do
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, OS}

  alias DSPex.PythonBridge.OS.Reaper
  alias DSPex.PythonBridge.OTP.Registry

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
    assert OS.Process.kill_group(os_pid, OS.Process.start_time(os_pid)) == :ok
    eventually(fn -> not alive?(os_pid) and not alive?(child) end)
  end

  test "kills the children of a process that is gone" do
    {os_pid, child} = start_process()
    started = OS.Process.start_time(os_pid)
    kill(os_pid)
    eventually(fn -> OS.Process.start_time(os_pid) in [:ended, nil] end)
    assert alive?(child)
    OS.Process.kill_group(os_pid, started)
    eventually(fn -> not alive?(child) end)
  end

  test "does not kill a process that has the reused pid of another" do
    if OS.Process.start_time(String.to_integer(System.pid())) do
      {os_pid, child} = start_process()
      OS.Process.kill_group(os_pid, "1")
      assert alive?(os_pid) and alive?(child)
      OS.Process.kill_group(os_pid, OS.Process.start_time(os_pid))
    end
  end

  test "survives the application whose process started it" do
    reaper = Reaper.start(self())

    eventually(fn ->
      Process.info(reaper, :group_leader) == {:group_leader, Process.whereis(:init)}
    end)
  end

  test "reports once that a peer is gone" do
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

  test "reports a peer that was gone before it was added, where that can be seen" do
    {os_pid, child} = start_process()
    kill(os_pid)
    kill(child)

    if OS.Process.start_time(String.to_integer(System.pid())) do
      eventually(fn -> OS.Process.start_time(os_pid) == :ended end)
      reaper = Reaper.start(self())
      Reaper.watch(reaper, os_pid)
      assert_receive {:peer_gone, ^os_pid}, 5_000
    end
  end

  test "kills its owner's processes some time after the owner's end, then ends" do
    {os_pid, child} = start_process()
    owner = spawn(fn -> Process.sleep(:infinity) end)
    reaper = Reaper.start(owner)
    monitor = Process.monitor(reaper)
    Reaper.watch(reaper, os_pid)
    Process.exit(owner, :kill)
    assert_receive {:DOWN, ^monitor, :process, ^reaper, :normal}, 10_000
    eventually(fn -> not alive?(os_pid) and not alive?(child) end)
  end

  describe "one that is killed" do
    # As the bridge does, whose place this process takes.
    defp kill_reaper(reaper) do
      Process.exit(reaper, :kill)
      assert_receive {:"ETS-TRANSFER", table, ^reaper, Reaper}
      table
    end

    test "is replaced by one that knows its peers, and kills those that were retired" do
      {kept, kept_child} = start_process()
      {retired, retired_child} = start_process()
      reaper = Reaper.start(self())
      for os_pid <- [kept, retired], do: Reaper.watch(reaper, os_pid)
      # The message to it was lost with it.
      Reaper.retire(reaper, retired)
      %Reaper{} = :sys.get_state(reaper)
      next = Reaper.replace(kill_reaper(reaper), [kept])
      eventually(fn -> not alive?(retired) and not alive?(retired_child) end)
      assert alive?(kept) and alive?(kept_child)
      assert Reaper.finish(next) == :ok
      eventually(fn -> not alive?(kept) and not alive?(kept_child) end)
    end

    test "is replaced by one that also watches a peer that was not added yet" do
      {os_pid, child} = start_process()
      table = kill_reaper(Reaper.start(self()))
      next = Reaper.replace(table, [nil, os_pid])
      Reaper.kill_all(next)
      eventually(fn -> not alive?(os_pid) and not alive?(child) end)
    end

    test "leaves no peer when its owner is about to end" do
      {os_pid, child} = start_process()
      reaper = Reaper.start(self())
      Reaper.watch(reaper, os_pid)
      %Reaper{} = :sys.get_state(reaper)
      monitor = Process.monitor(reaper)
      Process.exit(reaper, :kill)
      assert_receive {:DOWN, ^monitor, :process, ^reaper, :killed}
      assert Reaper.finish(reaper) == :ok
      eventually(fn -> not alive?(os_pid) and not alive?(child) end)
    end

    test "is replaced in a bridge: no orphan is left when that is killed, too" do
      {:ok, bridge} =
        start_supervised(
          Supervisor.child_spec({Bridge, fake_opts("stubborn")}, restart: :temporary)
        )

      {:ok, %{"child" => child}} = Bridge.call(bridge, :ping, %{}, 10_000)
      %{os_pid: os_pid} = Bridge.get_status(bridge)

      for _ <- 1..2 do
        reaper = :sys.get_state(bridge).reaper
        Process.exit(reaper, :kill)
        eventually(fn -> :sys.get_state(bridge).reaper != reaper end)
      end

      assert alive?(os_pid)
      Process.exit(bridge, :kill)
      eventually(fn -> not alive?(os_pid) and not alive?(child) end)
    end
  end

  test "removes a bridge that was killed from the registry" do
    opts = fake_opts("silent", default_timeout: 1_234)
    {:ok, bridge} = start_supervised(Supervisor.child_spec({Bridge, opts}, restart: :temporary))
    assert %{default_timeout: 1_234} = Registry.get(:bridge, bridge)
    Process.exit(bridge, :kill)
    eventually(fn -> Registry.get(:bridge, bridge) == nil end)
  end

  test "reports a peer as gone only after two looks in a row" do
    # A number that no process has.
    {:ok, reaper, _ms} = Reaper.init({self(), [{4_194_305, :ended}], [4_194_305]})
    {:noreply, reaper, _ms} = Reaper.handle_info(:timeout, reaper)
    refute_received {:peer_gone, _os_pid}
    {:noreply, reaper, _ms} = Reaper.handle_info(:timeout, reaper)
    assert_received {:peer_gone, 4_194_305}
    {:noreply, _reaper, _ms} = Reaper.handle_info(:timeout, reaper)
    refute_received {:peer_gone, _os_pid}
  end
end
