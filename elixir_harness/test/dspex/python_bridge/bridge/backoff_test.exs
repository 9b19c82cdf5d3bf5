defmodule DSPex.PythonBridge.Bridge.BackoffTest do
  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Bridge.Backoff

  doctest Backoff

  test "delays double from 50 ms to 5 s" do
    assert delays(Backoff.new(), 10) == [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]
  end

  test "a peer that was of use resets the count" do
    {50, backoff} = Backoff.died(Backoff.new(), true)
    {100, backoff} = Backoff.died(backoff, true)
    assert {50, backoff} = Backoff.died(backoff, false)
    assert delays(backoff, 2) == [50, 100]
  end

  test "more early deaths in a row than the limit are hopeless" do
    {_, one} = Backoff.died(Backoff.new(), true)
    assert Backoff.hopeless?(one, 0)
    refute Backoff.hopeless?(one, 1)
    refute Backoff.hopeless?(Backoff.new(), 0)
    {_, none} = Backoff.died(one, false)
    refute Backoff.hopeless?(none, 0)
  end

  test "those of peers that had work are not: a call may have killed them" do
    {50, backoff} = Backoff.died(Backoff.new(), true)
    {100, backoff} = Backoff.died(backoff, true, true)
    {200, backoff} = Backoff.died(backoff, true)
    refute Backoff.hopeless?(backoff, 1)
  end

  defp delays(_backoff, 0), do: []

  defp delays(backoff, n) do
    {delay, backoff} = Backoff.died(backoff, true)
    [delay | delays(backoff, n - 1)]
  end
end
