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

  test "first one is tried alone, those with the most deaths first, then the youngest" do
    state = waiting(%{1 => 2, 2 => 3, 3 => 2})
    assert {[2], state} = Suspects.next(state, 3)
    assert {[], state} = Suspects.next(state, 3)
    state = Suspects.drop(state, 2, request(3))
    assert {[1, 3], _state} = Suspects.next(state, 3)
  end

  test "256 that have run for a second each are sent in four trials" do
    assert {[256], state} = Suspects.next(waiting(Map.new(1..256, &{&1, 1})), 1)
    assert left(state) in 500..1_000
    assert {[253, 254, 255], state} = passed(state)
    assert {nine, state} = passed(state)
    assert {rest, state} = passed(state)
    assert {length(nine), length(rest)} == {9, 243}
    assert {[], _state} = passed(state)
  end

  test "a group that dies is searched, one at a time or in smaller groups; none of it fails" do
    for {max_retries, killer, most} <- [
          {1, 256, {0, 1}},
          {3, 250, {1, 9}},
          {2, 1, {7, 20}},
          {1, 77, {7, 20}},
          {3, 150, {7, 20}}
        ] do
      state = waiting(Map.new(1..256, &{&1, min(2, max_retries)}))
      {deaths, trials} = search(state, killer, max_retries, 0, 0)
      assert deaths <= elem(most, 0) and trials <= elem(most, 1)
    end
  end

  # Until the killer was alone: after a death of the peer those on trial wait again.
  defp search(state, killer, max_retries, deaths, trials) do
    {ids, state} = Suspects.next(state, max_retries)

    cond do
      ids == [killer] ->
        {deaths, trials}

      killer in ids ->
        requests = for id <- ids, do: {id, request(min(2, max_retries) + deaths)}

        for {id, request} <- requests,
            do: assert(:in_group == Suspects.blame(state, id, request, max_retries))

        state = Suspects.stop(state, :died)

        state =
          Enum.reduce(requests, state, fn {id, r}, s ->
            Suspects.add(s, id, %{r | deaths: r.deaths + 1})
          end)

        search(state, killer, max_retries, deaths + 1, trials + 1)

      true ->
        search(Suspects.timeout(state, state.timer), killer, max_retries, deaths, trials + 1)
    end
  end

  test "the timer of an earlier trial changes nothing" do
    {[2], state} = Suspects.next(waiting(%{1 => 2, 2 => 2}), 3)
    assert Suspects.timeout(state, make_ref()) == state
  end

  test "a death counts against the one on trial, and not against other suspects" do
    {[2], state} = Suspects.next(waiting(%{1 => 2, 2 => 2}), 3)
    blame = &Suspects.blame(state, &1, &2, 3)
    assert blame.(2, request(2)) == :died
    assert blame.(1, request(2)) == :spared
    # Calls that are not suspects may have caused it, too.
    assert blame.(7, request(0)) == :died
    # One that kills later than in its trial is not spared for ever.
    assert blame.(1, request(2, 8)) == :died
    assert blame.(1, request(2, 7)) == :spared
  end

  test "without a trial all are blamed" do
    {[2], state} = Suspects.next(waiting(%{2 => 2}), 3)
    {[], state} = passed(state)
    assert Suspects.blame(state, 2, request(2), 3) == :died
  end

  test "a peer that follows another has ten seconds to import DSPy" do
    state = %{waiting(%{1 => 2, 2 => 2}) | cold?: true}
    assert {[2], trial} = Suspects.next(Suspects.start(state, false), 3)
    assert left(trial) in 9_000..10_000
    assert left(Suspects.warm(trial)) in 500..1_000
    # With other calls that were held, the suspects come a second after that.
    paused = Suspects.start(state, true)
    assert {[], paused} = Suspects.next(paused, 3)
    assert left(paused) in 9_000..10_000
    assert {[2], _state} = passed(Suspects.warm(paused))
  end
end
