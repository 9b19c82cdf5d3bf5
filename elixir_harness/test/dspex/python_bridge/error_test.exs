defmodule DSPex.PythonBridge.ErrorTest do
  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Error

  doctest Error

  test "call/4 gives atoms for what a caller can act on, else the text" do
    for type <- [:timeout, :overloaded, :python_process_died, :bridge_not_running] do
      assert Error.to_call_reason(Error.new(type)) == type
    end

    assert Error.to_call_reason(Error.from_peer("timeout", "too slow", nil)) == :timeout
    assert Error.to_call_reason(Error.from_peer("overloaded", "full", nil)) == :overloaded
    assert Error.to_call_reason(Error.from_peer("lm_error", "no", false)) == "no"
  end

  test "inspection shows how many entries the history has, and nothing of them" do
    meta = %{"lm_calls" => 2, "history" => [%{"outputs" => ["top secret"]}, %{"omitted" => 1}]}
    error = Error.from_peer("output_invalid", "no answer", nil, meta)
    assert error.meta == meta
    shown = inspect(error)
    refute shown =~ "secret"
    assert shown =~ ~s|"history" => "(2 entries, not shown)"|
    assert shown =~ ~s|"lm_calls" => 2|
    # Nothing else is hidden.
    assert inspect(Error.new(:timeout)) =~ ~s|type: :timeout, message: "no reply|

    for history <- ["top secret", %{"outputs" => ["top secret"]}, nil, 1] do
      refute inspect(%{error | meta: %{"history" => history}}) =~ "secret"
    end
  end
end
