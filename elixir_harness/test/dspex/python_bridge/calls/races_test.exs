defmodule DSPex.PythonBridge.Calls.RacesTest do
  @moduledoc "Two things at once, of which a bridge has to survive both: named after them."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Calls, Protocol}
  alias DSPex.PythonBridge.Calls.{Dispatcher, InFlight, Request}
  alias DSPex.PythonBridge.Programs.Store
  alias DSPex.Test.FakePeer

  @moduletag :tmp_dir

  defp start(opts), do: "slow" |> fake_opts(opts) |> start_and_wait()

  defp async(bridge, command, args, timeout \\ 30_000),
    do: Task.async(fn -> Bridge.call(bridge, command, args, timeout) end)

  defp slow(bridge, seconds, timeout \\ 30_000), do: async(bridge, :slow, %{s: seconds}, timeout)
  defp pending(bridge, n), do: eventually(fn -> Bridge.get_status(bridge).pending == n end)

  test "a restart while the peer makes a change: the next one makes it" do
    bridge = start([])
    create = async(bridge, :create_program, %{id: "p", wait: 1})
    pending(bridge, 1)
    restart = Task.async(fn -> Bridge.restart(bridge) end)
    assert Task.await(restart, 10_000) == :ok
    assert {:ok, %{"programs" => ["p"]}} = Bridge.call(bridge, :echo, %{}, 20_000)
    assert {:ok, _} = Task.await(create, 20_000)
  end

  test "stop while an old peer finishes, which dies: all is answered" do
    bridge = start(env: %{"DSPY_BRIDGE_DRAIN_MS" => "20000"})
    %{os_pid: old} = Bridge.get_status(bridge)
    again = slow(bridge, 1)
    pending(bridge, 1)
    assert Bridge.restart(bridge) == :ok
    kept = slow(bridge, 1)
    # Its timeout is one more thing to happen then.
    given_up = slow(bridge, 60, 800)
    pending(bridge, 3)
    stop = Task.async(fn -> Bridge.stop(bridge) end)
    eventually(fn -> Bridge.call(bridge, :ping) == {:error, :bridge_not_running} end)
    kill(old)
    assert Task.await(given_up) == {:error, :timeout}
    assert {:ok, _} = Task.await(kept)
    # By the peer that still serves.
    assert {:ok, _} = Task.await(again)
    assert Task.await(stop, 10_000) == :ok
  end

  test "a peer is replaced whose reply is on its way: the caller gets it, and the bridge goes on" do
    bridge = start_and_wait(FakePeer.opts(:silent))
    call = async(bridge, :echo, %{})
    pending(bridge, 1)
    peer = FakePeer.of(bridge)
    :sys.suspend(bridge)
    Bridge.Server.replace(bridge)
    # The bridge's own ping was 1.
    send(bridge, {peer, {:data, ~s({"id":2,"success":true,"result":{}})}})
    :sys.resume(bridge)
    assert Task.await(call) == {:ok, %{}}
    eventually(fn -> match?(%{state: :running, restarts: 1}, Bridge.get_status(bridge)) end)
    assert FakePeer.of(bridge) not in [nil, peer]
  end

  test "a cleanup is given up before it is written: the peer still hears of later ones" do
    table = Store.new()
    Store.put(table, "p", Store.stamp(), ~s(,"command":"create_program","args":{"id":"p"}}))
    port = Port.open({:spawn, "true"}, [:binary])
    Port.close(port)
    options = %{max_retries: 3, observer: nil}
    serving = InFlight.new(options, table) |> Dispatcher.attach(port) |> Dispatcher.serve(port)
    {:ok, body} = Protocol.encode_body(:cleanup, %{})
    ref = make_ref()
    change = {:cleanup, :all, nil}
    request = %Request{ref: ref, pid: self(), timeout: 1_000, body: body, change: change}
    in_flight = serving |> Calls.accept(request) |> Calls.abandon(ref)

    Store.remove(table, :all, Store.stamp())
    before = queued(in_flight, port)
    assert queued(Dispatcher.follow(in_flight, :all), port) == before + 1
  end

  defp queued(in_flight, port), do: :gb_trees.size(in_flight.send_queues[port].queue)
end
