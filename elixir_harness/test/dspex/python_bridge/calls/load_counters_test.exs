defmodule DSPex.PythonBridge.Calls.LoadCountersTest do
  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Calls.LoadCounters

  defp ready(size) do
    counters = LoadCounters.new(size)

    for index <- LoadCounters.indexes(counters),
        do: LoadCounters.put_state(counters, index, :ready)

    counters
  end

  defp take(counters, index, times),
    do: for(_ <- 1..times//1, do: LoadCounters.take(counters, index))

  test "picks no slot that is down, checked out or excluded" do
    counters = LoadCounters.new(4)
    assert LoadCounters.pick(counters) == nil
    refute LoadCounters.any?(counters)
    for index <- [2, 3, 4], do: LoadCounters.put_state(counters, index, :ready)
    LoadCounters.check_out(counters, 3)
    assert LoadCounters.checked_out?(counters, 3) and not LoadCounters.checked_out?(counters, 2)
    assert for(_ <- 1..20, uniq: true, do: LoadCounters.pick(counters, [4])) == [2]
    assert LoadCounters.pick(counters, [2, 4]) == nil
    LoadCounters.check_in(counters, 3)
    assert LoadCounters.pick(counters, [2, 4]) == 3
    LoadCounters.put_state(counters, 3, :down)
    assert LoadCounters.pick(counters, [2, 4]) == nil
  end

  test "picks the least busy; equally busy ones are used round-robin" do
    counters = ready(3)
    take(counters, 1, 3)
    take(counters, 3, 1)
    assert LoadCounters.pick(counters) == 2
    take(counters, 2, 2)
    assert LoadCounters.pick(counters) == 3
    take(counters, 2, 1)
    take(counters, 3, 2)
    assert Enum.sort(for(_ <- 1..3, do: LoadCounters.pick(counters))) == [1, 2, 3]
    assert for(index <- 1..3, do: LoadCounters.busy(counters, index)) == [3, 3, 3]
  end

  test "picks the one that has been up longest, if asked to, however busy" do
    counters = LoadCounters.new(3)
    for index <- [2, 3, 1], do: LoadCounters.put_state(counters, index, :ready)
    take(counters, 2, 5)
    assert LoadCounters.pick(counters, [], :longest_up) == 2
    LoadCounters.put_state(counters, 2, :down)
    LoadCounters.put_state(counters, 2, :ready)
    assert LoadCounters.pick(counters, [], :longest_up) == 3
    assert LoadCounters.pick(counters, [3], :longest_up) == 1
  end

  test "picks one that is silent last, however busy the others are, and however long it has been up" do
    counters = LoadCounters.new(3)
    for index <- [1, 2, 3], do: LoadCounters.put_state(counters, index, :ready)
    LoadCounters.silent(counters, 1)
    take(counters, 2, 1_000)
    take(counters, 3, 1_001)
    assert for(_ <- 1..5, uniq: true, do: LoadCounters.pick(counters)) == [2]
    assert LoadCounters.pick(counters, [2]) == 3
    assert LoadCounters.pick(counters, [2, 3]) == 1
    assert LoadCounters.pick(counters, [], :longest_up) == 2
    assert LoadCounters.pick(counters, [2, 3], :longest_up) == 1
    assert LoadCounters.any?(counters)
    LoadCounters.heard(counters, 1)
    assert LoadCounters.pick(counters) == 1
    assert LoadCounters.pick(counters, [], :longest_up) == 1
  end

  test "of those that are silent it picks the least busy" do
    counters = ready(2)
    for index <- [1, 2], do: LoadCounters.silent(counters, index)
    take(counters, 1, 2)
    take(counters, 2, 1)
    assert for(_ <- 1..3, uniq: true, do: LoadCounters.pick(counters)) == [2]
  end

  test "silence touches no count, and ends with a new peer and with a new life of the bridge" do
    counters = ready(2)
    life = LoadCounters.take(counters, 1)
    for _ <- 1..2, do: LoadCounters.silent(counters, 1)
    assert LoadCounters.busy(counters, 1) == 1
    assert LoadCounters.take(counters, 1) == life
    LoadCounters.done(counters, 1)
    for _ <- 1..3, do: LoadCounters.give_back(counters, 1, life)
    assert LoadCounters.busy(counters, 1) == 0
    assert LoadCounters.pick(counters, [2]) == 1
    assert for(_ <- 1..3, uniq: true, do: LoadCounters.pick(counters)) == [2]
    LoadCounters.put_state(counters, 1, :ready)
    take(counters, 2, 1)
    assert LoadCounters.pick(counters) == 1

    LoadCounters.silent(counters, 1)
    LoadCounters.reset(counters, 1)
    LoadCounters.put_state(counters, 1, :ready)
    assert LoadCounters.pick(counters) == 1
    assert LoadCounters.take(counters, 1) == life + 1
    for _ <- 1..2, do: LoadCounters.heard(counters, 1)
    assert LoadCounters.busy(counters, 1) == 1
  end

  test "calls that are over are counted out, and never below none" do
    counters = ready(2)
    take(counters, 1, 2)
    LoadCounters.done(counters, 1)
    assert LoadCounters.busy(counters, 1) == 1
    for _ <- 1..3, do: LoadCounters.done(counters, 1)
    assert LoadCounters.busy(counters, 1) == 0
    assert LoadCounters.take(counters, 1) == LoadCounters.take(counters, 2)
  end

  test "a bridge that starts again has no calls and no peer" do
    counters = ready(2)
    take(counters, 1, 2)
    take(counters, 2, 1)
    LoadCounters.reset(counters, 1)
    assert LoadCounters.busy(counters, 1) == 0
    assert LoadCounters.busy(counters, 2) == 1
    assert LoadCounters.pick(counters, [2]) == nil
  end

  test "a call that never reached its bridge is given back, unless that has started again" do
    counters = ready(1)
    life = LoadCounters.take(counters, 1)
    LoadCounters.give_back(counters, 1, life)
    assert LoadCounters.busy(counters, 1) == 0

    # Counted before the bridge's death: its next life has not got it.
    life = LoadCounters.take(counters, 1)
    LoadCounters.reset(counters, 1)
    LoadCounters.take(counters, 1)
    LoadCounters.give_back(counters, 1, life)
    assert LoadCounters.busy(counters, 1) == 1

    # Counted after it, for a process that was known before it.
    life = LoadCounters.take(counters, 1)
    LoadCounters.give_back(counters, 1, life)
    assert LoadCounters.busy(counters, 1) == 1
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

  test "many processes count at once, and no count is lost" do
    counters = ready(3)

    1..8
    |> Enum.map(fn _ ->
      Task.async(fn ->
        for _ <- 1..2_000 do
          index = LoadCounters.pick(counters)
          LoadCounters.take(counters, index)
          LoadCounters.done(counters, index)
          LoadCounters.take(counters, 1)
        end
      end)
    end)
    |> Task.await_many(30_000)

    assert for(index <- 1..3, do: LoadCounters.busy(counters, index)) == [16_000, 0, 0]
  end
end
