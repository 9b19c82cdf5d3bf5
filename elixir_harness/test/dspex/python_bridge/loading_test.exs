defmodule DSPex.PythonBridge.LoadingTest do
  @moduledoc "Programs of which peers die while they are given them: left out, and tried again."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers
  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.Bridge

  @moduletag :tmp_dir

  # The first time that `frail` is given to a peer is its creation here; a death among others accuses none, so
  # that the first that counts is the one after it.
  defp start(dir, dies) do
    env = %{"FAKE_FILE" => Path.join(dir, "times"), "FAKE_DIES" => Enum.join(dies, " ")}
    bridge = start_supervised!({Bridge, fake_opts("frail", env: env, max_retries: 1)})
    for id <- ["first", "frail", "last"], do: {:ok, _} = create(bridge, id)
    bridge
  end

  defp create(bridge, id),
    do: Bridge.call(bridge, :create_program, %{id: id, signature: "q -> a"}, 20_000)

  defp execute(bridge, id), do: Bridge.call(bridge, :execute_program, %{program_id: id}, 20_000)

  # Waited for, so that what follows is not about the peer before.
  defp kill_peer(bridge) do
    %{os_pid: os_pid, restarts: restarts} = Bridge.get_status(bridge)
    kill(os_pid)

    eventually(
      fn ->
        status = Bridge.get_status(bridge)
        status.restarts > restarts and status.state == :running
      end,
      20_000
    )
  end

  defp times(dir), do: File.stat!(Path.join(dir, "times")).size

  test "only deaths in a row count: after any number of scattered ones the program is there", %{
    tmp_dir: dir
  } do
    bridge = start(dir, [2, 3, 5, 6, 8, 9, 11, 12, 14, 15])

    for series <- 1..5 do
      kill_peer(bridge)
      assert {:ok, %{"programs" => ["first", "last", "frail"]}} = execute(bridge, "frail")
      assert times(dir) == 1 + 3 * series
    end
  end

  test "peers that die while they load whatever comes first are not blamed on one program", %{
    tmp_dir: dir
  } do
    bridge = start(dir, [0])
    %{os_pid: os_pid, restarts: restarts} = Bridge.get_status(bridge)
    # It answers its first request, and dies at once.
    script = :sys.get_state(bridge).options.script_path
    :sys.replace_state(bridge, &put_in(&1.options.script_path, fake("up_then_dies")))
    kill(os_pid)

    # The first accuses none, the next the first program, the third another.
    eventually(fn -> Bridge.get_status(bridge).restarts >= restarts + 3 end, 20_000)
    :sys.replace_state(bridge, &put_in(&1.options.script_path, script))
    assert {:ok, %{"programs" => programs}} = execute(bridge, "frail")
    assert Enum.sort(programs) == ["first", "frail", "last"]
  end

  test "one that was left out is named in the log, with what brings it back", %{tmp_dir: dir} do
    bridge = start(dir, [2, 3, 4])
    log = capture_log(fn -> kill_peer(bridge) end)
    assert log =~ "program frail is left out"
    assert log =~ "2 Python processes in a row died"
    assert execute(bridge, "frail") == {:error, :python_process_died}
    assert {:ok, %{"programs" => ["first", "last"]}} = execute(bridge, "first")
    {:error, error} = Bridge.request(bridge, :execute_program, %{program_id: "frail"}, [])
    assert error.message =~ "program frail could not be loaded again: "
  end

  test "a restart tries it again", %{tmp_dir: dir} do
    bridge = start(dir, [2, 3, 4])
    kill_peer(bridge)
    assert execute(bridge, "frail") == {:error, :python_process_died}
    assert Bridge.restart(bridge) == :ok
    assert {:ok, %{"programs" => ["first", "last", "frail"]}} = execute(bridge, "frail")
    # Nothing of it is remembered.
    assert :sys.get_state(bridge).load_deaths == %{}
  end

  test "a restart succeeds without it if its peer dies of it again, which nobody sees", %{
    tmp_dir: dir
  } do
    bridge = start(dir, [2, 3, 4, 5])
    kill_peer(bridge)
    %{os_pid: old} = Bridge.get_status(bridge)
    assert Bridge.restart(bridge) == :ok
    assert times(dir) == 5
    assert {:ok, %{"programs" => ["first", "last"], "pid" => pid}} = execute(bridge, "first")
    assert pid != old
    assert execute(bridge, "frail") == {:error, :python_process_died}
    assert Bridge.restart(bridge) == :ok
    assert {:ok, %{"programs" => ["first", "last", "frail"]}} = execute(bridge, "frail")
  end

  test "a restart fails as long as its peers die of one that the present peer has", %{
    tmp_dir: dir
  } do
    bridge = start(dir, 2..10)
    %{os_pid: pid} = Bridge.get_status(bridge)

    for _ <- 1..4 do
      assert {:error, text} = Bridge.restart(bridge)
      assert text =~ "exit status 6"
    end

    assert times(dir) == 5
    assert {:ok, %{"pid" => ^pid}} = execute(bridge, "frail")
  end

  test "why a program is not there is known also after a restart that failed", %{tmp_dir: dir} do
    bridge = start(dir, [2, 3, 4, 5])
    kill_peer(bridge)
    # The next one gets as far as loading.
    :sys.replace_state(bridge, &put_in(&1.options.script_path, fake("up_then_dies")))
    assert {:error, _text} = Bridge.restart(bridge)
    assert execute(bridge, "frail") == {:error, :python_process_died}
  end

  test "a new definition counts for itself", %{tmp_dir: dir} do
    bridge = start(dir, [2, 3, 4, 6])
    kill_peer(bridge)
    assert execute(bridge, "frail") == {:error, :python_process_died}
    assert {:ok, _} = create(bridge, "frail")
    assert {:ok, _} = execute(bridge, "frail")
    kill_peer(bridge)
    assert times(dir) == 7
    assert {:ok, _} = execute(bridge, "frail")
  end

  test "after a while the next peer is given it; if it dies of it again, after a longer while", %{
    tmp_dir: dir
  } do
    bridge = start(dir, [2, 3, 4, 5])
    kill_peer(bridge)
    assert again_in(bridge) in 50_000..60_000
    # Not yet.
    kill_peer(bridge)
    assert times(dir) == 4
    pass_time(bridge)
    kill_peer(bridge)
    assert times(dir) == 5
    assert again_in(bridge) in 100_000..120_000
    assert execute(bridge, "frail") == {:error, :python_process_died}
    pass_time(bridge)
    kill_peer(bridge)
    assert {:ok, _} = execute(bridge, "frail")
  end

  # The bridge's own notes: nobody is to wait for a minute here.
  defp again_in(bridge) do
    [{_stamp, {_count, again_at}}] = Map.to_list(:sys.get_state(bridge).load_deaths)
    again_at - System.monotonic_time(:millisecond)
  end

  defp pass_time(bridge) do
    :sys.replace_state(bridge, fn state ->
      deaths =
        Map.new(state.load_deaths, fn {stamp, {count, at}} -> {stamp, {count, at - 3_600_000}} end)

      %{state | load_deaths: deaths}
    end)
  end
end
