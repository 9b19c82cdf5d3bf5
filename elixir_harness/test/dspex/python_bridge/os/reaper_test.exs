defmodule DSPex.PythonBridge.OS.ReaperTest do
  # It hides /proc from all bridges.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, OS}
  alias DSPex.PythonBridge.OS.Reaper
  alias DSPex.PythonBridge.OTP.Registry

  # A process of the system, leader of its own group, with a child in it.
  setup do
    script = "sleep 600 & echo $!; wait"
    port = Port.open({:spawn_executable, "/bin/sh"}, [:binary, args: ["-c", script]])
    {:os_pid, os_pid} = Port.info(port, :os_pid)
    on_exit(fn -> System.cmd("/bin/sh", ["-c", "kill -9 -#{os_pid} 2>/dev/null"]) end)
    assert_receive {^port, {:data, child}}, 5_000
    %{os_pid: os_pid, child: child |> String.trim() |> String.to_integer()}
  end

  defp end_of(os_pids), do: eventually(fn -> not Enum.any?(os_pids, &alive?/1) end)

  for {where, proc} <- [{"with /proc", "/proc"}, {"without /proc, as on macOS", "/none"}] do
    describe where do
      setup do: put_config(:proc_root, unquote(proc))

      test "a process is killed with what it started, and not one of another start time", test do
        %{os_pid: os_pid, child: child} = test
        started = OS.Process.start_time(os_pid)
        assert is_binary(started) and OS.Process.start_time(os_pid) == started
        refute OS.Process.gone?(os_pid, started)
        assert OS.Process.kill_group(os_pid, "Thu Jan  1 00:00:00 1970") == :ok
        assert alive?(os_pid) and alive?(child)
        assert OS.Process.kill_group(os_pid, started) == :ok
        end_of([os_pid, child])
        assert OS.Process.gone?(os_pid, started)
        assert OS.Process.start_time(os_pid) == :ended
      end

      test "a peer that is gone is reported once; what it started is killed", test do
        %{os_pid: os_pid, child: child} = test
        reaper = Reaper.start(self())
        Reaper.watch(reaper, os_pid)
        refute_receive {:peer_gone, ^os_pid}, 250
        kill(os_pid)
        assert_receive {:peer_gone, ^os_pid}, 5_000
        refute_receive {:peer_gone, ^os_pid}, 300
        assert alive?(child)
        # It does not wait for a peer that is gone.
        :erlang.trace_pattern({Process, :sleep, 1}, true)
        :erlang.trace(reaper, true, [:call])
        assert Reaper.finish(reaper) == :ok
        delivered = :erlang.trace_delivered(reaper)
        assert_receive {:trace_delivered, ^reaper, ^delivered}
        refute_received {:trace, ^reaper, :call, _}
        end_of([child])
      end
    end
  end

  test "kills its owner's processes some time after the owner's end, then ends", test do
    owner = spawn(fn -> Process.sleep(:infinity) end)
    reaper = Reaper.start(owner)
    # Else it ends with the application whose process started it.
    assert Process.info(reaper, :group_leader) == {:group_leader, Process.whereis(:init)}
    monitor = Process.monitor(reaper)
    Reaper.watch(reaper, test.os_pid)
    Process.exit(owner, :kill)
    assert_receive {:DOWN, ^monitor, :process, ^reaper, :normal}, 10_000
    end_of([test.os_pid, test.child])
  end

  test "a bridge whose reaper is killed has another" do
    child_spec = Supervisor.child_spec({Bridge, fake_opts("stubborn")}, restart: :temporary)
    {:ok, bridge} = start_supervised(child_spec)
    {:ok, %{"child" => child}} = Bridge.call(bridge, :ping, %{}, 10_000)
    %{os_pid: os_pid} = Bridge.get_status(bridge)
    Process.exit(:sys.get_state(bridge).reaper, :kill)
    eventually(fn -> Process.alive?(:sys.get_state(bridge).reaper) end)
    Process.exit(bridge, :kill)
    end_of([os_pid, child])
  end

  test "of a bridge that is killed no process is left, and no entry in the registry" do
    opts = fake_opts("stubborn", default_timeout: 1_234)
    {:ok, bridge} = start_supervised(Supervisor.child_spec({Bridge, opts}, restart: :temporary))
    {:ok, %{"child" => child}} = Bridge.call(bridge, :ping, %{}, 10_000)
    %{os_pid: os_pid} = Bridge.get_status(bridge)
    assert %{default_timeout: 1_234} = Registry.get(:bridge, bridge)
    Process.exit(bridge, :kill)
    end_of([os_pid, child])
    eventually(fn -> Registry.get(:bridge, bridge) == nil end)
  end
end
