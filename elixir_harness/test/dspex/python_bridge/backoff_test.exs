defmodule DSPex.PythonBridge.BackoffTest do
  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Backoff

  doctest Backoff

  test "delays double from 50 ms to 5 s" do
    assert delays(Backoff.new(10), 10) == [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]
  end

  test "gives up after max_retries, and at once with 0" do
    assert delays(Backoff.new(3), 5) == [50, 100, 200, :give_up]
    assert Backoff.died(Backoff.new(0), true) == :give_up
  end

  test "a peer that was of use is always replaced, and the count begins again" do
    {:retry, 50, backoff} = Backoff.died(Backoff.new(1), true)
    assert {:retry, 50, backoff} = Backoff.died(backoff, false)
    assert delays(backoff, 2) == [50, :give_up]
    assert {:retry, 50, _} = Backoff.died(Backoff.new(0), false)
  end

  defp delays(_backoff, 0), do: []

  defp delays(backoff, n) do
    case Backoff.died(backoff, true) do
      {:retry, delay, backoff} -> [delay | delays(backoff, n - 1)]
      :give_up -> [:give_up]
    end
  end
end
