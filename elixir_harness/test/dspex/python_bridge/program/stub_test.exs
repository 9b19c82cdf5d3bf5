defmodule DSPex.ProgramStubTest do
  @moduledoc "Programs as modules in an application's tests, without Python."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Error, Stub}
  alias DSPex.Test.{Address, Triage}

  @name __MODULE__.Pool
  @outputs %{
    "team" => "billing",
    "size" => "large",
    "urgent" => true,
    "due" => "2026-03-01",
    "reply_to" => %{"street" => "Mill Lane", "city" => "Leeds"},
    "items" => [],
    "reasoning" => "It says so."
  }

  defmodule Renamed do
    use DSPex.PythonBridge.Program, id: "first", signature: "question -> answer"
    def definition, do: Map.put(super(), :id, :second)
  end

  defmodule Raising do
    use DSPex.PythonBridge.Program, signature: "question -> answer"
    def definition, do: raise("no environment")
  end

  setup_all do
    start_supervised!({Stub, name: @name})
    :ok
  end

  test "a stub answers a run and a stream by the program's id; the answers become structs" do
    Stub.stub(@name, inspect(Triage), fn %{"ticket" => "It burns!", "sender" => nil} ->
      {:ok, @outputs}
    end)

    assert {:ok, %Triage{team: "billing", size: :large, due: ~D[2026-03-01], phone: nil} = triage} =
             Triage.run(%{ticket: "It burns!"}, server: @name)

    assert %Triage{reply_to: %Address{city: "Leeds"}, reasoning: "It says so."} = triage
    elements = Enum.to_list(Triage.stream([ticket: "It burns!"], server: @name))
    assert {:chunk, :reasoning, "It says so."} in elements
    assert {:ok, ^triage, %{}} = List.last(elements)
  end

  test "a program runs under the id of its definition/0" do
    Stub.stub(@name, "second", fn %{"question" => "q"} -> {:ok, %{answer: "a"}} end)
    assert {:ok, %Renamed{answer: "a"}} = Renamed.run([question: "q"], server: @name)

    assert {:ok, %Renamed{answer: "a"}, _meta} =
             [question: "q"] |> Renamed.stream(server: @name) |> Enum.to_list() |> List.last()

    assert {:error, %Error{type: :invalid_request, message: message}} =
             Raising.run([question: "q"], server: @name)

    assert message =~ "its definition/0 raised RuntimeError"
    assert [error: %Error{}] = Enum.to_list(Raising.stream([question: "q"], server: @name))
  end
end
