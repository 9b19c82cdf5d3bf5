defmodule DSPex.PythonBridge.ShutdownTest do
  @moduledoc "The end of the whole BEAM, seen from outside: a second one, which starts a bridge."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  # Starts a bridge in the application's tree, says its OS pid and its peer's, then does `then`.
  defp start_beam(opts, then) do
    code = """
    Application.put_env(:dspex, :autostart, false)
    {:ok, _} = Application.ensure_all_started(:dspex)
    alias DSPex.PythonBridge.Bridge
    {:ok, bridge} = Supervisor.start_child(DSPex.ApplicationSupervisor, {Bridge, #{inspect(opts)}})
    {:ok, _, _} = Bridge.request(bridge, :ping, %{}, timeout: 20_000)
    IO.puts("pids \#{System.pid()} \#{Bridge.get_status(bridge).os_pid}")
    #{then}
    """

    port =
      Port.open({:spawn_executable, System.find_executable("elixir")}, [
        :binary,
        :exit_status,
        {:line, 1_000},
        args: ["-e", code],
        env: [{~c"ERL_LIBS", to_charlist(Path.join(Mix.Project.build_path(), "lib"))}]
      ])

    assert_receive {^port, {:data, {:eol, "pids " <> pids}}}, 20_000
    [beam, peer] = pids |> String.split() |> Enum.map(&String.to_integer/1)
    {port, beam, peer}
  end

  test "System.stop/0 is not held up by a peer that does not read, and leaves none" do
    # The pings of the start and of the script.
    opts = fake_opts("never_reads", env: %{"FAKE_ANSWERS" => "2"})

    then = """
    for _ <- 1..2, do: Bridge.cast(bridge, :big, %{a: String.duplicate("x", 3_000_000)})
    2 = Bridge.get_status(bridge).pending
    System.stop()
    Process.sleep(:infinity)
    """

    {port, _beam, peer} = start_beam(opts, then)
    assert_receive {^port, {:exit_status, 0}}, 10_000
    eventually(fn -> not alive?(peer) end, 1_000)
  end

  test "System.stop/0 leaves no real peer" do
    {port, _beam, peer} = start_beam(real_opts(), "System.stop()\nProcess.sleep(:infinity)")
    assert_receive {^port, {:exit_status, 0}}, 10_000
    eventually(fn -> not alive?(peer) end, 1_000)
  end

  test "a BEAM that is killed leaves no real peer" do
    {_port, beam, peer} = start_beam(real_opts(), "Process.sleep(:infinity)")
    assert alive?(peer)
    kill(beam)
    eventually(fn -> not alive?(peer) end, 1_000)
  end
end
