defmodule DSPex.PythonBridge.Pool.ProgramsTest do
  @moduledoc "create_program and cleanup apply to all peers of a pool, also to later ones."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Pool, Programs}
  alias DSPex.PythonBridge.Pool.Handle
  alias DSPex.Test.PoolProbe

  @moduletag :tmp_dir

  # Names of the test's own, so that the tests of this file may run concurrently with those of others.
  @pool __MODULE__.Pool

  defp who(dir, opts) do
    env = %{"FAKE_FILE" => Path.join(dir, "only")}
    "who" |> fake_opts(env: env) |> Keyword.merge([name: @pool] ++ opts)
  end

  defp start(dir, opts \\ []), do: start_supervised!({Pool, who(dir, opts)})

  defp all_up, do: eventually(fn -> Enum.all?(peers(), &(&1.state == :running)) end, 20_000)

  defp start_up(dir, opts \\ []) do
    start(dir, opts)
    all_up()
  end

  defp peers, do: Pool.status(@pool).peers

  defp create(id, signature \\ "q -> a", timeout \\ 10_000) do
    Pool.call(@pool, :create_program, %{id: id, signature: signature}, timeout)
  end

  # What each peer has.
  defp programs do
    for %{bridge: bridge} <- peers(), uniq: true do
      {:ok, %{"programs" => programs}} = Bridge.call(bridge, :list_programs)
      programs
    end
  end

  defp execute(id), do: Pool.call(@pool, :execute_program, %{program_id: id}, 5_000)

  defp forget_all, do: PoolProbe.forget_all(@pool)
  defp known, do: Programs.Store.definitions(Handle.fetch(@pool).programs)

  test "all peers that are up have a program when the reply to its creation comes", %{
    tmp_dir: dir
  } do
    start_up(dir)
    assert {:ok, %{"status" => "created", "program_id" => "one"}} = create("one")
    assert programs() == [%{"one" => "q -> a"}]
    assert {:ok, %{"status" => "created"}} = create(:one, "b -> c")
    assert {:ok, %{"status" => "created"}} = create("two")
    assert programs() == [%{"one" => "b -> c", "two" => "q -> a"}]

    assert {:ok, %{"status" => "cleaned"}} =
             Pool.call(@pool, "cleanup", %{"program_ids" => ["one"]}, 5_000)

    assert programs() == [%{"two" => "q -> a"}]
    assert {:ok, _} = Pool.call(@pool, :cleanup)
    assert programs() == [%{}]
    assert known() == []
  end

  test "one peer that is up is enough; the others get it before they serve", %{tmp_dir: dir} do
    start_up(dir)
    [lagging | _others] = peers()
    # Its process reads no message until it is resumed.
    :sys.suspend(lagging.bridge)
    kill(lagging.os_pid)
    creation = Task.async(fn -> create("one") end)
    refute Task.yield(creation, 100)
    # It is not waited for from the moment when its peer's death is known.
    :sys.resume(lagging.bridge)
    assert {:ok, _} = Task.await(creation)
    assert {:ok, %{"programs" => %{"one" => _}}} = Bridge.call(lagging.bridge, :list_programs)
    assert [%{"one" => _}] = programs()
  end

  test "a pool that is just starting takes programs", %{tmp_dir: dir} do
    start(dir)
    assert {:ok, _} = create("one")

    assert {:ok, %{"signature" => "q -> a"}} =
             Pool.call(@pool, :execute_program, %{program_id: "one"}, 5_000)

    all_up()
    assert programs() == [%{"one" => "q -> a"}]
  end

  test "a restarted peer has the programs", %{tmp_dir: dir} do
    start_up(dir, pool_size: 2)
    {:ok, _} = create("one")
    {:ok, _} = create("two")
    {:ok, _} = Pool.call(@pool, :cleanup, %{program_ids: ["one"]}, 5_000)
    for %{os_pid: os_pid} <- peers(), do: kill(os_pid)
    assert programs() == [%{"two" => "q -> a"}]

    # So has a bridge whose own process is started again.
    bridge = hd(peers()).bridge
    pid = Process.whereis(bridge)
    Process.exit(pid, :kill)
    eventually(fn -> Process.whereis(bridge) not in [pid, nil] end)
    assert programs() == [%{"two" => "q -> a"}]
  end

  test "concurrent changes leave all peers alike", %{tmp_dir: dir} do
    start_up(dir)

    1..12
    |> Enum.map(fn n ->
      Task.async(fn ->
        for m <- 1..10 do
          {:ok, _} = create("p#{rem(m, 4)}", "q#{n} -> a#{m}")

          if rem(m, 5) == 0,
            do: {:ok, _} = Pool.call(@pool, :cleanup, %{program_ids: ["p#{rem(n, 4)}"]}, 5_000)
        end
      end)
    end)
    |> Task.await_many(30_000)

    assert [programs] = programs()
    assert Enum.sort(Map.keys(programs)) == Enum.sort(for({id, _stamp, _body} <- known(), do: id))
    for {id, _stamp, body} <- known(), do: assert(body =~ programs[id])
  end

  test "a definition that all peers refuse is not kept; the one before stays", %{tmp_dir: dir} do
    start_up(dir)
    File.touch!(Path.join(dir, "only"))
    {:ok, _} = create("one")
    assert create("one", "one -> only") == {:error, "signature: not here"}
    assert create("two", "one -> only") == {:error, "signature: not here"}
    assert programs() == [%{"one" => "q -> a"}]
    assert [{"one", _, _}] = known()
  end

  test "a definition that only some peers take is not kept either", %{tmp_dir: dir} do
    start_up(dir)
    {:ok, _} = create("other")
    assert create("one", "one -> only") == {:error, "signature: not here"}
    assert File.exists?(Path.join(dir, "only"))
    eventually(fn -> programs() == [%{"other" => "q -> a"}] end)
    assert [{"other", _, _}] = known()
  end

  test "an update that only some peers take is undone", %{tmp_dir: dir} do
    start_up(dir)
    {:ok, _} = create("one")
    assert create("one", "one -> only") == {:error, "signature: not here"}
    eventually(fn -> programs() == [%{"one" => "q -> a"}] end)
    assert [{"one", _, body}] = known()
    assert body =~ "q -> a"
  end

  test "a cleanup that no peer makes is undone", %{tmp_dir: dir} do
    start_up(dir)
    {:ok, _} = create("one")
    {:ok, _} = create("refused")

    for args <- [%{ids: ["one"]}, %{program_ids: ["one", "refused"]}, %{program_ids: false}] do
      assert {:error, _text} = Pool.call(@pool, :cleanup, args)
      assert ["one", "refused"] = for({id, _stamp, _body} <- known(), do: id)
    end
  end

  test "a change reaches overloaded peers", %{tmp_dir: dir} do
    start_up(dir, max_pending: 1)
    for %{bridge: bridge} <- peers(), do: Bridge.cast(bridge, :hold, %{})
    eventually(fn -> Enum.all?(peers(), &(&1.pending == 1)) end)
    assert {:ok, _} = create("one")
    assert [{"one", _, _}] = known()
  end

  test "a program that one peer lacks is created there on the way", %{tmp_dir: dir} do
    start_up(dir)
    {:ok, _} = create("one")
    forget_all()
    assert {:ok, %{"signature" => "q -> a"}} = execute("one")
    {:ok, _} = Pool.call(@pool, :cleanup)
    assert execute("one") == {:error, "Program not found: one"}
  end

  describe "while the coordinator is restarted" do
    @describetag :capture_log

    # Its supervisor reads no message until it is resumed.
    defp kill_coordinator do
      coordinator = Process.whereis(Handle.coordinator(@pool))
      watch = Process.monitor(coordinator)
      :sys.suspend(@pool)
      Process.exit(coordinator, :kill)
      assert_receive {:DOWN, ^watch, :process, ^coordinator, :killed}
    end

    test "changes wait for it, and then apply to all peers", %{tmp_dir: dir} do
      start_up(dir)
      {:ok, _} = create("old")
      kill_coordinator()
      creation = Task.async(fn -> create("one") end)
      cleanup = Task.async(fn -> Pool.call(@pool, :cleanup, %{program_ids: ["old"]}, 5_000) end)
      refute Task.yield(creation, 50) || Task.yield(cleanup, 50)
      :sys.resume(@pool)
      assert {:ok, %{"status" => "created"}} = Task.await(creation)
      assert {:ok, %{"status" => "cleaned"}} = Task.await(cleanup)
      assert programs() == [%{"one" => "q -> a"}]
      assert [{"one", _, _}] = known()
    end

    test "changes without the time to wait for it are not made, and return an error", %{
      tmp_dir: dir
    } do
      start_up(dir)
      {:ok, _} = create("old")
      kill_coordinator()
      {ms, result} = timed(fn -> create("one", "q -> a", 50) end)
      assert result == {:error, :bridge_not_running}
      assert ms < 1_000
      assert Pool.call(@pool, :cleanup, %{}, 0) == {:error, :bridge_not_running}
      :sys.resume(@pool)
      assert programs() == [%{"old" => "q -> a"}]
      assert [{"old", _, _}] = known()
    end

    test "a run of a program that one peer lacks waits for it", %{tmp_dir: dir} do
      start_up(dir, pool_size: 1)
      {:ok, _} = create("one")
      forget_all()
      kill_coordinator()
      execution = Task.async(fn -> execute("one") end)
      refute Task.yield(execution, 50)
      :sys.resume(@pool)
      assert {:ok, %{"signature" => "q -> a"}} = Task.await(execution)
    end
  end

  @tag :capture_log
  test "a change whose coordinator ends returns an error; peers that got it apply it",
       %{tmp_dir: dir} do
    start_up(dir, pool_size: 2)
    {:ok, _} = create("one")
    [_quick, slow] = peers()
    {_, 0} = System.cmd("/bin/sh", ["-c", "kill -STOP #{slow.os_pid}"])
    creation = Task.async(fn -> create("one", "b -> c") end)
    eventually(fn -> match?([%{pending: 0}, %{pending: 1}], peers()) and updated?() end)
    coordinator = Process.whereis(Handle.coordinator(@pool))
    Process.exit(coordinator, :kill)
    assert Task.await(creation) == {:error, :bridge_not_running}
    eventually(fn -> Process.whereis(Handle.coordinator(@pool)) not in [coordinator, nil] end)
    # Else the one peer would have the new definition and the other the old.
    assert [%{pending: 0}, %{pending: 1}] = peers()
    {_, 0} = System.cmd("/bin/sh", ["-c", "kill -CONT #{slow.os_pid}"])
    assert programs() == [%{"one" => "b -> c"}]
  end

  defp updated?,
    do: match?([{"one", _stamp, _body}], known()) and elem(hd(known()), 2) =~ "b -> c"

  test "arguments that every peer refuses change nothing", %{tmp_dir: dir} do
    start_supervised!({Pool, real_opts(name: @pool, pool_size: 1)})
    {:ok, _} = create("one", "q -> a", 30_000)
    assert {:error, text} = Pool.call(@pool, :cleanup, %{program_ids: ["one", 5]}, 5_000)
    assert text =~ "program_ids"
    assert {:error, _} = Pool.call(@pool, :create_program, %{id: 5, signature: "q -> a"}, 5_000)
    assert {:ok, %{"programs" => ["one"]}} = Pool.call(@pool, :list_programs)
    assert [{"one", _, _}] = known()
    refute File.exists?(Path.join(dir, "only"))
  end

  test "a creation whose caller has stopped waiting is still made, on all peers", %{
    tmp_dir: dir
  } do
    start_up(dir)
    bridge = hd(peers()).bridge
    :sys.suspend(bridge)
    {ms, result} = timed(fn -> create("one", "q -> a", 50) end)
    assert result == {:error, :timeout}
    assert ms < 1_000
    :sys.resume(bridge)
    eventually(fn -> programs() == [%{"one" => "q -> a"}] end)
    assert [{"one", _, _}] = known()
  end
end
