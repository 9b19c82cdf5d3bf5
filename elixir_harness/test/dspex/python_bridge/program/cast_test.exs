defmodule DSPex.ProgramCastTest do
  @moduledoc "Values of an answer become terms; any other value is an error that names the place."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Program.{Cast, Types}
  alias DSPex.Test.Address

  doctest Cast

  defp cast(value, type), do: Cast.cast(value, Types.type(type, "", []), "a")

  test "each type has its terms" do
    for {type, json, term} <- [
          {:string, "x", "x"},
          {:integer, 3, 3},
          {:float, 2, 2.0},
          {:float, 2.5, 2.5},
          {:boolean, false, false},
          {:map, %{"x" => 1}, %{"x" => 1}},
          {:any, [nil, 1], [nil, 1]},
          {:uuid, "00000000-0000-4000-8000-000000000000", "00000000-0000-4000-8000-000000000000"},
          {:date, "2026-03-01", ~D[2026-03-01]},
          {:time, "10:30:00", ~T[10:30:00]},
          {:time, "10:30:00+02:00", ~T[10:30:00]},
          {:datetime, "2026-03-01T10:30:00+02:00", ~U[2026-03-01 08:30:00Z]},
          {:datetime, "2026-03-01T10:30:00", ~U[2026-03-01 10:30:00Z]},
          {:naive_datetime, "2026-03-01T10:30:00", ~N[2026-03-01 10:30:00]},
          {{:list, :float}, [1, 2.5], [1.0, 2.5]},
          {{:map, :date}, %{"x" => "2026-03-01"}, %{"x" => ~D[2026-03-01]}},
          {{:optional, :integer}, nil, nil},
          {{:optional, :integer}, 1, 1},
          {{:enum, ["a", "b"]}, "b", "b"},
          {{:enum, [:a, :b]}, "b", :b},
          {{:enum, [1, 2]}, 2, 2},
          {%{n: :integer, m: {:optional, :string}}, %{"n" => 1, "more" => 2}, %{n: 1, m: nil}},
          {Address, %{"street" => "Mill Lane", "city" => "Leeds"},
           %Address{street: "Mill Lane", city: "Leeds", note: "none"}},
          {{:list, :image}, ["data:"], ["data:"]}
        ],
        do: assert(cast(json, type) == {:ok, term})
  end

  test "a value that does not fit is named, and not repeated" do
    for {type, json, text} <- [
          {:string, 1, "a: expected a string"},
          {:integer, 1.0, "a: expected a whole number"},
          {:float, "1", "a: expected a number"},
          {:float, Integer.pow(10, 400), "a: expected a number that a float can hold"},
          {:boolean, "true", "a: expected true or false"},
          {:map, [], "a: expected a map"},
          {:date, "secret", "a: expected a date in ISO 8601"},
          {:time, nil, "a: expected a time of day in ISO 8601"},
          {:datetime, "2026-03-01", "a: expected a date and time in ISO 8601"},
          {{:list, :float}, [1, [2]], "a[1]: expected a number"},
          {{:list, :float}, [1 | 2], "a: expected a list"},
          {{:map, :integer}, %{"x y" => "1"}, ~s(a["x y"]: expected a whole number)},
          {{:optional, :integer}, "1", "a: expected a whole number"},
          {{:enum, ["a", "b"]}, "secret", ~s(a: expected "a" or "b")},
          {{:enum, [1, 2]}, 1.0, "a: expected 1 or 2"},
          {{:enum, Enum.to_list(1..12)}, 0,
           "a: expected 1 or 2 or 3 or 4 or 5 or 6 or 7 or 8 or 9 or 10 or another of 12"},
          {%{n: %{m: :integer}}, %{"n" => %{}}, "a.n.m: missing"},
          {{:list, Address}, [%{"street" => "x", "city" => 1}], "a[0].city: expected a string"}
        ],
        do: assert(cast(json, type) == {:error, text})
  end

  defmodule Letter do
    defstruct [:to, note: "none"]
    def __dspex__(:fields), do: [to: :string, note: {:optional, :string}]
  end

  test "a null for an optional field of a struct is nil; one that is absent keeps its default" do
    letter = &cast(Map.put(&1, "to", "a"), Letter)
    assert letter.(%{"note" => nil}) == {:ok, %Letter{to: "a", note: nil}}
    assert letter.(%{}) == {:ok, %Letter{to: "a", note: "none"}}
  end

  test "no atom is made from an answer" do
    text = "an_atom_that_nothing_has_made_#{System.unique_integer([:positive])}"
    assert {:error, _text} = cast(text, {:enum, [:a, :b]})
    assert {:ok, %{a: 1}} = cast(%{"a" => 1, text => 1}, %{a: :integer})
    assert_raise ArgumentError, fn -> String.to_existing_atom(text) end
  end
end
