defmodule DSPex.PythonBridge.Calls.TableTest do
  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Calls.{Request, Table}

  defp put(table, id, ref), do: Table.put(table, id, %Request{body: "", ref: ref})

  test "a call is found by its caller's reference from when it comes until it is taken out" do
    [first, second, third] = for _ <- 1..3, do: make_ref()
    table = Table.new() |> put(1, first) |> put(2, nil) |> put(3, second)
    assert {3, table} = Table.id_of(table, second)
    # One that comes after the first question.
    table = put(table, 4, third)
    assert {4, table} = Table.id_of(table, third)
    {%Request{ref: ^second}, table} = Table.pop(table, 3)
    assert {nil, table} = Table.id_of(table, second)
    assert {1, _table} = Table.id_of(table, first)
  end

  test "the same after the table was empty" do
    [first, second] = for _ <- 1..2, do: make_ref()
    assert {nil, table} = Table.id_of(Table.new(), first)
    assert {1, table} = table |> put(1, first) |> Table.id_of(first)
    {%Request{}, table} = Table.pop(table, 1)
    assert {nil, table} = Table.id_of(table, first)
    table = put(table, 2, second)
    {%Request{}, table} = Table.pop(table, 2)
    assert {nil, table} = Table.id_of(table, second)
    assert {3, _table} = table |> put(3, first) |> Table.id_of(first)
  end
end
