defmodule DSPex.PythonBridge.Bridge.ShutdownTest do
  @moduledoc "The end of the whole BEAM, seen from outside: a second one, which starts a bridge."

  use ExUnit.Case, async: true

  @moduletag :slow

  import DSPex.Test.Helpers

  # Starts a bridge in the application's tree, says its OS pid and its peer's, then does `then`.
  defp start_beam(opts, then) do
    code = """
    Application.put_env(:dspex, :autostart, false)
    {:ok, _} = Application.ensure_all_started(:dspex)
    alias DSPex.PythonBridge.Bridge
    {:ok, bridge} = Supervisor.start_child(DSPex.ApplicationSupervisor, {Bridge, #{inspect(opts)}})
    {:ok, pong, _} = Bridge.request(bridge, :ping, %{}, timeout: 20_000)
    child = pong["child"] || 0
    IO.puts("pids \#{System.pid()} \#{Bridge.get_status(bridge).os_pid} \#{child}")
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
    [beam, peer, child] = pids |> String.split() |> Enum.map(&String.to_integer/1)
    on_exit(fn -> for pid <- [beam, peer, child], pid > 0, alive?(pid), do: kill(pid) end)
    {port, beam, [peer | if(child > 0, do: [child], else: [])]}
  end

  for fake <- ["stubborn", "leaves_a_child"],
      how <- ["System.stop()", "Application.stop(:dspex)"] do
    test "#{how} leaves nothing of the peer #{fake}" do
      then = """
      #{unquote(how)}
      IO.puts("stopped")
      Process.sleep(:infinity)
      """

      {port, beam, pids} = start_beam(fake_opts(unquote(fake)), then)

      if unquote(how) == "System.stop()" do
        assert_receive {^port, {:exit_status, 0}}, 10_000
      else
        assert_receive {^port, {:data, {:eol, "stopped"}}}, 10_000
        assert alive?(beam)
      end

      eventually(fn -> not Enum.any?(pids, &alive?/1) end, 500)
    end
  end

  test "System.stop/0 is not delayed by a peer that does not read, and leaves none" do
    # The pings of the start and of the script.
    opts = fake_opts("never_reads", env: %{"FAKE_ANSWERS" => "2"})

    then = """
    for _ <- 1..2, do: Bridge.cast(bridge, :big, %{a: String.duplicate("x", 3_000_000)})
    2 = Bridge.get_status(bridge).pending
    System.stop()
    Process.sleep(:infinity)
    """

    {port, _beam, [peer]} = start_beam(opts, then)
    assert_receive {^port, {:exit_status, 0}}, 10_000
    eventually(fn -> not alive?(peer) end, 2_000)
  end

  test "System.stop/0 leaves no real peer" do
    {port, _beam, [peer]} = start_beam(real_opts(), "System.stop()\nProcess.sleep(:infinity)")
    assert_receive {^port, {:exit_status, 0}}, 10_000
    eventually(fn -> not alive?(peer) end, 2_000)
  end

  test "a BEAM that is killed leaves no real peer" do
    {_port, beam, [peer]} = start_beam(real_opts(), "Process.sleep(:infinity)")
    assert alive?(peer)
    kill(beam)
    eventually(fn -> not alive?(peer) end, 2_000)
  end
end
