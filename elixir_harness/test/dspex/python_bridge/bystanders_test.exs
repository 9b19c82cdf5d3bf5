defmodule DSPex.PythonBridge.BystandersTest do
  @moduledoc """
  After each kind of fault an unrelated call is answered within a second of a peer being up, which has to import DSPy
  first: what has happened to others holds nobody. (For what becomes of those that the fault has met, see bridge/recovery.)
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Monitor}

  @moduletag :tmp_dir
  @moduletag timeout: 180_000
  @within_ms 1_000

  # Unrelated calls are of a program `qa`.
  defp create(bridge, id, type) do
    args = %{id: id, signature: "question -> answer", program_type: type}
    {:ok, %{"status" => "created"}} = Bridge.call(bridge, :create_program, args, 30_000)
  end

  defp execute(bridge, id, question, timeout \\ 90_000) do
    args = %{program_id: id, inputs: %{question: question}}
    Bridge.call(bridge, :execute_program, args, timeout)
  end

  defp os_pid(bridge), do: Bridge.get_status(bridge).os_pid

  # Calls that the peer has.
  defp in_flight(bridge, dir, count, seconds) do
    before = noted(dir, "slow")
    tasks = for _ <- 1..count, do: Task.async(fn -> execute(bridge, "slow", "#{seconds}") end)
    eventually(fn -> noted(dir, "slow") == before + count end, 20_000)
    tasks
  end

  # One that comes during the fault, and one that comes when a peer is up again. `gone`: the peer that ends.
  defp assert_served(bridge, gone, call) do
    during = Task.async(fn -> {call.(), now()} end)

    eventually(
      fn ->
        status = Bridge.get_status(bridge)
        status.state == :running and status.os_pid != gone
      end,
      90_000
    )

    # DSPy is imported when a program is created. (Fakes answer at once.)
    args = %{id: "probe", signature: "question -> answer"}
    {:ok, _} = Bridge.call(bridge, :create_program, args, 60_000)
    since = now()
    assert_quick(call)
    assert {{:ok, _}, at} = Task.await(during, 90_000)
    assert at - since < @within_ms
  end

  defp assert_quick(call) do
    {ms, answer} = timed(call)
    assert {:ok, _} = answer
    assert ms < @within_ms
  end

  defp now, do: System.monotonic_time(:millisecond)

  describe "Python is killed" do
    defp killed(dir, deaths, count, opts) do
      bridge = start_and_wait(host_opts(dir, opts))
      create(bridge, "slow", "host:Slow")
      create(bridge, "qa", "predict")
      slow = in_flight(bridge, dir, count, 2)

      for death <- 1..deaths do
        gone = os_pid(bridge)
        kill(gone)
        assert_served(bridge, gone, fn -> execute(bridge, "qa", "?") end)
        # Those of the death before are at the peer again, or wait for each other.
        if death < deaths, do: eventually(fn -> noted(dir, "slow") > count * death end)
      end

      # While the suspects are tried, too.
      for _ <- 1..10, do: assert_quick(fn -> execute(bridge, "qa", "?") end)
      for answer <- Task.await_many(slow, 60_000), do: assert({:ok, %{"answer" => "2"}} = answer)
    end

    test "once with 5 calls of 2 s, on their last retry", %{tmp_dir: dir} do
      killed(dir, 1, 5, max_retries: 1)
    end

    @tag :slow
    # Past 256, calls are not held, but wait for a slot of the peer.
    test "three times with 250 calls of 2 s", %{tmp_dir: dir} do
      killed(dir, 3, 250, [])
    end
  end

  describe "a call kills Python" do
    defp deadly(dir, count, seconds, times, opts) do
      bridge = start_and_wait(host_opts(dir, opts))
      create(bridge, "slow", "host:Slow")
      create(bridge, "deadly", "host:Deadly")
      create(bridge, "qa", "predict")
      slow = in_flight(bridge, dir, count, seconds)
      killer = Task.async(fn -> execute(bridge, "deadly", "0") end)
      # One new call after the other, until the killer is given up: none fails.
      assert asked(bridge, killer) > 0
      for answer <- Task.await_many(slow, 60_000), do: assert({:ok, _} = answer)
      assert noted(dir, "deadly") in times
    end

    defp asked(bridge, killer, count \\ 0) do
      assert {:ok, _} = execute(bridge, "qa", "?")

      case Task.yield(killer, 0) do
        nil -> asked(bridge, killer, count + 1)
        {:ok, answer} -> if answer == {:error, :python_process_died}, do: count + 1
      end
    end

    test "each time, beside 5 calls of 2 s on their last retry", %{tmp_dir: dir} do
      deadly(dir, 5, 2, 2..2, max_retries: 1)
    end

    @tag :slow
    # Twice with all others, then in a group that gets smaller, and at last alone.
    test "each time, beside 20 calls of 2 s that are suspects, too", %{tmp_dir: dir} do
      deadly(dir, 20, 2, 4..8, [])
    end
  end

  describe "Python does not die, but" do
    # Of each fake that answers `echo`, unless it has been told otherwise.
    defp monitored(opts) do
      bridge = start_and_wait(opts)
      monitor = [name: nil, bridge: bridge, interval: 100, timeout: 200, max_failures: 2]
      start_supervised!({Monitor, monitor})
      bridge
    end

    test "stops with 256 calls in flight", %{tmp_dir: dir} do
      bridge = monitored(fake_opts("holds", env: %{"FAKE_FILE" => Path.join(dir, "go")}))
      for _ <- 1..256, do: Bridge.cast(bridge, :hold, %{})
      eventually(fn -> Bridge.get_status(bridge).pending >= 256 end)
      gone = os_pid(bridge)
      signal("STOP", gone)
      assert_served(bridge, gone, fn -> Bridge.call(bridge, :ping, %{}, 20_000) end)
    end
  end

  describe "callers" do
    test "256 exit, or are out of time", %{tmp_dir: dir} do
      bridge = start_and_wait(host_opts(dir, []))
      create(bridge, "slow", "host:Slow")
      create(bridge, "qa", "predict")
      slow = in_flight(bridge, dir, 128, 60)
      late = for _ <- 1..128, do: Task.async(fn -> execute(bridge, "slow", "60", 500) end)
      for task <- slow, do: Task.shutdown(task, :brutal_kill)
      assert_quick(fn -> execute(bridge, "qa", "?") end)
      for task <- late, do: assert(Task.await(task) == {:error, :timeout})
      assert_quick(fn -> execute(bridge, "qa", "?") end)
    end
  end
end
