defmodule DSPex.PythonBridge.Calls.CrowdTest do
  @moduledoc """
  Tens of thousands of calls at once, and what happens to their peer meanwhile. The work for each of them
  must not depend on how many there are: where it does, this takes minutes instead of a second.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Bridge

  @count 20_000

  @tag :tmp_dir
  @tag timeout: 60_000
  test "an old peer finishes all its calls, also while half of the callers die, and in a stop", %{
    tmp_dir: dir
  } do
    file = Path.join(dir, "go")
    env = %{"FAKE_FILE" => file, "DSPY_BRIDGE_DRAIN_MS" => "60000"}
    bridge = start_and_wait(fake_opts("holds", env: env))
    test = self()
    call = fn -> send(test, {:answer, Bridge.call(bridge, :hold, %{}, :infinity)}) end
    callers = for _ <- 1..@count, do: spawn(call)
    eventually(fn -> Bridge.get_status(bridge).pending == @count end, 20_000)
    # It has read them all: frames are written in their order.
    {:ok, _} = Bridge.call(bridge, :ping, %{}, 20_000)

    assert Bridge.restart(bridge) == :ok
    {dying, living} = Enum.split(callers, div(@count, 2))
    for pid <- dying, do: Process.exit(pid, :kill)
    eventually(fn -> Bridge.get_status(bridge).pending == length(living) end, 20_000)
    stop = Task.async(fn -> Bridge.stop(bridge) end)
    eventually(fn -> Bridge.call(bridge, :ping) == {:error, :bridge_not_running} end)
    File.write!(file, "")
    for _ <- living, do: assert_receive({:answer, {:ok, _}}, 20_000)
    assert Task.await(stop, 20_000) == :ok
  end
end
