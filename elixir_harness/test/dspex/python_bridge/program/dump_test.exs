defmodule DSPex.ProgramDumpTest do
  @moduledoc "Inputs become values with a JSON form: structs are maps of their declared fields."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Program.{Dump, Types}
  alias DSPex.Test.{Address, Triage}

  defmodule Raising do
    @moduledoc false
    defstruct [:a]
    def __schema__(_what), do: raise("boom")
    def __schema__(_what, _field), do: raise("boom")
  end

  defmodule Exiting do
    @moduledoc false
    defstruct [:a]
    def __dspex__(:fields), do: exit(:boom)
  end

  @address %Address{street: "Mill Lane", city: "Leeds", note: "private"}

  defp dump(value, type), do: Dump.value(Types.type(type, "", []), value)

  test "a struct of the field's type is a map of the fields that it declares" do
    dumped = %{"street" => "Mill Lane", "city" => "Leeds"}
    assert dump(@address, Address) == dumped
    assert dump([@address], {:list, Address}) == [dumped]
    assert dump(%{"x" => @address}, {:map, {:optional, Address}}) == %{"x" => dumped}

    assert dump(%{home: @address, age: 3}, %{home: Address, age: :integer}) == %{
             home: dumped,
             age: 3
           }
  end

  test "so is one in a value of any type, the struct of a program too" do
    triage = %Triage{team: "billing", size: :small, reply_to: @address, reasoning: "private"}
    assert %{"of" => [dumped]} = dump(%{"of" => [triage]}, :map)

    assert %{
             "team" => "billing",
             "size" => :small,
             "reply_to" => %{"street" => "Mill Lane", "city" => "Leeds"} = address
           } = dumped

    refute is_map_key(address, "note") or is_map_key(dumped, "reasoning")
  end
end
