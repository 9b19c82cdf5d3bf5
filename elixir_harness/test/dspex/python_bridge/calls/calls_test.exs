defmodule DSPex.PythonBridge.CallsTest do
  @moduledoc "The calls of a bridge, which go from one peer to the next: played through without a bridge."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Calls, Options, Programs, Protocol}
  alias DSPex.PythonBridge.Calls.{Dispatcher, InFlight, Journal, Request}
  alias DSPex.PythonBridge.Tools.Invocation

  @frame "a frame"

  # The first of two peers serves.
  setup context do
    {:ok, options} = Options.new(max_retries: context[:max_retries] || 3)
    [first, second] = for _ <- 1..2, do: peer(self())
    held = InFlight.new(options, Programs.Store.new())
    in_flight = held |> Dispatcher.attach(first) |> Dispatcher.serve(first)
    %{in_flight: in_flight, held: held, first: first, second: second}
  end

  # In the place of a port: it tells the test what it is sent.
  defp peer(test), do: spawn_link(fn -> tell(test) end)

  defp tell(test) do
    receive do
      {_bridge, {:command, frame}} -> send(test, {self(), IO.iodata_to_binary(frame)})
    end

    tell(test)
  end

  # One that takes chunks and has given tools: call 1.
  defp accept(in_flight, opts \\ []) do
    ref = :erlang.alias()
    request = %Request{ref: ref, pid: self(), body: ~s(,"n":1}), stream?: true, tools?: true}
    {ref, Calls.accept(in_flight, struct!(request, opts))}
  end

  defp second_serves(in_flight, %{first: first, second: second}) do
    in_flight = in_flight |> Dispatcher.attach(second) |> Dispatcher.serve(second)
    Dispatcher.lost(in_flight, first, :replaced)
  end

  defp tool_call(port) do
    frame = ~s({"id":1,"tool_call":{"call_id":7,"name":"t","args":{}}})
    %Invocation{port: port, id: 1, frame: frame, max_frame_bytes: 1_000}
  end

  describe "chunks" do
    test "come from the peer that has the call", %{first: first, second: second} = context do
      {ref, in_flight} = accept(context.in_flight)
      assert :ok = Calls.chunk(in_flight, first, 1, @frame)
      assert_received {^ref, :chunk, @frame}
      assert Calls.chunk(in_flight, first, 2, @frame) == :nobody
      assert Calls.chunk(in_flight, second, 1, @frame) == :nobody
      in_flight = second_serves(in_flight, context)
      assert Calls.chunk(in_flight, first, 1, @frame) == :nobody
      assert :ok = Calls.chunk(in_flight, second, 1, "another")
      assert_received {^ref, :chunk, "another"}
      refute_received {^ref, :chunk, @frame}
    end

    test "do not keep their call at its peer", context do
      {ref, in_flight} = accept(context.in_flight)
      :ok = Calls.chunk(in_flight, context.first, 1, @frame)
      in_flight = Dispatcher.lost(in_flight, context.first, :died)
      assert InFlight.pending(in_flight) == 1
      assert_received {^ref, :chunk, @frame}
      restarted = Protocol.restarted_chunk()
      assert_received {^ref, :chunk, ^restarted}
    end
  end

  test "the entries of a journal go to the caller, and with the call to its next peer", context do
    {ref, in_flight} = accept(context.in_flight, journal: %Journal{most: 20})
    {:ok, in_flight} = Calls.journal(in_flight, context.first, 1, ~s({"n":1}))
    assert_received {^ref, :journal, ~s({"n":1})}
    assert Calls.journal(in_flight, context.second, 1, ~s({"n":2})) == :nobody
    second = context.second
    in_flight = second_serves(in_flight, context)
    assert_receive {^second, ~s({"id":1,"journal":[{"n":1}],"n":1})}
    # With a third one it has too many bytes: it is not sent, and takes no more.
    {:ok, in_flight} = Calls.journal(in_flight, second, 1, ~s({"n":2}))
    {:ok, in_flight} = Calls.journal(in_flight, second, 1, ~s({"n":3}))
    assert %Journal{entries: nil, bytes: 0} = in_flight.calls[1].journal
    refute inspect(%Journal{most: 9, entries: ["planted"]}) =~ "planted"
    {_ref, in_flight} = accept(in_flight)
    assert Calls.journal(in_flight, second, 2, ~s({"n":1})) == :nobody
  end

  test "a replacement is no death, nor is an end that others caused", context do
    for {how, deaths} <- [died: 1, replaced: 0, spared: 0] do
      {_ref, in_flight} = accept(context.in_flight)
      in_flight = Dispatcher.lost(in_flight, context.first, how)
      assert {how, in_flight.calls[1].deaths} == {how, deaths}
    end
  end

  describe "tools" do
    test "are called for the peer that has the call", %{first: first, second: second} = context do
      {ref, in_flight} = accept(context.in_flight)
      assert Calls.tool_call(in_flight, tool_call(first)) == :ok
      assert_received {^ref, :tool_call, %Invocation{port: ^first}}
      in_flight = second_serves(in_flight, context)
      assert Calls.tool_call(in_flight, tool_call(first)) == :ok
      assert_receive {:tool_result, _port, nil, frame}, 5_000
      assert %{"tool_result" => %{"call_id" => 7, "success" => false}} = JSON.decode!(frame)
      assert Calls.tool_call(in_flight, tool_call(second)) == :ok
      assert_received {^ref, :tool_call, %Invocation{port: ^second}}
    end

    test "that must not be called twice keep their call at its peer", %{first: first} = context do
      for how <- [:died, :replaced], resend <- [:bridge, :caller, :never] do
        {ref, in_flight} = accept(context.in_flight, resend: resend)
        assert {:ok, in_flight} = Calls.bind(in_flight, first, 1)
        assert InFlight.pending(Dispatcher.lost(in_flight, first, how)) == 0
        assert_received {^ref, {:error, :tool_begun}}
      end

      {_ref, in_flight} = accept(context.in_flight)
      in_flight = second_serves(in_flight, context)
      assert Calls.bind(in_flight, first, 1) == {:over, in_flight}
      assert Calls.bind(in_flight, context.second, 2) == {:over, in_flight}
    end

    test "have their results sent to the peer that asked, while it has the call", context do
      %{first: first, second: second} = context
      {_ref, in_flight} = accept(context.in_flight)
      assert_receive {^first, ~s({"id":1) <> _}
      Calls.tool_result(in_flight, first, 1, @frame)
      assert_receive {^first, @frame}
      in_flight = second_serves(in_flight, context)
      assert_receive {^second, ~s({"id":1) <> _}
      in_flight = Calls.tool_result(in_flight, first, 1, @frame)
      Calls.tool_result(in_flight, second, 1, "another")
      assert_receive {^second, "another"}
      {:ok, in_flight} = Calls.deliver(in_flight, second, 1, "reply")
      in_flight = Calls.tool_result(in_flight, second, 1, "late")
      Calls.tool_result(in_flight, second, nil, "refused")
      assert_receive {^second, "refused"}
      refute_received {^second, "late"}
      refute_received {^first, _frame}
    end
  end

  describe "programs" do
    defp body(id), do: elem(Protocol.encode_body(:create_program, %{id: id}), 1)

    defp told(port) do
      receive do
        {^port, frame} -> [JSON.decode!(frame)["args"] | told(port)]
      after
        100 -> []
      end
    end

    test "are sent as the store has them, unless the peer was given them last", context do
      %{in_flight: %{programs: store} = in_flight, first: first} = context
      change = {:create, "mine", nil}
      request = %Request{ref: :erlang.alias(), pid: self(), body: body("mine"), change: change}
      in_flight = Calls.accept(in_flight, request)
      {:ok, in_flight} = Calls.deliver(in_flight, first, 1, ~s({"id":1,"success":true}))
      Programs.Store.put(store, "theirs", Programs.Store.stamp(), body("theirs"))
      assert [%{"id" => "mine"}] = told(first)
      in_flight = Dispatcher.follow(in_flight, ["mine", "theirs", "neither"])
      assert [%{"id" => "theirs", "lazy" => true}] = told(first)
      Programs.Store.remove(store, ["mine"], Programs.Store.stamp())
      in_flight = Dispatcher.follow(in_flight, :all)
      assert [%{"program_ids" => ["mine"]}] = told(first)
      Dispatcher.follow(in_flight, :all)
      assert told(first) == []
    end
  end

  describe "a call leaves no entry, monitor or timer" do
    @create {:create, "p", nil}

    # One whose caller lives for as long as the test, and a cast.
    defp two(in_flight) do
      caller = spawn_link(fn -> Process.sleep(:infinity) end)
      cast = %Request{timeout: 600_000, body: "body", change: @create}
      call = %{cast | ref: make_ref(), pid: caller, timeout: :infinity}
      in_flight = in_flight |> Calls.accept(call) |> Calls.accept(cast)
      assert Process.info(self(), :monitors) == {:monitors, [process: caller]}
      {call.ref, in_flight.calls[2].watch, in_flight}
    end

    defp answered(in_flight, port) do
      {:ok, in_flight} = Calls.deliver(in_flight, port, 1, "reply")
      {:ok, in_flight} = Calls.deliver(in_flight, port, 2, "reply")
      in_flight
    end

    test "however it ends", %{in_flight: serving, held: held, first: first} do
      abandon = fn in_flight, ref -> in_flight |> Calls.abandon(ref) |> Calls.abandon(2) end

      for {in_flight, ending} <- [
            {serving, fn in_flight, _ref -> answered(in_flight, first) end},
            {serving, &(&1 |> abandon.(&2) |> answered(first))},
            {serving, &(&1 |> abandon.(&2) |> Dispatcher.lost(first, :died))},
            {held, abandon},
            {%{serving | max_retries: 0},
             fn in_flight, _ref -> Dispatcher.lost(in_flight, first, :died) end},
            {held,
             fn in_flight, _ref -> InFlight.fail_all(in_flight, :bridge_not_running, :all) end}
          ] do
        {ref, {:timer, timer}, in_flight} = two(in_flight)
        in_flight = ending.(in_flight, ref)
        assert in_flight.calls == %{}
        assert :gb_sets.is_empty(in_flight.held)
        assert :gb_sets.is_empty(in_flight.suspects.waiting)
        assert Process.info(self(), :monitors) == {:monitors, []}
        # Cancelled without waiting for it.
        eventually(fn -> Process.read_timer(timer) == false end)
      end
    end
  end

  describe "of 30,000 calls" do
    @count 30_000

    # Where the work for one depends on how many there are, this takes minutes instead of a second.
    @describetag timeout: 30_000

    setup %{in_flight: in_flight} do
      # A peer that reads nothing.
      old = spawn_link(fn -> Process.sleep(:infinity) end)
      in_flight = in_flight |> Dispatcher.attach(old) |> Dispatcher.serve(old)
      {_refs, in_flight} = Enum.map_reduce(1..@count, in_flight, fn _, it -> accept(it) end)
      next = spawn_link(fn -> Process.sleep(:infinity) end)
      %{in_flight: Dispatcher.attach(in_flight, next), old: old, next: next}
    end

    # A failed assertion would show all of it. The first id is that of the bridge's own request to `old`.
    defp each(in_flight, fun), do: Enum.reduce(2..(@count + 1), in_flight, fun)

    test "it is known after each end whether an old peer has more to answer", context do
      in_flight = Dispatcher.serve(context.in_flight, context.next)

      in_flight =
        each(in_flight, fn id, in_flight ->
          true = Dispatcher.busy?(in_flight, context.old)

          if rem(id, 2) == 0,
            do: Calls.abandon(in_flight, id),
            else: elem(Calls.deliver(in_flight, context.old, id, "reply"), 1)
        end)

      false = Dispatcher.busy?(in_flight, context.old)
    end

    @tag max_retries: 1
    test "suspects are sent to the next peer, the youngest first", context do
      in_flight =
        context.in_flight |> Dispatcher.lost(context.old, :died) |> Dispatcher.serve(context.next)

      in_flight =
        each(in_flight, fn n, in_flight ->
          {:ok, in_flight} = Calls.deliver(in_flight, context.next, @count + 3 - n, "reply")
          in_flight
        end)

      assert InFlight.pending(in_flight) == 0
    end
  end
end
