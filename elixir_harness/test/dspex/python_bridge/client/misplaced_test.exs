defmodule DSPex.PythonBridge.Client.MisplacedTest do
  @moduledoc "Arguments that `call`, `request` and `stream` of a Bridge and a Pool cannot place."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Bridge, Error, Pool}

  doctest DSPex.PythonBridge.Client.Misplaced

  for module <- [Bridge, Pool] do
    test "#{inspect(module)}.call says what it takes, and shows no contents" do
      for given <- [
            [:ping, []],
            [MyBridge, 5_000],
            [MyBridge, :ping, []],
            [MyBridge, :ping, 5_000],
            [:execute_program, [program_id: "secret"], 5_000],
            [MyBridge, "secret", {"secret"}]
          ] do
        assert {:error, text} = apply(unquote(module), :call, given)
        assert text =~ ~r"^call/#{length(given)} takes .*call\(server, command, args, timeout\)$"
        refute text =~ "secret"
      end
    end

    test "#{inspect(module)}.request gives an error of type :invalid_request" do
      for given <- [[:ping, []], [MyBridge, :ping, []], [MyBridge, :ping, [timeout: 5]]] do
        assert {:error, %Error{type: :invalid_request, message: text}} =
                 apply(unquote(module), :request, given)

        assert text =~ "request/#{length(given)} takes "
      end
    end
  end

  test "Bridge.stream has the error as its only element" do
    assert [error: %Error{type: :invalid_request, message: text}] =
             Enum.to_list(Bridge.stream(MyBridge, []))

    assert text =~ "was given (MyBridge, a list)"
  end
end
