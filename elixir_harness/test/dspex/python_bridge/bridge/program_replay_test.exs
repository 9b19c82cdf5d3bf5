defmodule DSPex.PythonBridge.Bridge.ProgramReplayTest do
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
    bridge = start(dir, [2, 3, 5, 6, 8, 9])

    for series <- 1..3 do
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

  test "a program that was left out is named in the log, with what loads it again", %{
    tmp_dir: dir
  } do
    bridge = start(dir, [2, 3, 4])
    log = capture_log(fn -> kill_peer(bridge) end)
    assert log =~ "program frail is left out"
    assert log =~ "2 Python processes in a row died"
    assert execute(bridge, "frail") == {:error, :python_process_died}
    assert {:ok, %{"programs" => ["first", "last"]}} = execute(bridge, "first")
    {:error, error} = Bridge.request(bridge, :execute_program, %{program_id: "frail"}, [])
    assert error.message =~ "program frail could not be loaded: "
  end

  test "a restart loads it again", %{tmp_dir: dir} do
    bridge = start(dir, [2, 3, 4])
    kill_peer(bridge)
    assert execute(bridge, "frail") == {:error, :python_process_died}
    assert Bridge.restart(bridge) == :ok
    assert {:ok, %{"programs" => ["first", "last", "frail"]}} = execute(bridge, "frail")
    # Nothing of it is remembered.
    assert :sys.get_state(bridge).load_deaths == %{}
  end

  test "a restart succeeds without it if its peer dies of it again, unnoticed by callers", %{
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
      # The latter if it had been sent its last program.
      assert text =~ "exit status 6" or text =~ "epipe"
    end

    assert times(dir) == 5
    assert {:ok, %{"pid" => ^pid}} = execute(bridge, "frail")
  end

  test "the reason why a program is missing is still known after a restart that failed", %{
    tmp_dir: dir
  } do
    bridge = start(dir, [2, 3, 4, 5])
    kill_peer(bridge)
    # The next one gets as far as loading.
    :sys.replace_state(bridge, &put_in(&1.options.script_path, fake("up_then_dies")))
    assert {:error, _text} = Bridge.restart(bridge)
    assert execute(bridge, "frail") == {:error, :python_process_died}
  end

  test "a new definition starts without deaths", %{tmp_dir: dir} do
    bridge = start(dir, [2, 3, 4, 6])
    kill_peer(bridge)
    assert execute(bridge, "frail") == {:error, :python_process_died}
    assert {:ok, _} = create(bridge, "frail")
    assert {:ok, _} = execute(bridge, "frail")
    kill_peer(bridge)
    assert times(dir) == 7
    assert {:ok, _} = execute(bridge, "frail")
  end

  @tag :slow
  test "the next peer after a minute loads it; if it dies of it again, the wait doubles", %{
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

  describe "while the present peer serves, a program that was left out" do
    test "is loaded by a second peer, which takes over if it loads", %{tmp_dir: dir} do
      bridge = start(dir, [2, 3, 4])
      kill_peer(bridge)
      assert again_in(bridge) in 50_000..60_000
      assert timer_in(bridge) in 50_000..60_000
      %{os_pid: old} = Bridge.get_status(bridge)
      hold(dir, "frail")
      time_has_come(bridge)
      # It is being given to the other.
      eventually(fn -> times(dir) == 5 end, 20_000)
      assert {:ok, %{"pid" => ^old}} = execute(bridge, "first")
      let_go(dir)
      eventually(fn -> match?({:ok, _}, execute(bridge, "frail")) end, 20_000)

      assert {:ok, %{"programs" => ["first", "last", "frail"], "pid" => pid}} =
               execute(bridge, "frail")

      assert pid != old
      assert %{load_deaths: deaths, again_timer: nil} = :sys.get_state(bridge)
      assert deaths == %{}
    end

    test "waits twice as long if the second peer dies of it; the first goes on serving", %{
      tmp_dir: dir
    } do
      bridge = start(dir, [2, 3, 4, 5])
      kill_peer(bridge)
      %{os_pid: pid, restarts: restarts} = Bridge.get_status(bridge)

      log =
        capture_log(fn ->
          time_has_come(bridge)
          eventually(fn -> times(dir) == 5 and :sys.get_state(bridge).next == nil end, 20_000)
        end)

      assert log =~ "the present one goes on"
      # One attempt, and no other peer without it.
      assert %{os_pid: ^pid, state: :running, restarts: later} = Bridge.get_status(bridge)
      assert later == restarts + 1
      assert again_in(bridge) in 100_000..120_000
      assert timer_in(bridge) in 100_000..120_000
      assert execute(bridge, "frail") == {:error, :python_process_died}
      # Changes are held no longer.
      assert {:ok, _} = create(bridge, "another")
      time_has_come(bridge)
      eventually(fn -> match?({:ok, _}, execute(bridge, "frail")) end, 20_000)
    end

    test "that hangs there, or whose peer does not start, does not end the present peer", %{
      tmp_dir: dir
    } do
      bridge = start(dir, [2, 3, 4])
      kill_peer(bridge)
      %{os_pid: pid} = Bridge.get_status(bridge)
      timeout = :sys.get_state(bridge).options.start_timeout
      hold(dir, "frail")
      :sys.replace_state(bridge, &put_in(&1.options.start_timeout, 1_000))
      time_has_come(bridge)
      eventually(fn -> times(dir) == 5 and :sys.get_state(bridge).next == nil end, 20_000)
      assert again_in(bridge) in 100_000..120_000
      :sys.replace_state(bridge, &put_in(&1.options.start_timeout, timeout))
      let_go(dir)

      script = :sys.get_state(bridge).options.script_path
      %{restarts: restarts} = Bridge.get_status(bridge)
      :sys.replace_state(bridge, &put_in(&1.options.script_path, fake("dies_at_start")))
      time_has_come(bridge)

      eventually(
        fn ->
          Bridge.get_status(bridge).restarts > restarts and :sys.get_state(bridge).next == nil
        end,
        20_000
      )

      assert again_in(bridge) in 200_000..240_000
      assert {:ok, %{"pid" => ^pid}} = execute(bridge, "first")
      :sys.replace_state(bridge, &put_in(&1.options.script_path, script))
      time_has_come(bridge)
      eventually(fn -> match?({:ok, _}, execute(bridge, "frail")) end, 20_000)
    end

    test "is not tried once it is removed or defined again, nor while another peer starts", %{
      tmp_dir: dir
    } do
      bridge = start(dir, [2, 3, 4, 6, 7, 8])
      kill_peer(bridge)
      %{restarts: restarts} = Bridge.get_status(bridge)
      assert {:ok, _} = create(bridge, "frail")
      time_has_come(bridge)
      assert %{next: nil, again_timer: nil} = :sys.get_state(bridge)
      assert Bridge.get_status(bridge).restarts == restarts

      kill_peer(bridge)
      assert times(dir) == 8
      %{restarts: restarts} = Bridge.get_status(bridge)
      hold(dir, "first")
      restart = Task.async(fn -> Bridge.restart(bridge) end)
      eventually(fn -> match?(%{next: %{loads: %{}}}, :sys.get_state(bridge)) end, 20_000)
      time_has_come(bridge)
      assert Bridge.get_status(bridge).restarts == restarts + 1
      let_go(dir)
      assert Task.await(restart, 20_000) == :ok
      assert {:ok, _} = execute(bridge, "frail")
      assert Bridge.get_status(bridge).restarts == restarts + 1
    end
  end

  test "no peer is started for a program that was left out once the bridge ends", %{tmp_dir: dir} do
    bridge = start(dir, [2, 3, 4])
    kill_peer(bridge)
    %{restarts: restarts} = Bridge.get_status(bridge)
    pass_time(bridge)
    %{again_timer: timer} = :sys.get_state(bridge)
    hold(dir, "held")
    creation = Task.async(fn -> create(bridge, "held") end)
    eventually(fn -> Bridge.get_status(bridge).pending == 1 end)
    stop = Task.async(fn -> Bridge.stop(bridge) end)
    # One that came before waits behind the creation.
    eventually(fn -> Bridge.call(bridge, :ping, %{}, 100) == {:error, :bridge_not_running} end)
    send(bridge, {:timeout, timer, :try_again})
    assert %{restarts: ^restarts, pending: 1} = Bridge.get_status(bridge)
    let_go(dir)
    assert {:ok, _} = Task.await(creation)
    assert Task.await(stop) == :ok
  end

  test "a restart that finds one loading without it already has another follow that one", %{
    tmp_dir: dir
  } do
    bridge = start(dir, [2, 3, 4])
    kill_peer(bridge)
    hold(dir, "first")
    kill(Bridge.get_status(bridge).os_pid)

    eventually(
      fn -> match?(%{peer: nil, next: %{loads: %{}}}, :sys.get_state(bridge)) end,
      20_000
    )

    restarts = for _ <- 1..2, do: Task.async(fn -> Bridge.restart(bridge) end)
    eventually(fn -> length(:sys.get_state(bridge).restarts_later) == 2 end)
    let_go(dir)
    assert Task.await_many(restarts, 20_000) == [:ok, :ok]
    assert {:ok, %{"programs" => ["first", "last", "frail"]}} = execute(bridge, "frail")
    assert times(dir) == 5
  end

  # While the file names it, no peer answers that it was given this program.
  defp hold(dir, id), do: File.write!(Path.join(dir, "times.holds"), id)
  defp let_go(dir), do: File.rm!(Path.join(dir, "times.holds"))

  # The bridge's own notes: nobody is to wait for a minute here.
  defp again_in(bridge) do
    [{_stamp, {_count, again_at}}] = Map.to_list(:sys.get_state(bridge).load_deaths)
    again_at - System.monotonic_time(:millisecond)
  end

  defp timer_in(bridge), do: :erlang.read_timer(:sys.get_state(bridge).again_timer)

  defp pass_time(bridge) do
    :sys.replace_state(bridge, fn state ->
      deaths =
        Map.new(state.load_deaths, fn {stamp, {count, at}} -> {stamp, {count, at - 3_600_000}} end)

      %{state | load_deaths: deaths}
    end)
  end

  # As `pass_time/1`, and the timer fires, if there is one.
  defp time_has_come(bridge) do
    pass_time(bridge)
    send(bridge, {:timeout, Map.get(:sys.get_state(bridge), :again_timer), :try_again})
    # Which has been read.
    :sys.get_state(bridge)
  end
end
