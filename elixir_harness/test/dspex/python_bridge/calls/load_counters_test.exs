defmodule DSPex.PythonBridge.Calls.LoadCountersTest do
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers, only: [eventually: 1]

  alias DSPex.PythonBridge.Calls.LoadCounters

  defp ready(size) do
    counters = LoadCounters.new(size)

    for index <- LoadCounters.indexes(counters),
        do: LoadCounters.put_state(counters, index, :ready)

    counters
  end

  # Calls that are on their way.
  defp send_to(counters, index, times \\ 1),
    do: List.last(for(_ <- 1..times//1, do: LoadCounters.ticket(counters, index)))

  # They are no longer counted.
  defp wait_until_idle(counters, index),
    do: eventually(fn -> LoadCounters.busy(counters, index) == 0 end)

  test "picks no slot that is down or excluded" do
    counters = LoadCounters.new(4)
    assert LoadCounters.pick(counters) == nil
    refute LoadCounters.any?(counters)
    for index <- [2, 3, 4], do: LoadCounters.put_state(counters, index, :ready)
    assert for(_ <- 1..20, uniq: true, do: LoadCounters.pick(counters, [3, 4])) == [2]
    assert LoadCounters.pick(counters, [2, 4]) == 3
    LoadCounters.put_state(counters, 3, :down)
    assert LoadCounters.pick(counters, [2, 4]) == nil
  end

  test "picks the least busy; equally busy ones are used round-robin" do
    counters = ready(3)
    LoadCounters.put_calls(counters, 1, 3, false)
    LoadCounters.put_calls(counters, 3, 1, false)
    assert LoadCounters.pick(counters) == 2
    LoadCounters.put_calls(counters, 2, 2, false)
    assert LoadCounters.pick(counters) == 3
    for index <- 1..3, do: LoadCounters.put_calls(counters, index, 3, false)
    assert Enum.sort(for(_ <- 1..3, do: LoadCounters.pick(counters))) == [1, 2, 3]
  end

  test "calls that are on their way count, so that many at once are spread" do
    counters = ready(3)
    LoadCounters.put_calls(counters, 1, 4, false)
    for _ <- 1..8, do: counters |> LoadCounters.pick() |> then(&send_to(counters, &1))
    assert for(index <- 1..3, do: LoadCounters.busy(counters, index)) == [4, 4, 4]
  end

  test "one that has arrived no longer is on its way, nor are those before it" do
    counters = ready(2)
    send_to(counters, 1, 20)
    assert LoadCounters.busy(counters, 1) == 20
    ticket = send_to(counters, 1)
    LoadCounters.put_calls(counters, 1, 1, false)
    LoadCounters.arrived(counters, 1, ticket)
    assert LoadCounters.busy(counters, 1) == 1
    LoadCounters.put_calls(counters, 1, 0, false)
    assert Enum.sort(for(_ <- 1..2, do: LoadCounters.pick(counters))) == [1, 2]
  end

  test "those that never arrive are forgotten" do
    counters = ready(2)
    send_to(counters, 1, 20)
    assert LoadCounters.pick(counters) == 2
    wait_until_idle(counters, 1)
    # Nor do they count again with the next.
    LoadCounters.arrived(counters, 1, send_to(counters, 1))
    send_to(counters, 1)
    assert LoadCounters.busy(counters, 1) == 1
  end

  test "picks the one that has been up longest, if asked to, however busy" do
    counters = LoadCounters.new(3)
    for index <- [2, 3, 1], do: LoadCounters.put_state(counters, index, :ready)
    LoadCounters.put_calls(counters, 2, 5, false)
    assert LoadCounters.pick(counters, [], :longest_up) == 2
    LoadCounters.put_state(counters, 2, :down)
    LoadCounters.put_state(counters, 2, :ready)
    assert LoadCounters.pick(counters, [], :longest_up) == 3
    assert LoadCounters.pick(counters, [3], :longest_up) == 1
  end

  test "picks one that is silent last, however busy the others are, and however long it has been up" do
    counters = LoadCounters.new(3)
    for index <- [1, 2, 3], do: LoadCounters.put_state(counters, index, :ready)
    LoadCounters.put_calls(counters, 1, 0, true)
    LoadCounters.put_calls(counters, 2, 1_000, false)
    LoadCounters.put_calls(counters, 3, 1_001, false)
    assert for(_ <- 1..5, uniq: true, do: LoadCounters.pick(counters)) == [2]
    assert LoadCounters.pick(counters, [2]) == 3
    assert LoadCounters.pick(counters, [2, 3]) == 1
    assert LoadCounters.pick(counters, [], :longest_up) == 2
    assert LoadCounters.pick(counters, [2, 3], :longest_up) == 1
    assert LoadCounters.any?(counters)
    LoadCounters.put_calls(counters, 1, 0, false)
    assert LoadCounters.pick(counters) == 1
    assert LoadCounters.pick(counters, [], :longest_up) == 1
  end

  test "of those that are silent it picks the least busy" do
    counters = ready(2)
    LoadCounters.put_calls(counters, 1, 2, true)
    LoadCounters.put_calls(counters, 2, 1, true)
    assert LoadCounters.busy(counters, 1) == 2
    assert for(_ <- 1..3, uniq: true, do: LoadCounters.pick(counters)) == [2]
  end

  test "a bridge that starts again has no calls and no peer" do
    counters = ready(2)
    LoadCounters.put_calls(counters, 1, 2, true)
    send_to(counters, 1)
    LoadCounters.put_calls(counters, 2, 1, false)
    LoadCounters.reset(counters, 1)
    assert LoadCounters.busy(counters, 1) == 0
    assert LoadCounters.busy(counters, 2) == 1
    assert LoadCounters.pick(counters, [2]) == nil
    LoadCounters.put_state(counters, 1, :ready)
    assert LoadCounters.pick(counters) == 1
  end

  test "a slot counts as changed when it has become ready again" do
    counters = LoadCounters.new(2)
    refute LoadCounters.any?(counters, [{1, 0}])
    LoadCounters.put_state(counters, 1, :ready)
    since = LoadCounters.ready_since(counters, 1)
    assert LoadCounters.any?(counters, [{1, 0}])
    refute LoadCounters.any?(counters, [{1, since}])
    LoadCounters.put_state(counters, 1, :down)
    assert LoadCounters.ready_since(counters, 1) == 0
    LoadCounters.put_state(counters, 1, :ready)
    assert LoadCounters.any?(counters, [{1, since}])
  end

  test "no two calls have one ticket" do
    counters = ready(1)

    tickets =
      1..8
      |> Enum.map(fn _ -> Task.async(fn -> for _ <- 1..2_000, do: send_to(counters, 1) end) end)
      |> Task.await_many(30_000)

    assert tickets |> List.flatten() |> Enum.sort() == Enum.to_list(1..16_000)
  end
end
