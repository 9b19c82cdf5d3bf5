defmodule DSPex.PythonBridge.Calls.CrowdTest do
  @moduledoc """
  Tens of thousands of calls at once, and what happens to their peer meanwhile. The work for each of them
  must not depend on how many there are: where it does, these tests take minutes instead of a second.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Bridge

  @moduletag timeout: 30_000

  describe "in a bridge" do
    @describetag :tmp_dir
    @count 20_000

    # Its peer has that many calls, which it answers when `let_go` is called.
    defp crowded(dir, drain_ms \\ 60_000) do
      file = Path.join(dir, "go")
      env = %{"FAKE_FILE" => file, "DSPY_BRIDGE_DRAIN_MS" => "#{drain_ms}"}
      bridge = start_supervised!({Bridge, fake_opts("holds", env: env)})
      {:ok, _} = Bridge.call(bridge, :ping, %{}, 20_000)
      %{os_pid: old} = Bridge.get_status(bridge)
      test = self()

      callers =
        for _ <- 1..@count do
          spawn(fn -> send(test, {:answer, Bridge.call(bridge, :hold, %{}, :infinity)}) end)
        end

      eventually(fn -> Bridge.get_status(bridge).pending == @count end, 20_000)
      # It has read them all: frames are written in their order.
      {:ok, _} = Bridge.call(bridge, :ping, %{}, 20_000)
      %{bridge: bridge, callers: callers, old: old, let_go: fn -> File.write!(file, "") end}
    end

    defp answers(count), do: for(_ <- 1..count, uniq: true, do: answer())

    defp answer do
      assert_receive {:answer, answer}, 20_000
      answer
    end

    test "an old peer finishes all its calls, also while half of the callers die, and in a stop",
         %{
           tmp_dir: dir
         } do
      %{bridge: bridge} = context = crowded(dir)
      assert Bridge.restart(bridge) == :ok
      {dying, living} = Enum.split(context.callers, div(@count, 2))
      for pid <- dying, do: Process.exit(pid, :kill)
      eventually(fn -> Bridge.get_status(bridge).pending == length(living) end, 20_000)
      stop = Task.async(fn -> Bridge.stop(bridge) end)
      eventually(fn -> Bridge.call(bridge, :ping) == {:error, :bridge_not_running} end)
      context.let_go.()
      assert [{:ok, _}] = answers(length(living))
      assert Task.await(stop, 20_000) == :ok
    end

    test "after the death of their peer all are sent again; after a stop all get an error", %{
      tmp_dir: dir
    } do
      %{bridge: bridge} = context = crowded(dir, 0)
      kill(context.old)
      eventually(fn -> match?(%{restarts: 1, state: :running}, Bridge.get_status(bridge)) end)
      assert %{pending: @count} = Bridge.get_status(bridge)
      :ok = Bridge.stop(bridge)
      assert answers(@count) == [{:error, :bridge_not_running}]
    end
  end
end
