defmodule DSPex.PythonBridge.Pool.LoadCountersTest do
  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Pool.LoadCounters

  defp ready(size) do
    counters = LoadCounters.new(size)

    for index <- LoadCounters.indexes(counters),
        do: LoadCounters.put_state(counters, index, :ready)

    counters
  end

  defp picks(counters, times, excluded \\ []),
    do: Enum.sort(for _ <- 1..times, uniq: true, do: LoadCounters.pick(counters, excluded))

  test "only ready ones are picked that are not excluded" do
    counters = LoadCounters.new(4)
    assert LoadCounters.pick(counters) == nil
    refute LoadCounters.any?(counters)
    for index <- [2, 3, 4], do: LoadCounters.put_state(counters, index, :ready)
    assert picks(counters, 20, [3, 4]) == [2]
    LoadCounters.put_state(counters, 3, :down)
    assert LoadCounters.pick(counters, [2, 4]) == nil
  end

  test "the least busy one is picked, equally busy ones in turn, one that is silent last" do
    counters = ready(3)
    LoadCounters.put_calls(counters, 1, 3, false)
    LoadCounters.put_calls(counters, 2, 2, false)
    LoadCounters.put_calls(counters, 3, 1, false)
    assert picks(counters, 5) == [3]
    for index <- 1..3, do: LoadCounters.put_calls(counters, index, 3, false)
    assert picks(counters, 3) == [1, 2, 3]
    LoadCounters.put_calls(counters, 1, 2, true)
    assert LoadCounters.busy(counters, 1) == 2
    assert picks(counters, 5) == [2, 3]
    assert LoadCounters.pick(counters, [2, 3]) == 1
  end

  test "a call counts before its bridge has it, which then says how many it has" do
    counters = ready(3)
    LoadCounters.put_calls(counters, 1, 4, false)
    for _ <- 1..8, do: LoadCounters.sending(counters, LoadCounters.pick(counters))
    assert for(index <- 1..3, do: LoadCounters.busy(counters, index)) == [4, 4, 4]
    # One whose caller was killed before it was sent is forgotten.
    LoadCounters.put_calls(counters, 2, 1, false)
    assert LoadCounters.busy(counters, 2) == 1
  end

  test "one that has been passed counts again when it is ready anew" do
    counters = LoadCounters.new(2)
    LoadCounters.put_state(counters, 1, :ready)
    since = LoadCounters.ready_since(counters, 1)
    assert LoadCounters.still(counters, [{1, since}]) == [1]
    refute LoadCounters.any?(counters, [{1, since}])
    LoadCounters.put_state(counters, 1, :down)
    assert LoadCounters.ready_since(counters, 1) == 0
    LoadCounters.put_state(counters, 1, :ready)
    assert LoadCounters.any?(counters, [{1, since}])
    assert LoadCounters.still(counters, [{1, since}]) == []
  end
end
