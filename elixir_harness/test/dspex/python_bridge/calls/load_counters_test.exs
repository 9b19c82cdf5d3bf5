defmodule DSPex.PythonBridge.Calls.LoadCountersTest do
  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Calls.LoadCounters

  defp ready(size) do
    slots = LoadCounters.new(size)
    for index <- LoadCounters.indexes(slots), do: LoadCounters.put_state(slots, index, :ready)
    slots
  end

  defp take(slots, index, times), do: for(_ <- 1..times//1, do: LoadCounters.take(slots, index))

  test "picks none of those that are down, lent or excluded" do
    slots = LoadCounters.new(4)
    assert LoadCounters.pick(slots) == nil
    refute LoadCounters.any?(slots)
    for index <- [2, 3, 4], do: LoadCounters.put_state(slots, index, :ready)
    LoadCounters.lend(slots, 3)
    assert LoadCounters.lent?(slots, 3) and not LoadCounters.lent?(slots, 2)
    assert for(_ <- 1..20, uniq: true, do: LoadCounters.pick(slots, [4])) == [2]
    assert LoadCounters.pick(slots, [2, 4]) == nil
    LoadCounters.unlend(slots, 3)
    assert LoadCounters.pick(slots, [2, 4]) == 3
    LoadCounters.put_state(slots, 3, :down)
    assert LoadCounters.pick(slots, [2, 4]) == nil
  end

  test "picks the least busy; those that are equally busy take turns" do
    slots = ready(3)
    take(slots, 1, 3)
    take(slots, 3, 1)
    assert LoadCounters.pick(slots) == 2
    take(slots, 2, 2)
    assert LoadCounters.pick(slots) == 3
    take(slots, 2, 1)
    take(slots, 3, 2)
    assert Enum.sort(for(_ <- 1..3, do: LoadCounters.pick(slots))) == [1, 2, 3]
    assert for(index <- 1..3, do: LoadCounters.busy(slots, index)) == [3, 3, 3]
  end

  test "picks the one that has been up longest, if asked to, however busy" do
    slots = LoadCounters.new(3)
    for index <- [2, 3, 1], do: LoadCounters.put_state(slots, index, :ready)
    take(slots, 2, 5)
    assert LoadCounters.pick(slots, [], :longest_up) == 2
    LoadCounters.put_state(slots, 2, :down)
    LoadCounters.put_state(slots, 2, :ready)
    assert LoadCounters.pick(slots, [], :longest_up) == 3
    assert LoadCounters.pick(slots, [3], :longest_up) == 1
  end

  test "picks one that is silent last, however busy the others are, and however long it has been up" do
    slots = LoadCounters.new(3)
    for index <- [1, 2, 3], do: LoadCounters.put_state(slots, index, :ready)
    LoadCounters.silent(slots, 1)
    take(slots, 2, 1_000)
    take(slots, 3, 1_001)
    assert for(_ <- 1..5, uniq: true, do: LoadCounters.pick(slots)) == [2]
    assert LoadCounters.pick(slots, [2]) == 3
    assert LoadCounters.pick(slots, [2, 3]) == 1
    assert LoadCounters.pick(slots, [], :longest_up) == 2
    assert LoadCounters.pick(slots, [2, 3], :longest_up) == 1
    assert LoadCounters.any?(slots)
    LoadCounters.heard(slots, 1)
    assert LoadCounters.pick(slots) == 1
    assert LoadCounters.pick(slots, [], :longest_up) == 1
  end

  test "of those that are silent it picks the least busy" do
    slots = ready(2)
    for index <- [1, 2], do: LoadCounters.silent(slots, index)
    take(slots, 1, 2)
    take(slots, 2, 1)
    assert for(_ <- 1..3, uniq: true, do: LoadCounters.pick(slots)) == [2]
  end

  test "silence touches no count, and ends with a new peer and with a new life of the bridge" do
    slots = ready(2)
    life = LoadCounters.take(slots, 1)
    for _ <- 1..2, do: LoadCounters.silent(slots, 1)
    assert LoadCounters.busy(slots, 1) == 1
    assert LoadCounters.take(slots, 1) == life
    LoadCounters.done(slots, 1)
    for _ <- 1..3, do: LoadCounters.give_back(slots, 1, life)
    assert LoadCounters.busy(slots, 1) == 0
    assert LoadCounters.pick(slots, [2]) == 1
    assert for(_ <- 1..3, uniq: true, do: LoadCounters.pick(slots)) == [2]
    LoadCounters.put_state(slots, 1, :ready)
    take(slots, 2, 1)
    assert LoadCounters.pick(slots) == 1

    LoadCounters.silent(slots, 1)
    LoadCounters.reset(slots, 1)
    LoadCounters.put_state(slots, 1, :ready)
    assert LoadCounters.pick(slots) == 1
    assert LoadCounters.take(slots, 1) == life + 1
    for _ <- 1..2, do: LoadCounters.heard(slots, 1)
    assert LoadCounters.busy(slots, 1) == 1
  end

  test "calls that are over are counted out, and never below none" do
    slots = ready(2)
    take(slots, 1, 2)
    LoadCounters.done(slots, 1)
    assert LoadCounters.busy(slots, 1) == 1
    for _ <- 1..3, do: LoadCounters.done(slots, 1)
    assert LoadCounters.busy(slots, 1) == 0
    assert LoadCounters.take(slots, 1) == LoadCounters.take(slots, 2)
  end

  test "a bridge that starts again has no calls and no peer" do
    slots = ready(2)
    take(slots, 1, 2)
    take(slots, 2, 1)
    LoadCounters.reset(slots, 1)
    assert LoadCounters.busy(slots, 1) == 0
    assert LoadCounters.busy(slots, 2) == 1
    assert LoadCounters.pick(slots, [2]) == nil
  end

  test "a call that never reached its bridge is given back, unless that has started again" do
    slots = ready(1)
    life = LoadCounters.take(slots, 1)
    LoadCounters.give_back(slots, 1, life)
    assert LoadCounters.busy(slots, 1) == 0

    # Counted before the bridge's death: its next life has not got it.
    life = LoadCounters.take(slots, 1)
    LoadCounters.reset(slots, 1)
    LoadCounters.take(slots, 1)
    LoadCounters.give_back(slots, 1, life)
    assert LoadCounters.busy(slots, 1) == 1

    # Counted after it, for a process that was known before it.
    life = LoadCounters.take(slots, 1)
    LoadCounters.give_back(slots, 1, life)
    assert LoadCounters.busy(slots, 1) == 1
  end

  test "a slot counts as changed when it has become ready again" do
    slots = LoadCounters.new(2)
    refute LoadCounters.any?(slots, [{1, 0}])
    LoadCounters.put_state(slots, 1, :ready)
    since = LoadCounters.ready_since(slots, 1)
    assert LoadCounters.any?(slots, [{1, 0}])
    refute LoadCounters.any?(slots, [{1, since}])
    LoadCounters.put_state(slots, 1, :down)
    assert LoadCounters.ready_since(slots, 1) == 0
    LoadCounters.put_state(slots, 1, :ready)
    assert LoadCounters.any?(slots, [{1, since}])
  end

  test "many processes count at once, and no count is lost" do
    slots = ready(3)

    1..8
    |> Enum.map(fn _ ->
      Task.async(fn ->
        for _ <- 1..2_000 do
          index = LoadCounters.pick(slots)
          LoadCounters.take(slots, index)
          LoadCounters.done(slots, index)
          LoadCounters.take(slots, 1)
        end
      end)
    end)
    |> Task.await_many(30_000)

    assert for(index <- 1..3, do: LoadCounters.busy(slots, index)) == [16_000, 0, 0]
  end
end
