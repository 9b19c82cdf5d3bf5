defmodule DSPex.PythonBridge.Pool.StreamTest do
  @moduledoc """
  Chunks and tools by a pool: which peer serves, when another one follows, and that each call is counted out
  (tests/fakes/replies/plays.py and who.py). What a pool of one peer does as a bridge does is in client/stream_test.exs.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.Test.PoolProbe

  defp start(fake, opts) do
    name = Module.concat(__MODULE__, "Pool#{System.unique_integer([:positive])}")
    start_supervised!({Pool, fake |> fake_opts(opts) |> Keyword.put(:name, name)}, id: name)
    name
  end

  defp start_up(fake, opts) do
    pool = start(fake, opts)
    all_up(pool)
    pool
  end

  defp in_dir(dir, opts), do: [env: %{"FAKE_FILE" => Path.join(dir, "starts")}] ++ opts
  defp stream(pool, play, opts \\ []), do: Pool.stream(pool, %{play: play}, opts)
  defp elements(pool, play, opts \\ []), do: pool |> stream(play, opts) |> Enum.to_list()
  defp bridges(pool), do: for(%{bridge: bridge} <- Pool.status(pool).peers, do: bridge)
  defp go(pool, name), do: for(b <- bridges(pool), do: Bridge.cast(b, :go, %{name: name}))
  defp suspend(stream), do: Enumerable.reduce(stream, {:cont, nil}, &{:suspend, [&1 | &2 || []]})
  defp idle(pool), do: eventually(fn -> Enum.uniq(PoolProbe.busy(pool)) == [0] end)

  describe "after a status" do
    @describetag :tmp_dir

    # A step, a tool, and the end of the peer; the next peers go on.
    defp agent(rest) do
      told = [["stream", %{status: "calling tool note"}], ["tool", 1, "note", %{}], ["result", 1]]
      [["first", told ++ [["die"]], told ++ rest]]
    end

    defp note(test), do: [tools: %{note: fn %{} -> send(test, :noted) && "n" end}]

    test "an agent goes on at another peer, and its tool runs once", %{tmp_dir: dir} do
      pool = start_up("plays", in_dir(dir, pool_size: 1))

      assert [
               {:status, "calling tool note"},
               {:status, "restarted"},
               {:chunk, "n", "0"},
               {:ok, %{"1" => %{"result" => "n"}}, _}
             ] = elements(pool, agent([["count", 1], ["reply"]]), note(self()))

      assert_received :noted
      refute_received :noted
      idle(pool)
    end

    test "it is given up after 1 + max_retries peers, and with retry: false", %{tmp_dir: dir} do
      pool = start_up("plays", in_dir(dir, pool_size: 2, max_retries: 1))
      play = [["stream", %{status: "thinking"}], ["die"]]

      assert [
               {:status, "thinking"},
               {:status, "restarted"},
               {:error, %Error{type: :python_process_died}}
             ] = elements(pool, play, timeout: 20_000)

      all_up(pool)

      assert [{:status, "thinking"}, {:error, %Error{type: :python_process_died}}] =
               elements(pool, play, retry: false)

      assert File.read!(Path.join(dir, "starts")) |> byte_size() >= 4
      idle(pool)
    end
  end

  test "a peer that is overloaded is passed over; one that has done some of it is not" do
    pool = start_up("who", pool_size: 2)
    on_chunk = [on_chunk: & &1]
    assert {:error, %Error{type: :overloaded}} = Pool.request(pool, :overloaded, %{}, on_chunk)

    assert {:error, %Error{type: :overloaded, retryable: false}} =
             Pool.request(pool, :overloaded_halfway, %{}, on_chunk)

    counts = for bridge <- bridges(pool), do: Bridge.call(bridge, :halfway)
    assert Enum.sort(counts) == [{:ok, %{"count" => 0}}, {:ok, %{"count" => 1}}]

    full = start_up("plays", pool_size: 2, max_pending: 1)
    {:suspended, [{:chunk, "n", "0"}], one} = suspend(stream(full, [["count", 1], ["go", "on"]]))
    {:suspended, [{:chunk, "n", "0"}], two} = suspend(stream(full, [["count", 1], ["go", "on"]]))
    assert Enum.sort(PoolProbe.busy(full)) == [1, 1]
    assert [error: %Error{type: :overloaded}] = elements(full, [["reply"]])
    for next <- [one, two], do: assert({:halted, nil} = next.({:halt, nil}))
    idle(full)
  end

  describe "after a chunk" do
    @tag :tmp_dir
    test "the call goes on at another peer, and at the next bridge", %{tmp_dir: dir} do
      pool = start_up("plays", in_dir(dir, pool_size: 2))
      play = [["first", [["count", 1], ["go", "die"], ["die"]], [["count", 2], ["reply", %{}]]]]

      result =
        for element <- stream(pool, play, timeout: 20_000) do
          if match?({:chunk, _, _}, element), do: go(pool, "die")
          element
        end

      on = [{:status, "restarted"}, {:chunk, "n", "1"}]
      assert [{:chunk, "n", "0"} | rest] = Enum.drop(result, -1)
      # The peer may have been started second.
      assert rest in [on, tl(on)]
      all_up(pool)
      {:suspended, _, next} = suspend(stream(pool, [["count", 1], ["go", "on"], ["reply", %{}]]))
      index = Enum.find_index(PoolProbe.busy(pool), &(&1 == 1))
      pool |> bridges() |> Enum.at(index) |> Process.whereis() |> Process.exit(:kill)
      assert {:suspended, [{:status, "restarted"} | _], next} = next.({:cont, nil})
      on = Task.async(fn -> next.({:cont, nil}) end)
      eventually(fn -> 1 in PoolProbe.busy(pool) end)
      go(pool, "on")
      assert {:suspended, [{:ok, %{}, _} | _], _} = Task.await(on)
      idle(pool)
    end
  end

  describe "a call is counted out" do
    setup do
      %{pool: start_up("plays", pool_size: 1)}
    end

    test "when its caller is killed, before a chunk and after", %{pool: pool} do
      for play <- [[["go", "on"]], [["count", 1], ["go", "on"]]] do
        caller = spawn(fn -> elements(pool, play) end)

        # Not as soon as it is counted: killed before it has sent the call, it would leave its count behind.
        eventually(fn -> match?(%{pending: 1}, Bridge.get_status(hd(bridges(pool)))) end)
        Process.exit(caller, :kill)
        idle(pool)
      end

      {:ok, %{"heard" => heard}} = Bridge.call(hd(bridges(pool)), :heard)
      assert [_, _] = for(%{"cancel" => id} <- heard, do: id)
    end

    test "at its timeout, however short", %{pool: pool} do
      for timeout <- [0, 0, 1, 2, 5, 20] do
        assert [error: %Error{type: :timeout}] = elements(pool, [["go", "on"]], timeout: timeout)
      end

      idle(pool)
      assert mailbox() == []
    end
  end
end
