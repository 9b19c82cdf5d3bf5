defmodule DSPex.PythonBridge.PoolSlotsTest do
  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Pool.Slots

  defp ready(size) do
    slots = Slots.new(size)
    for index <- Slots.indexes(slots), do: Slots.put_state(slots, index, :ready)
    slots
  end

  defp take(slots, index, times), do: for(_ <- 1..times//1, do: Slots.take(slots, index))

  test "picks none of those that are down, lent or excluded" do
    slots = Slots.new(4)
    assert Slots.pick(slots) == nil
    refute Slots.any?(slots)
    for index <- [2, 3, 4], do: Slots.put_state(slots, index, :ready)
    Slots.lend(slots, 3)
    assert Slots.lent?(slots, 3) and not Slots.lent?(slots, 2)
    assert for(_ <- 1..20, uniq: true, do: Slots.pick(slots, [4])) == [2]
    assert Slots.pick(slots, [2, 4]) == nil
    Slots.unlend(slots, 3)
    assert Slots.pick(slots, [2, 4]) == 3
    Slots.put_state(slots, 3, :down)
    assert Slots.pick(slots, [2, 4]) == nil
  end

  test "picks the least busy; those that are equally busy take turns" do
    slots = ready(3)
    take(slots, 1, 3)
    take(slots, 3, 1)
    assert Slots.pick(slots) == 2
    take(slots, 2, 2)
    assert Slots.pick(slots) == 3
    take(slots, 2, 1)
    take(slots, 3, 2)
    assert Enum.sort(for(_ <- 1..3, do: Slots.pick(slots))) == [1, 2, 3]
    assert for(index <- 1..3, do: Slots.busy(slots, index)) == [3, 3, 3]
  end

  test "picks the one that has been up longest, if asked to, however busy" do
    slots = Slots.new(3)
    for index <- [2, 3, 1], do: Slots.put_state(slots, index, :ready)
    take(slots, 2, 5)
    assert Slots.pick(slots, [], :longest_up) == 2
    Slots.put_state(slots, 2, :down)
    Slots.put_state(slots, 2, :ready)
    assert Slots.pick(slots, [], :longest_up) == 3
    assert Slots.pick(slots, [3], :longest_up) == 1
  end

  test "picks one that is silent last, however busy the others are, and however long it has been up" do
    slots = Slots.new(3)
    for index <- [1, 2, 3], do: Slots.put_state(slots, index, :ready)
    Slots.silent(slots, 1)
    take(slots, 2, 1_000)
    take(slots, 3, 1_001)
    assert for(_ <- 1..5, uniq: true, do: Slots.pick(slots)) == [2]
    assert Slots.pick(slots, [2]) == 3
    assert Slots.pick(slots, [2, 3]) == 1
    assert Slots.pick(slots, [], :longest_up) == 2
    assert Slots.pick(slots, [2, 3], :longest_up) == 1
    assert Slots.any?(slots)
    Slots.heard(slots, 1)
    assert Slots.pick(slots) == 1
    assert Slots.pick(slots, [], :longest_up) == 1
  end

  test "of those that are silent it picks the least busy" do
    slots = ready(2)
    for index <- [1, 2], do: Slots.silent(slots, index)
    take(slots, 1, 2)
    take(slots, 2, 1)
    assert for(_ <- 1..3, uniq: true, do: Slots.pick(slots)) == [2]
  end

  test "silence touches no count, and ends with a new peer and with a new life of the bridge" do
    slots = ready(2)
    life = Slots.take(slots, 1)
    for _ <- 1..2, do: Slots.silent(slots, 1)
    assert Slots.busy(slots, 1) == 1
    assert Slots.take(slots, 1) == life
    Slots.done(slots, 1)
    for _ <- 1..3, do: Slots.give_back(slots, 1, life)
    assert Slots.busy(slots, 1) == 0
    assert Slots.pick(slots, [2]) == 1
    assert for(_ <- 1..3, uniq: true, do: Slots.pick(slots)) == [2]
    Slots.put_state(slots, 1, :ready)
    take(slots, 2, 1)
    assert Slots.pick(slots) == 1

    Slots.silent(slots, 1)
    Slots.reset(slots, 1)
    Slots.put_state(slots, 1, :ready)
    assert Slots.pick(slots) == 1
    assert Slots.take(slots, 1) == life + 1
    for _ <- 1..2, do: Slots.heard(slots, 1)
    assert Slots.busy(slots, 1) == 1
  end

  test "calls that are over are counted out, and never below none" do
    slots = ready(2)
    take(slots, 1, 2)
    Slots.done(slots, 1)
    assert Slots.busy(slots, 1) == 1
    for _ <- 1..3, do: Slots.done(slots, 1)
    assert Slots.busy(slots, 1) == 0
    assert Slots.take(slots, 1) == Slots.take(slots, 2)
  end

  test "a bridge that starts again has no calls and no peer" do
    slots = ready(2)
    take(slots, 1, 2)
    take(slots, 2, 1)
    Slots.reset(slots, 1)
    assert Slots.busy(slots, 1) == 0
    assert Slots.busy(slots, 2) == 1
    assert Slots.pick(slots, [2]) == nil
  end

  test "a call that never reached its bridge is given back, unless that has started again" do
    slots = ready(1)
    life = Slots.take(slots, 1)
    Slots.give_back(slots, 1, life)
    assert Slots.busy(slots, 1) == 0

    # Counted before the bridge's death: its next life has not got it.
    life = Slots.take(slots, 1)
    Slots.reset(slots, 1)
    Slots.take(slots, 1)
    Slots.give_back(slots, 1, life)
    assert Slots.busy(slots, 1) == 1

    # Counted after it, for a process that was known before it.
    life = Slots.take(slots, 1)
    Slots.give_back(slots, 1, life)
    assert Slots.busy(slots, 1) == 1
  end

  test "a slot counts as changed when it has become ready again" do
    slots = Slots.new(2)
    refute Slots.any?(slots, [{1, 0}])
    Slots.put_state(slots, 1, :ready)
    since = Slots.ready_since(slots, 1)
    assert Slots.any?(slots, [{1, 0}])
    refute Slots.any?(slots, [{1, since}])
    Slots.put_state(slots, 1, :down)
    assert Slots.ready_since(slots, 1) == 0
    Slots.put_state(slots, 1, :ready)
    assert Slots.any?(slots, [{1, since}])
  end

  test "many processes count at once, and no count is lost" do
    slots = ready(3)

    1..8
    |> Enum.map(fn _ ->
      Task.async(fn ->
        for _ <- 1..2_000 do
          index = Slots.pick(slots)
          Slots.take(slots, index)
          Slots.done(slots, index)
          Slots.take(slots, 1)
        end
      end)
    end)
    |> Task.await_many(30_000)

    assert for(index <- 1..3, do: Slots.busy(slots, index)) == [16_000, 0, 0]
  end
end
