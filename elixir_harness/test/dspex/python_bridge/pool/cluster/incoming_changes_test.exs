defmodule DSPex.PythonBridge.Pool.Cluster.IncomingChangesTest do
  @moduledoc """
  Changes of other nodes that come while changes of this one are on their way to its bridges: what these are sent, and in
  which order. The test is the only bridge.
  """

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.Pool.{Handle, Options, ProgramChanges}
  alias DSPex.PythonBridge.Pool.Cluster.IncomingChanges
  alias DSPex.PythonBridge.Programs.Store

  setup do
    {:ok, options} = Options.new([pool_size: 1], __MODULE__)
    handle = Handle.new(options)
    Process.register(self(), Handle.bridge(handle, 1))
    %{handle: handle, changes: ProgramChanges.new(handle)}
  end

  # A caller on this node creates a program, or removes some.
  defp ask(changes, change, body) do
    request = %Request{ref: make_ref(), pid: self(), timeout: 0, body: body, change: change}
    {changes, []} = ProgramChanges.ask(changes, request)
    assert_receive {:request, %Request{change: change}}
    {change, changes}
  end

  test "a change that was made earlier is not the last that bridges make", context do
    earlier = {System.system_time(:microsecond) - 1_000_000, 1, :another}
    {{:create, "qa", later}, changes} = ask(context.changes, {:create, "qa", nil}, "later")

    {changes, _over} =
      IncomingChanges.adopt(changes, :nobody, {:create, "qa", earlier}, "earlier")

    assert_receive {:request, %Request{body: "earlier"}}
    assert_receive {:request, %Request{change: {:create, "qa", ^later}, body: "later"}}

    # The same for a removal: the creation has not been made yet.
    IncomingChanges.adopt(changes, :nobody, {:cleanup, ["qa"], put_elem(earlier, 1, 2)}, "")
    assert_receive {:request, %Request{change: {:cleanup, ["qa"], _stamp}}}
    assert_receive {:request, %Request{change: {:create, "qa", ^later}, body: "later"}}
    refute_received {:request, _another}
  end

  test "what a cleanup that no peer makes has removed is sent to the bridges again", context do
    Store.put(context.handle.programs, "qa", Store.stamp(), "body")
    {_cleanup, changes} = ask(context.changes, {:cleanup, ["qa"], nil}, "cleanup")
    assert Store.count(context.handle.programs) == 0

    ProgramChanges.expired(changes, 1)
    assert_receive {:request, %Request{change: {:create, "qa", _stamp}, body: "body"}}
    assert Store.count(context.handle.programs) == 1
  end
end
