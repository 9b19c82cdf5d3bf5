defmodule DSPex.PythonBridge.Calls.SuspectsTest do
  @moduledoc "Which suspects are tried when, and which of them a death counts against: played through."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Calls.{Request, Suspects}

  defp request(deaths, spared \\ 0), do: %Request{body: "body", deaths: deaths, spared: spared}

  # Of their numbers of deaths by their ids.
  defp waiting(deaths) do
    Enum.reduce(deaths, %Suspects{}, fn {id, n}, state -> Suspects.add(state, id, request(n)) end)
  end

  defp passed(state) do
    state = Suspects.timeout(state, state.timer)
    {ids, state} = Suspects.next(state, 3)
    {Enum.sort(ids), state}
  end

  defp left(state), do: :erlang.read_timer(state.timer)

  test "a suspect was in flight at two deaths, or has one retry left; a ping never is one" do
    assert for(n <- 0..3, do: Suspects.suspect?(request(n), 3)) == [false, false, true, true]
    assert for(n <- 0..1, do: Suspects.suspect?(request(n), 1)) == [false, true]
    refute Suspects.suspect?(%{request(3) | body: ~s(,"command":"ping","args":{}})}, 3)
  end

  test "they are tried one at a time, those with the most deaths first, then the youngest" do
    state = waiting(%{1 => 2, 2 => 3, 3 => 2})
    assert {[2], state} = Suspects.next(state, 3)
    assert {[], state} = Suspects.next(state, 3)
    state = Suspects.drop(state, 2, request(3))
    assert {[1, 3], _state} = Suspects.next(state, 3)
  end

  test "one on its last retry is tried alone" do
    assert {[3], state} = Suspects.next(waiting(%{1 => 3, 2 => 2, 3 => 3}), 3)
    assert {[1], state} = passed(state)
    assert {[2], _state} = passed(state)
  end

  test "one that has run for a second goes on beside the next; each time twice as many" do
    assert {[100], state} = Suspects.next(waiting(Map.new(1..100, &{&1, 2})), 3)
    assert left(state) in 500..1_000
    assert {[98, 99], state} = passed(state)
    assert {[94, 95, 96, 97], state} = passed(state)
    assert {eight, state} = passed(state)
    assert length(eight) == 8
    # After a death one again.
    state = Suspects.start(Suspects.stop(state), false)
    assert {[85], _state} = Suspects.next(state, 3)
  end

  test "the timer of an earlier trial changes nothing" do
    {[2], state} = Suspects.next(waiting(%{1 => 2, 2 => 2}), 3)
    assert Suspects.timeout(state, make_ref()) == state
  end

  test "a death counts against the one on trial, and not against other suspects" do
    {[2], state} = Suspects.next(waiting(%{1 => 2, 2 => 2}), 3)
    blamed? = &Suspects.blamed?(state, &1, &2, 3)
    assert blamed?.(2, request(2))
    refute blamed?.(1, request(2))
    # Calls that are not suspects may have caused it, too.
    assert blamed?.(7, request(0))
    # One that kills later than in its trial is not spared for ever.
    assert blamed?.(1, request(2, 8))
    refute blamed?.(1, request(2, 7))
  end

  test "without a trial all are blamed" do
    {[2], state} = Suspects.next(waiting(%{2 => 2}), 3)
    {[], state} = passed(state)
    assert Suspects.blamed?(state, 2, request(2), 3)
  end

  test "a peer that follows another has ten seconds to answer its first run" do
    state = %{waiting(%{1 => 2, 2 => 2}) | cold?: true}
    assert {[2], trial} = Suspects.next(Suspects.start(state, false), 3)
    assert left(trial) in 9_000..10_000
    assert left(Suspects.warm(trial)) in 500..1_000
    # With other calls that were held, the suspects come a second after their first answer.
    paused = Suspects.start(state, true)
    assert {[], paused} = Suspects.next(paused, 3)
    assert left(paused) in 9_000..10_000
    assert {[2], _state} = passed(Suspects.warm(paused))
  end
end
