defmodule DSPex.PythonBridge.Bridge.NameTest do
  @moduledoc """
  A bridge that ends gives its name back before anything else: tests that each start one under the default name, linked to
  the test's process, follow one another.
  """

  # The default name and the application's configuration.
  use ExUnit.Case, async: false

  alias DSPex.PythonBridge.Bridge
  alias DSPex.Test.FakePeer

  test "a bridge whose starter lives keeps its name" do
    opts = Keyword.delete(FakePeer.opts(:echo), :name)
    {:ok, bridge} = Bridge.start_link(opts)
    {us, result} = :timer.tc(fn -> Bridge.start_link(opts) end)
    assert result == {:error, {:already_started, bridge}}
    assert us < 500_000
  end

  test "the next one starts as soon as the process that had started one is gone, 200 times" do
    opts = Keyword.delete(FakePeer.opts(:echo), :name)

    for _ <- 1..200 do
      {pid, monitor} = spawn_monitor(fn -> {:ok, _} = Bridge.start_link(opts) end)
      assert_receive {:DOWN, ^monitor, :process, ^pid, :normal}
    end
  end
end
