defmodule DSPex.PythonBridge.Calls.EventsTest do
  @moduledoc "Chunks and tools of calls that have gone from one peer to the next: played through."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Calls, Options, Programs}
  alias DSPex.PythonBridge.Calls.{Handover, InFlight, Request}
  alias DSPex.PythonBridge.Tools.Invocation

  @frame "a frame"

  # Two peers that send back what they get; the first has a call of number 1, which takes chunks.
  setup do
    {:ok, options} = Options.new(max_retries: 3)
    ref = :erlang.alias()
    [first, second] = for _ <- 1..2, do: open()
    request = %Request{ref: ref, pid: self(), body: ~s(,"n":1}), stream?: true, tools?: true}

    in_flight =
      InFlight.new(options, Programs.Store.new())
      |> Handover.attach(first)
      |> Handover.serve(first)
      |> Calls.accept(request)

    assert_receive {^first, {:data, _request}}, 5_000
    %{in_flight: in_flight, ref: ref, first: first, second: second}
  end

  defp open do
    Port.open({:spawn_executable, System.find_executable("cat")}, [{:packet, 4}, :binary])
  end

  defp second_serves(%{in_flight: in_flight, first: first, second: second}) do
    in_flight = in_flight |> Handover.attach(second) |> Handover.serve(second)
    in_flight = Handover.lost(in_flight, first, :replaced)
    assert_receive {^second, {:data, _request}}, 5_000
    in_flight
  end

  defp tool_call(port, id),
    do: %Invocation{
      port: port,
      id: id,
      frame: ~s({"id":1,"tool_call":{"call_id":7,"name":"t","args":{}}}),
      max_frame_bytes: 1_000
    }

  test "a chunk comes from the peer that has the call",
       %{in_flight: in_flight, ref: ref} = context do
    assert {:ok, _in_flight} = Calls.Events.chunk(in_flight, context.first, 1, @frame)
    assert_received {^ref, :chunk, @frame}
    assert Calls.Events.chunk(in_flight, context.first, 2, @frame) == :nobody
    assert Calls.Events.chunk(in_flight, context.second, 1, @frame) == :nobody
  end

  test "a chunk of the peer before is not mixed into what the next one streams", context do
    in_flight = second_serves(context)
    assert Calls.Events.chunk(in_flight, context.first, 1, @frame) == :nobody
    assert {:ok, _in_flight} = Calls.Events.chunk(in_flight, context.second, 1, "another")
    ref = context.ref
    assert_received {^ref, :chunk, "another"}
    refute_received {^ref, :chunk, @frame}
  end

  test "a call that was streamed from does not go to the next peer", context do
    {:ok, in_flight} = Calls.Events.chunk(context.in_flight, context.first, 1, @frame)
    in_flight = Handover.lost(in_flight, context.first, :replaced)
    assert Calls.Table.size(in_flight.calls) == 0
    ref = context.ref
    assert_received {^ref, {:error, :replaced}}
  end

  test "a chunk keeps how the call is counted out, and the body of a change",
       %{first: first, in_flight: in_flight} do
    ref = :erlang.alias()
    request = %Request{ref: ref, pid: self(), body: "body", retry: :pool, stream?: true}
    in_flight = Calls.accept(in_flight, request)
    change = {:create, "p", nil}
    request = %{request | ref: nil, body: "change", change: change, retry: :bridge}
    in_flight = Calls.accept(in_flight, request)
    {:ok, in_flight} = Calls.Events.chunk(in_flight, first, 2, @frame)
    assert %{retry: :pool, body: "", streamed?: true} = Calls.Table.get(in_flight.calls, 2)

    in_flight = %{
      in_flight
      | calls: Calls.Table.replace(in_flight.calls, 3, streamed(in_flight, first))
    }

    assert %{body: "change"} = Calls.Table.get(in_flight.calls, 3)
    Handover.lost(in_flight, first, :died)
    # Its caller is not to try another peer.
    assert_received {^ref, {:error, :python_process_died}}
  end

  # A cast takes no chunks; the caller of a change may.
  defp streamed(in_flight, port) do
    call = %{Calls.Table.get(in_flight.calls, 3) | ref: :erlang.alias()}
    in_flight = %{in_flight | calls: Calls.Table.replace(in_flight.calls, 3, call)}
    {:ok, in_flight} = Calls.Events.chunk(in_flight, port, 3, @frame)
    Calls.Table.get(in_flight.calls, 3)
  end

  test "results that wait to be written are dropped with their call, however that ends" do
    # It does not read: what comes after the first requests waits.
    args = [:binary, packet: 4, args: ["60"]]
    port = Port.open({:spawn_executable, System.find_executable("sleep")}, args)
    body = String.duplicate("x", 1_000_000)
    {:ok, options} = Options.new([])

    in_flight =
      InFlight.new(options, Programs.Store.new())
      |> Handover.attach(port)
      |> Handover.serve(port)

    in_flight =
      for _ <- 1..5, reduce: in_flight do
        in_flight ->
          request = %Request{ref: :erlang.alias(), pid: self(), body: body, tools?: true}
          Calls.accept(in_flight, request)
      end

    in_flight =
      for id <- 1..5, result <- [body, "small"], reduce: in_flight do
        in_flight -> Calls.Events.tool_result(in_flight, port, id, result)
      end

    waiting = fn in_flight -> in_flight.send_queues[port].queue |> :gb_trees.size() end
    before = waiting.(in_flight)
    assert before >= 13
    {:ok, in_flight} = Calls.deliver(in_flight, port, 5, "reply")
    assert waiting.(in_flight) == before - 2
    in_flight = InFlight.fail(in_flight, 4, :bridge_not_running)
    assert waiting.(in_flight) == before - 4
    # Its cancel takes the place of the two.
    in_flight = Calls.abandon(in_flight, 1)
    assert waiting.(in_flight) == before - 5
    # By it the bridge knows that there is something to collect.
    for _ <- 1..3, do: assert_received({:dropped, 1_000_005})
    refute_received {:dropped, _bytes}
  end

  test "a tool is called for the peer that has the call; another peer gets an error",
       context do
    mine = tool_call(context.first, 1)
    assert Calls.Events.tool_call(context.in_flight, mine) == :ok
    ref = context.ref
    assert_received {^ref, :tool_call, ^mine}
    %{second: second} = context
    in_flight = second_serves(context)
    assert Calls.Events.tool_call(in_flight, mine) == :ok
    assert_receive {:tool_result, _port, nil, frame}, 5_000
    assert %{"tool_result" => %{"call_id" => 7, "success" => false}} = JSON.decode!(frame)
    refute_received {^ref, :tool_call, ^mine}
    assert Calls.Events.tool_call(in_flight, tool_call(second, 1)) == :ok
    assert_received {^ref, :tool_call, %Invocation{port: ^second}}
  end

  test "a call in which a tool begins that must not be called twice does not go to the next peer",
       context do
    %{first: first, ref: ref} = context

    for how <- [:died, :replaced],
        retry <- [:bridge, :pool, :never],
        streamed? <- [false, true] do
      request = %{Calls.Table.get(context.in_flight.calls, 1) | retry: retry}
      calls = Calls.Table.replace(context.in_flight.calls, 1, request)
      in_flight = %{context.in_flight | calls: calls}
      assert {:ok, in_flight} = Calls.Events.bind(in_flight, first, 1)
      # It is not needed any longer.
      assert %{retry: ^retry, body: ""} = Calls.Table.get(in_flight.calls, 1)

      in_flight =
        if streamed?,
          do: elem(Calls.Events.chunk(in_flight, first, 1, @frame), 1),
          else: in_flight

      in_flight = Handover.lost(in_flight, first, how)
      assert Calls.Table.size(in_flight.calls) == 0
      # Also a pool's caller: it is to try no other peer.
      assert_received {^ref, {:error, :tool_begun}}
    end
  end

  test "such a tool does not begin for a peer that no longer has the call", context do
    in_flight = second_serves(context)
    assert Calls.Events.bind(in_flight, context.first, 1) == {:over, in_flight}
    assert Calls.Events.bind(in_flight, context.second, 2) == {:over, in_flight}
    assert {:ok, in_flight} = Calls.Events.bind(in_flight, context.second, 1)
    in_flight = Handover.lost(in_flight, context.second, :died)
    assert Calls.Events.bind(in_flight, context.second, 1) == {:over, in_flight}
  end

  test "a result goes to the peer that asked, and to no other", context do
    %{first: first, second: second} = context
    Calls.Events.tool_result(context.in_flight, first, 1, @frame)
    assert_receive {^first, {:data, @frame}}, 5_000
    in_flight = second_serves(context)
    # It would come first.
    in_flight = Calls.Events.tool_result(in_flight, first, 1, @frame)
    in_flight = Calls.Events.tool_result(in_flight, first, nil, @frame)
    Calls.Events.tool_result(in_flight, second, 1, "another")
    assert_receive {^second, {:data, frame}}, 5_000
    assert frame == "another"
    refute_received {^first, {:data, _frame}}
  end

  test "a result of a call that is over goes nowhere; a refusal does not need the call",
       context do
    %{first: first} = context
    {:ok, in_flight} = Calls.deliver(context.in_flight, context.first, 1, "reply")
    in_flight = Calls.Events.tool_result(in_flight, first, 1, @frame)
    Calls.Events.tool_result(in_flight, first, nil, "refused")
    assert_receive {^first, {:data, frame}}, 5_000
    assert frame == "refused"
  end
end
