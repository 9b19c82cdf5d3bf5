defmodule DSPex.PythonBridge.Client.StreamTest do
  @moduledoc """
  What comes before a reply: `:on_chunk` and `stream`, with a peer that streams by a script. Named after the races. All of it by a bridge, and by a pool of one.
  """

  use ExUnit.Case, async: true, parameterize: [%{kind: :bridge}, %{kind: :pool}]

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.Test.FakePeer

  # Of the field n, with their numbers: ["count", 3].
  @count for n <- 0..2, do: %{"field" => "n", "chunk" => "#{n}"}

  setup tags do
    Process.put(:kind, tags.kind)
    %{bridge: start_again(Map.get(tags, :bridge, []))}
  end

  defp start_again(opts) do
    opts = FakePeer.opts(:plays, opts)

    case Process.get(:kind) do
      :bridge -> start_and_wait(opts)
      :pool -> start_pool(opts)
    end
  end

  # The tests know its bridge; `request` and `stream` are those of the pool.
  defp start_pool(opts) do
    name = Module.concat(__MODULE__, "Pool#{System.unique_integer([:positive])}")
    start_supervised!({Pool, Keyword.merge(opts, name: name, pool_size: 1)}, id: name)
    [%{bridge: bridge}] = all_up(name)
    Process.put(Process.whereis(bridge), name)
    Process.whereis(bridge)
  end

  defp server(bridge) do
    case Process.get(bridge) do
      nil -> {Bridge, bridge}
      pool -> {Pool, pool}
    end
  end

  defp request(bridge, play, opts) do
    {module, server} = server(bridge)
    module.request(server, :execute_program, %{play: play}, opts)
  end

  defp stream(bridge, play, opts \\ []) do
    {module, server} = server(bridge)
    module.stream(server, %{play: play}, opts)
  end

  defp go(bridge, name), do: Bridge.cast(bridge, :go, %{name: name})
  defp to(pid), do: [on_chunk: &send(pid, {:chunk, self(), &1})]
  defp status(bridge, key), do: Map.fetch!(Bridge.get_status(bridge), key)

  defp cancelled(bridge) do
    {:ok, %{"heard" => heard}} = Bridge.call(bridge, :heard)
    for %{"cancel" => id} <- heard, do: id
  end

  defp received do
    for {:chunk, _pid, chunk} <- mailbox(), do: chunk
  end

  describe "request/4 with :on_chunk" do
    test "calls it in the caller's process with each map, in order", context do
      chunks = [
        %{"field" => "answer", "chunk" => "Pá"},
        %{"status" => "calling tool search"},
        %{"index" => 3, "success" => true, "result" => %{"answer" => "x"}},
        %{"of" => "tomorrow"}
      ]

      play =
        Enum.map(chunks, &["stream", &1]) ++ [["count", 3], ["reply", %{"answer" => "Paris"}]]

      assert {:ok, %{"answer" => "Paris"}, meta} = request(context.bridge, play, to(self()))
      assert meta == %{"asked" => ["stream", "meta"]}
      assert received() == chunks ++ @count
      assert Enum.all?(mailbox(), &match?({:chunk, pid, _} when pid == self(), &1))
      assert %{late_replies: 0, pending: 0} = Bridge.get_status(context.bridge)
    end

    test "cancels the run when it raises, and passes that on", %{bridge: bridge} do
      play = [["count", 3], ["go", "on"], ["count", 3], ["reply", %{}]]
      on_chunk = fn %{"chunk" => n} -> if n == "1", do: throw(:mine) end
      assert catch_throw(request(bridge, play, on_chunk: on_chunk)) == :mine
      assert [_id] = eventually(fn -> cancelled(bridge) != [] && cancelled(bridge) end)
      assert status(bridge, :pending) == 0
      go(bridge, "on")
      # Three chunks and the reply, at least; of the first three one or none.
      eventually(fn -> status(bridge, :late_replies) >= 4 end)
      assert mailbox() == []
    end

    test "counts a frame that is not a chunk, and goes on", %{bridge: bridge} do
      garbage =
        for end_of <- [~s({"field":), "[]}", "1}"], do: ["raw", ~s({"id":ID,"stream":) <> end_of]

      play = garbage ++ [["count", 1], ["reply", %{}]]

      log =
        ExUnit.CaptureLog.capture_log(fn ->
          assert {:ok, %{}, _} = request(bridge, play, to(self()))
          # It has logged the first by then.
          assert status(bridge, :unreadable_frames) == 3
        end)

      assert received() == Enum.take(@count, 1)
      assert log =~ "not readable"
    end

    test "with a bridge that is killed after a chunk", %{bridge: bridge, kind: kind} do
      opts = [timeout: 2_000, on_chunk: fn _chunk -> Process.exit(bridge, :kill) end]
      result = request(bridge, [["count", 1], ["go", "on"]], opts)
      # To a pool it is one of its peers, and the call goes on at the next one.
      type = if kind == :pool, do: :timeout, else: :bridge_not_running
      assert {:error, %Error{type: ^type}} = result
      assert mailbox() == []
    end
  end

  describe "stream/3" do
    test "yields chunks, statuses and items, and the result last", %{bridge: bridge} do
      play = [
        ["stream", %{field: "answer", chunk: "Par"}],
        ["stream", %{status: "calling tool search"}],
        ["stream", %{of: "tomorrow"}],
        ["stream", %{index: 1, success: true, result: %{answer: "x"}}],
        ["stream", %{index: 0, success: false, error: "no", error_type: "timeout"}],
        ["reply", %{answer: "Paris"}]
      ]

      assert [
               {:chunk, "answer", "Par"},
               {:status, "calling tool search"},
               {:item, 1, {:ok, %{"answer" => "x"}}},
               {:item, 0, {:error, %Error{type: :timeout, message: "no"}}},
               {:ok, %{"answer" => "Paris"}, %{"asked" => ["stream", "meta"]}}
             ] = Enum.to_list(stream(bridge, play))

      assert mailbox() == []
    end

    test "can be pulled by hand: halted between two pulls, it is cancelled", %{bridge: bridge} do
      play = [["count", 3], ["go", "on"]]
      stream = stream(bridge, play)
      suspend = fn element, _acc -> {:suspend, element} end
      {:suspended, nil, next} = Enumerable.reduce(stream, {:suspend, nil}, suspend)
      assert status(bridge, :pending) == 0
      {:suspended, {:chunk, "n", "0"}, next} = next.({:cont, nil})
      {:suspended, {:chunk, "n", "1"}, next} = next.({:cont, nil})
      assert cancelled(bridge) == []
      assert {:halted, nil} = next.({:halt, nil})
      assert [_id] = eventually(fn -> cancelled(bridge) != [] && cancelled(bridge) end)
      assert mailbox() == []
      assert [{{:chunk, "n", "0"}, 1}, {{:chunk, "n", "1"}, 2}] = Enum.zip(stream, [1, 2])
      assert [_, _] = eventually(fn -> match?([_, _], cancelled(bridge)) && cancelled(bridge) end)
      assert mailbox() == []
    end

    test "that is read after its time is over yields what came in time", %{bridge: bridge} do
      stream = stream(bridge, [["count", 3], ["reply", %{}]], timeout: 300)
      suspend = fn element, acc -> {:suspend, [element | acc]} end
      started = System.monotonic_time(:millisecond)
      {:suspended, acc, next} = Enumerable.reduce(stream, {:cont, []}, suspend)
      eventually(fn -> System.monotonic_time(:millisecond) > started + 300 end)
      {:suspended, acc, next} = next.({:cont, acc})
      {:suspended, acc, next} = next.({:cont, acc})
      {:suspended, acc, next} = next.({:cont, acc})
      assert [{:ok, %{}, _}, {_, _, "2"}, {_, _, "1"}, {_, _, "0"}] = acc
      assert {:done, ^acc} = next.({:cont, acc})
      assert mailbox() == []
      # And one that did not come in time can be halted, too.
      {:suspended, _, next} = Enumerable.reduce(stream, {:cont, []}, suspend)
      eventually(fn -> System.monotonic_time(:millisecond) > started + 700 end)
      {:suspended, _, next} = next.({:cont, []})
      assert {:halted, nil} = next.({:halt, nil})
      assert mailbox() == []
    end

    test "yields an error as its last element", %{bridge: bridge} do
      assert [error: %Error{type: :lm_error}] =
               Enum.to_list(stream(bridge, [["fail", "lm_error"]]))

      {ms, elements} =
        timed(fn -> Enum.to_list(stream(bridge, [["count", 1], ["go", ""]], timeout: 100)) end)

      assert [{:chunk, "n", "0"}, {:error, %Error{type: :timeout}}] = elements
      # Not the 30 s that are the default.
      assert ms < 10_000
      assert [error: %Error{type: :bridge_not_running}] = Enum.to_list(stream(:nobody, []))
      assert [error: %Error{type: :invalid_args}] = Enum.to_list(Bridge.stream(bridge, %{a: {1}}))
      assert [error: %Error{}] = Enum.take(Bridge.stream(%{}, timeout: -1), 1)
      assert [error: %Error{}] = Enum.take(Bridge.stream(bridge, [], []), 1)
      assert mailbox() == []
    end

    # One peer has told its steps, or given items, and dies.
    defp dies_after(told), do: told ++ [["go", "die"], ["die"]]
    defp told(text), do: ["stream", %{status: text}]
    defp item(index), do: ["stream", %{index: index, success: true, result: %{n: index}}]

    test "goes on when the peer dies after a status, and says so" do
      bridge = start_again([])
      next = [told("calling tool search"), ["count", 1], ["reply", %{}]]
      play = [["first", dies_after([told("calling tool search"), told("thinking")]), next]]

      elements =
        for element <- stream(bridge, play, timeout: 20_000) do
          if element == {:status, "thinking"}, do: go(bridge, "die")
          element
        end

      assert [
               {:status, "calling tool search"},
               {:status, "thinking"},
               {:status, "restarted"},
               {:chunk, "n", "0"},
               {:ok, %{}, _}
             ] = elements
    end

    test "gives each item once when the peer dies between them" do
      bridge = start_again([])
      play = [["first", dies_after([item(1), item(0)]), [item(0), item(2), item(1), ["reply"]]]]

      elements =
        for element <- stream(bridge, play, timeout: 20_000) do
          if match?({:item, 0, _}, element), do: go(bridge, "die")
          element
        end

      assert [{:item, 1, _}, {:item, 0, _}, {:status, "restarted"}, {:item, 2, _}, {:ok, _, _}] =
               elements
    end

    defp chunk(field, text), do: ["stream", %{field: field, chunk: text}]
    defp reset(field), do: ["stream", %{field: field, reset: true}]
    @again {:status, "asking again: no"}

    # What the caller gets if the first peer dies after `first`, and the next one sends `others`.
    defp elements(first, others, opts \\ []) do
      bridge = start_again(opts)
      play = [["first", first ++ [["die"]], others ++ [["reply", %{}]]]]
      elements = Enum.to_list(stream(bridge, play, timeout: 20_000))
      assert {:ok, %{}, _} = List.last(elements)
      Enum.drop(elements, -1)
    end

    test "goes on where it was when the peer dies between two chunks" do
      first = [chunk("a", "Par"), chunk("b", "x"), chunk("a", "is")]
      given = [{:chunk, "a", "Par"}, {:chunk, "b", "x"}, {:chunk, "a", "is"}]
      given = given ++ [{:status, "restarted"}]
      # In one piece, in smaller ones, and with more.
      others = [chunk("a", "Paris"), chunk("b", "x")]
      assert elements(first, others) == given
      others = [chunk("b", "xy"), chunk("a", "P"), chunk("a", "aris, "), chunk("a", "of course")]
      more = [{:chunk, "b", "y"}, {:chunk, "a", ", "}, {:chunk, "a", "of course"}]
      assert elements(first, others) == given ++ more
    end

    test "resets a field whose text differs, or ends earlier" do
      first = [chunk("a", "Paris"), chunk("b", "x")]
      given = [{:chunk, "a", "Paris"}, {:chunk, "b", "x"}, {:status, "restarted"}]
      others = [chunk("b", "x"), chunk("a", "Pa"), chunk("a", "ra"), chunk("a", "gon")]
      anew = [{:reset, "a"}, {:chunk, "a", "Para"}, {:chunk, "a", "gon"}]
      assert elements(first, others) == given ++ anew
      anew = [{:reset, "a"}, {:chunk, "a", "Pa"}, {:reset, "b"}]
      assert elements(first, [chunk("a", "Pa")]) == given ++ anew
    end

    test "tells the texts of a field apart that the peer itself begins anew" do
      told = told("asking again: no")
      void = [chunk("a", "No"), reset("a"), chunk("a", "Yes"), told, chunk("a", "N")]
      given = [{:chunk, "a", "No"}, {:reset, "a"}, {:chunk, "a", "Yes"}, @again]
      given = given ++ [{:chunk, "a", "N"}, {:status, "restarted"}]
      assert elements(void, void ++ [chunk("a", "o")]) == given ++ [{:chunk, "a", "o"}]
      # The next one has the first text only, and more of it.
      anew = [{:reset, "a"}, {:chunk, "a", "Nor"}]
      assert elements(void, [chunk("a", "No"), chunk("a", "r")]) == given ++ anew
      assert elements(void, [chunk("a", "No")]) == given ++ [{:reset, "a"}, {:chunk, "a", "No"}]
    end

    defp journal(n), do: ["journal", %{n: n, key: "k#{n}"}]
    @entries [%{"n" => 1, "key" => "k1"}, %{"n" => 2, "key" => "k2"}]

    # What a run sends whose peer dies after `first`.
    defp resent(bridge, first, opts \\ []) do
      others = [["journaled", [["journal"]], [["reply", "none"]]]]
      {:ok, sent, _} = request(bridge, [["first", first ++ [["die"]], others]], opts)
      sent
    end

    test "is sent again with the answers of its LM, and so is a run with tools" do
      first = [journal(1), journal(2)]

      for opts <- [to(self()), [tools: %{t: & &1}]],
          do: assert(resent(start_again([]), first, opts) == @entries)

      # What no peer goes on with is not kept.
      assert resent(start_again([]), []) == "none"
      assert received() == []
    end

    test "begins anew if its journal takes too many bytes, or none is kept" do
      for most <- [30, 0] do
        bridge = start_again(journal_bytes: most)
        assert resent(bridge, [journal(1), journal(2)], to(self())) == "none"
      end

      # The journal and the request have to fit into a frame.
      long = ["journal", %{n: 1, key: String.duplicate("x", 900)}]
      assert resent(start_again(max_frame_bytes: 1_200), [long], to(self())) == "none"
      assert [%{}] = resent(start_again(max_frame_bytes: 9_000), [long], to(self()))
    end

    test "begins anew, once, if its journal does not fit the run, with what its tools have answered" do
      tool = [["tool", 1, "t", %{}], ["result", 1]]
      mismatch = [["fail", "journal_mismatch"]]
      played = [["count", 1]] ++ tool
      others = [["journaled", mismatch, played ++ [["reply"]]]]
      play = [["first", [journal(1)] ++ played ++ [["die"]], others]]
      test = self()
      opts = [tools: %{t: fn _ -> send(test, :called) && "t" end}] ++ to(self())
      assert {:ok, %{"1" => %{"result" => "t"}}, _} = request(start_again([]), play, opts)
      assert received() == [hd(@count), %{"status" => "restarted"}]
      assert_received :called
      refute_received :called
      opts = to(self())
      assert {:error, error} = request(start_again([]), mismatch, opts)
      assert error.type == :journal_mismatch
    end

    test "takes no frame of a journal for another, and no bytes that are none", %{bridge: bridge} do
      frames = [~s({"journal":{"n":1}}), ~s({"id":ID,"journal":[1]}), ~s({"id":ID,"journal":{})]
      late = [~s({"id":ID,"journal":{"n":1}}), ~s({"id":999,"journal":{"n":1}})]
      raw = fn frames -> for frame <- frames, do: ["raw", frame] end

      ExUnit.CaptureLog.capture_log(fn ->
        play = raw.(frames) ++ [["reply", %{}]] ++ raw.(late)
        assert {:ok, %{}, _} = request(bridge, play, to(self()))
        assert %{unreadable_frames: 3, late_replies: 2} = Bridge.get_status(bridge)
      end)
    end
  end
end
