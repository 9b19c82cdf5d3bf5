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

  test "an answer that the module cannot have is named, and so is a wrong input" do
    Stub.stub(@name, inspect(Triage), fn _inputs ->
      {:ok, %{@outputs | "reply_to" => %{"street" => "Mill Lane"}}}
    end)

    assert {:error, %Error{type: :output_invalid, message: message}} =
             Triage.run([ticket: "a"], server: @name)

    assert message == "the answer did not fit DSPex.Test.Triage: reply_to.city: missing"

    assert {:error, %Error{type: :invalid_args, message: "inputs.tiket: unknown field" <> _}} =
             Triage.run([tiket: "a"], server: @name)
  end

  test "an error of the stub is that of the run" do
    Stub.stub(@name, inspect(Triage), fn _inputs -> {:error, :timeout} end)
    assert {:error, %Error{type: :timeout}} = Triage.run([ticket: "a"], server: @name)
  end
end
