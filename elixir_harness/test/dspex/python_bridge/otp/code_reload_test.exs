defmodule DSPex.PythonBridge.OTP.CodeReloadTest do
  @moduledoc "New code of the harness in a running BEAM."

  # Purging ends whatever still runs what is purged, in all tests.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.Bridge

  # What was loaded becomes old; what was old before is purged, with all processes that still need it.
  defp reload_all do
    {:ok, modules} = :application.get_key(:dspex, :modules)

    for module <- modules, :code.is_loaded(module) != false do
      :code.purge(module)
      {:module, ^module} = :code.load_file(module)
    end
  end

  test "loaded twice ends neither a bridge nor what belongs to it: logs come, no orphan stays" do
    opts = fake_opts("plays", lm_options: %{api_key: "sk-x"})
    spec = Supervisor.child_spec({Bridge, opts}, restart: :temporary)
    {:ok, bridge} = start_supervised(spec)
    {:ok, _} = Bridge.call(bridge, :ping, %{}, 10_000)
    %{os_pid: os_pid} = Bridge.get_status(bridge)
    %{reaper: reaper, log_forwarder: log} = :sys.get_state(bridge)
    for _ <- 1..3, do: reload_all()
    for pid <- [bridge, reaper, log.pid], do: assert(Process.alive?(pid))
    assert %{os_pid: ^os_pid, restarts: 0} = Bridge.get_status(bridge)

    text =
      capture_log(fn ->
        record = JSON.encode!(%{log: %{level: "error", logger: "a", message: "still logged"}})
        {:ok, _} = Bridge.call(bridge, :execute_program, %{play: [["raw", record], ["reply"]]})
        # Behind the record.
        :sys.get_state(log.pid)
      end)

    assert text =~ "still logged"
    # A stopped peer does not see the end of its input.
    {_, 0} = System.cmd("/bin/sh", ["-c", "kill -STOP #{os_pid}"])
    Process.exit(bridge, :kill)
    eventually(fn -> not alive?(os_pid) end)
  end
end
