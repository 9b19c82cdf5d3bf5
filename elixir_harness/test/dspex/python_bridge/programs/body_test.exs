defmodule DSPex.PythonBridge.Programs.BodyTest do
  @moduledoc "What is read of a program's definition, and how long it is remembered."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Programs.{Body, Store}

  doctest Body

  test "what was read of a definition goes to no other node, and ends with it" do
    table = Store.new()
    stamp = Store.stamp()
    Store.put(table, "a", stamp, "body")
    exported = Store.export(table)
    test = self()
    read = fn body -> send(test, {:read, body}) && %{tools: ["search"]} end
    for _ <- 1..2, do: assert(Store.facts(table, "a", read) == %{tools: ["search"]})
    assert_received {:read, "body"}
    refute_received {:read, _}
    assert Store.export(table) == exported
    assert Store.definitions(table) == [{"a", stamp, "body"}]
    assert Store.count(table) == 1

    Store.put(table, "a", Store.stamp(), "newer")
    assert Store.facts(table, "a", fn "newer" -> %{} end) == %{}
    Store.remove(table, ["a"], Store.stamp())
    assert Store.facts(table, "a", read) == nil
    assert :ets.lookup(table, {:facts, "a"}) == []
    :ets.delete(table)
    assert Store.facts(table, "a", read) == nil
    refute Store.first_without_tools?(table, "a")
  end

  test "one that cannot be read has neither tools nor a type" do
    for body <- ["", "x", ",", ",[]}", ~s(,"args":5}), <<255>>],
        do: assert(Body.read(body) == nil)

    odd = ~s(,"args":{"tools":[1,{"name":2},{"name":"a"}],"options":5,"program_type":7}})
    assert Body.read(odd) == %{tools: ["a"], program_type: "predict"}
    assert Body.read(~s(,"args":{"tools":{"name":"a"}}})).tools == []
  end
end
