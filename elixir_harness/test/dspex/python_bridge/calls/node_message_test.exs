defmodule DSPex.PythonBridge.Calls.NodeMessageTest do
  @moduledoc """
  What a node sends to, and calls on, nodes of other versions: here as those write it, whatever it is called in this version.
  What this version sends is also in `DSPex.PythonBridge.Client.RemoteBridgeTest`.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Pool, Protocol, Top}
  alias DSPex.PythonBridge.Calls.{NodeMessage, Request}
  alias DSPex.PythonBridge.Pool.Cluster.RemoteCall
  alias DSPex.PythonBridge.Pool.Handle
  alias DSPex.PythonBridge.Tools.Invocation

  @pool __MODULE__.Pool
  @far {:bridge, :"far@127.0.0.1"}
  @nothing %{stream?: false, tools?: false}

  test "a request to another node is a tuple, and read again from it" do
    request = %Request{ref: make_ref(), pid: self(), timeout: 5, body: "body", deaths: 1}

    for {here, there} <- [bridge: :here, never: :never, pool: :caller],
        {change, stream?, tools?} <- [{nil, false, true}, {{:create, "one", nil}, true, false}] do
      request = %{request | retry: here, change: change, stream?: stream?, tools?: tools?}
      takes = %{stream?: stream?, tools?: tools?}
      message = {:request, request.ref, self(), 5, "body", {there, 1, change}, takes}
      assert NodeMessage.request(request, @far) == message
      assert NodeMessage.read_request(message) == request
    end

    short = {:request, nil, nil, 5, "body", {:here, 0, nil}}
    cast = %Request{timeout: 5, body: "body"}
    assert NodeMessage.read_request(short) == cast
    assert NodeMessage.request(cast, @far) == Tuple.insert_at(short, 6, @nothing)
    assert NodeMessage.request(cast, self()) == {:request, cast}
  end

  test "a bridge takes the requests of callers on other nodes" do
    bridge = start_supervised!({Bridge, "plays" |> fake_opts() |> Keyword.put(:name, nil)})
    ref = :erlang.alias()
    {:ok, ping} = Protocol.encode_body(:ping, %{})
    send(bridge, {:request, ref, self(), 5_000, ping, {:never, 0, nil}})
    assert_receive {^ref, {:frame, _reply}}, 10_000

    play = [["count", 1], ["tool", 1, "where", %{}], ["result", 1], ["reply"]]
    {:ok, body} = Protocol.encode_body(:execute_program, %{play: play})
    takes = %{stream?: true, tools?: true}
    send(bridge, {:request, ref, self(), 5_000, body, {:here, 0, nil}, takes})
    assert_receive {^ref, :chunk, _frame}, 5_000
    assert_receive {^ref, :tool_call, tool_call}, 5_000
    {:ok, call_id, "where", %{}} = Protocol.decode_tool_call(tool_call.frame)
    {:ok, frame} = Protocol.encode_tool_result(call_id, {:ok, 1})
    send(bridge, {:tool_result, tool_call.port, tool_call.id, frame})
    assert_receive {^ref, {:frame, _reply}}, 5_000

    {:ok, body} = Protocol.encode_body(:execute_program, %{play: [["go", "x"]]})
    send(bridge, {:request, ref, self(), 60_000, body, {:here, 0, nil}, @nothing})
    assert Bridge.get_status(bridge).pending == 1
    send(bridge, {:abandon, ref})
    assert Bridge.get_status(bridge).pending == 0
  end

  test "a tool call has the struct of old" do
    # A reference of another node, in the external format.
    far = :erlang.binary_to_term(<<131, 90, 1::16, 119, 3, "a@b", 1::32, 1::32>>)
    fields = %{port: hd(Port.list()), id: 1, frame: "frame", max_frame_bytes: 1_000}
    tool_call = struct!(Invocation, fields)
    old = Map.put(fields, :__struct__, DSPex.PythonBridge.ToolCall)
    assert NodeMessage.tool_call(tool_call, far) == {far, :tool_call, old}
    assert NodeMessage.read_tool_call(old) == tool_call
  end

  test "what is called on other nodes keeps its names and arguments" do
    opts = Keyword.merge(fake_opts("who"), name: @pool, cluster: "#{@pool}", pool_size: 1)
    start_supervised!({Pool, opts})
    eventually(fn -> match?([%{state: :running}], Pool.status(@pool).peers) end)
    {:ok, body} = Protocol.encode_body(:who, %{})
    # The other node is this one.
    others = :ets.new(:others, [])
    :ets.insert(others, {self(), 1, @pool})
    request = Pool.Request.new(body, nil, System.monotonic_time(:millisecond), 5_000)
    :erlang.trace(self(), true, [:procs, :set_on_spawn])

    assert {:done, {:ok, _id, %{"pid" => _}, _meta}} =
             RemoteCall.run(%{Handle.fetch(@pool) | others: others}, request, %Pool.Attempt{})

    # The first function of a process that `spawn_request` starts.
    assert_receive {:trace, _courier, :spawn, _proxy, {_erts, _init, [{module, :proxy, args}]}}
    assert module == DSPex.PythonBridge.Pool.Remote
    assert [_courier, @pool, %{deadline: left} = sent, nil] = args
    assert left in 0..5_000

    packed = %{
      __struct__: DSPex.PythonBridge.Pool.Request,
      body: body,
      program: nil,
      deadline: left,
      deaths: 0,
      passed: [],
      passed_nodes: [],
      overloaded: nil,
      repaired: []
    }

    assert sent == packed
    DSPex.PythonBridge.Pool.Remote.proxy(self(), @pool, packed, nil)
    assert_receive {:served, {:done, {:ok, _id, %{"pid" => _}, _meta}}}

    # With chunks, tools or retry: false the body comes with a request, as to a bridge.
    how = %{retry: false, of_a_later_version: 1}
    unsent = %{packed | body: ""}
    relay = DSPex.PythonBridge.Pool.Remote.open(self(), @pool, unsent, nil, how)
    ref = :erlang.alias()
    takes = %{stream?: true, tools?: true}
    send(relay, {:request, ref, self(), 5_000, body, {:caller, 0, nil}, takes})
    assert_receive {^ref, {:served, {:done, {:ok, _id, %{"pid" => _}, _meta}}}}, 5_000
    DSPex.PythonBridge.Pool.Remote.proxy(self(), :nobody, packed, nil)
    assert_receive {:served, {:nobody, 0, nil}}

    coordinator = Process.whereis(Handle.coordinator(@pool))
    assert {:error, _not_a_bridge} = DSPex.PythonBridge.Caller.find(coordinator)
    assert %{node: _, time: _, peers: [_ | _]} = Top.snapshot([])
  end
end
