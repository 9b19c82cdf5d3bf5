defmodule DSPex.PythonBridge.Pool.ProgramsTest do
  @moduledoc "create_program and cleanup apply to all peers of a pool, also to later ones."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Pool, Programs}
  alias DSPex.PythonBridge.Pool.Handle

  @moduletag :tmp_dir

  # Names of the test's own, so that the tests of this file may run concurrently with those of others.
  @pool __MODULE__.Pool

  defp who(dir, opts) do
    env = %{"FAKE_FILE" => Path.join(dir, "only")}
    "who" |> fake_opts(env: env) |> Keyword.merge([name: @pool] ++ opts)
  end

  defp start(dir, opts), do: start_supervised!({Pool, who(dir, opts)})

  defp start_up(dir, opts \\ []) do
    start(dir, opts)
    all_up(@pool)
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

  defp known, do: Programs.Store.definitions(Handle.fetch(@pool).programs)

  test "all peers have a program when it is created", %{tmp_dir: dir} do
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

  test "a change reaches overloaded peers", %{tmp_dir: dir} do
    start_up(dir, max_pending: 1)
    for %{bridge: bridge} <- peers(), do: Bridge.cast(bridge, :hold, %{})
    eventually(fn -> Enum.all?(peers(), &(&1.pending == 1)) end)
    assert {:ok, _} = create("one")
    assert [{"one", _, _}] = known()
  end

  test "a program that is created or removed through one bridge is the pool's", %{tmp_dir: dir} do
    start_up(dir)
    {:ok, _} = create("old")
    {:ok, bridge} = Pool.checkout(@pool)
    {:ok, _} = Bridge.call(bridge, :create_program, %{id: "one", signature: "q -> a"})
    {:ok, _} = Bridge.call(bridge, :cleanup, %{program_ids: ["old"]})
    eventually(fn -> programs() == [%{"one" => "q -> a"}] end)
  end

  test "a change is known to all bridges without the coordinator", %{tmp_dir: dir} do
    start_up(dir)
    {:ok, _} = create("old")
    :sys.suspend(Handle.coordinator(@pool))
    assert {:ok, %{"status" => "created"}} = create("one")
    assert {:ok, _} = Pool.call(@pool, :cleanup, %{program_ids: ["old"]}, 5_000)
    assert programs() == [%{"one" => "q -> a"}]
    assert [{"one", _, _}] = known()
  end

  test "a creation whose caller has given up is still made", %{tmp_dir: dir} do
    start_up(dir)
    os_pids = for %{os_pid: os_pid} <- peers(), do: os_pid
    signal = &System.cmd("/bin/sh", ["-c", "kill -#{&1} #{Enum.join(os_pids, " ")}"])
    {_, 0} = signal.("STOP")
    {ms, result} = timed(fn -> create("one", "q -> a", 50) end)
    assert result == {:error, :timeout}
    assert ms < 1_000
    {_, 0} = signal.("CONT")
    eventually(fn -> programs() == [%{"one" => "q -> a"}] end)
    assert [{"one", _, _}] = known()
  end
end
