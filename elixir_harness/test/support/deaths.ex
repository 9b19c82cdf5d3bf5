defmodule DSPex.Test.Deaths do
  @moduledoc """
  A bridge whose peers die, in simulated time, without peers: who is sent when, and who is blamed, is
  `DSPex.PythonBridge.Calls.Suspects`' as in `DSPex.PythonBridge.Calls.Handover`.

  A call is `{at, what}`: when it comes, and `{:answers, ms}`, or `{:kills, fun}`, whose result is after how many ms.
  """

  alias DSPex.PythonBridge.Calls.Suspects

  @restart_ms 300

  defstruct [:most, :calls, :todo, :window_end, :death, :up] ++
              [now: 0, suspects: %Suspects{}, held: [], at_peer: %{}, deaths: %{}] ++
              [sent: %{}, waited: %{}, answers: %{}]

  @doc "Plays the calls, by their ids, to their end; `kills`: when somebody else kills the peer."
  @spec play(%{pos_integer() => {non_neg_integer(), tuple()}}, non_neg_integer(), [integer()]) ::
          %{pos_integer() => %{answer: :ok | :died, sent: pos_integer(), waited: integer()}}
  def play(calls, most, kills \\ []) do
    arrivals = for {id, {at, _what}} <- calls, do: {at, {:arrives, id}}
    todo = Enum.sort(arrivals ++ for(at <- kills, do: {at, :killed}))
    state = run(%__MODULE__{most: most, calls: calls, todo: todo})

    Map.new(calls, fn {id, _call} ->
      waited = Map.get(state.waited, id, 0)
      {id, %{answer: state.answers[id], sent: state.sent[id], waited: waited}}
    end)
  end

  defp run(state) do
    case next(state) do
      nil -> state
      {at, event} -> state |> wait(at - state.now) |> handle(event) |> advance() |> run()
    end
  end

  # Of simultaneous ones the first in this order.
  defp next(%{todo: todo} = state) do
    answers = for {id, {_sent, at}} <- state.at_peer, at != nil, do: {at, {:answered, id}}

    [
      state.up && {state.up, :up},
      state.death && {state.death, :dies},
      Enum.min(answers, fn -> nil end),
      List.first(todo),
      state.window_end && {state.window_end, :window_over}
    ]
    |> Enum.filter(& &1)
    |> Enum.min_by(&elem(&1, 0), fn -> nil end)
  end

  defp wait(state, ms) do
    waiting = if state.up, do: [], else: for({id, %{since: s}} <- records(state), s, do: id)
    waited = Enum.reduce(waiting, state.waited, &Map.update(&2, &1, ms, fn ms0 -> ms0 + ms end))
    %{state | now: state.now + ms, waited: waited}
  end

  defp records(state), do: state.suspects.records

  defp handle(state, {:arrives, id}), do: %{state | todo: tl(state.todo), held: [id | state.held]}
  defp handle(state, :up), do: %{state | up: nil}
  defp handle(state, {:answered, id}), do: ended(state, id, :ok)
  defp handle(state, :dies), do: dies(state)
  defp handle(%{up: nil} = state, :killed), do: dies(%{state | todo: tl(state.todo)})
  defp handle(state, :killed), do: %{state | todo: tl(state.todo)}

  defp handle(state, :window_over),
    do: %{state | suspects: Suspects.close_window(state.suspects, state.now), window_end: nil}

  defp dies(state) do
    lost = for {id, {sent, _at}} <- state.at_peer, do: {id, sent}
    suspects = Suspects.close_window(state.suspects, state.now)
    {verdicts, suspects?, suspects} = Suspects.died(suspects, lost, state.now)
    up = state.now + @restart_ms
    state = %{state | suspects: suspects, at_peer: %{}, death: nil, window_end: nil, up: up}

    Enum.reduce(verdicts, state, fn {id, verdict}, state ->
      deaths = Map.get(state.deaths, id, 0)

      cond do
        verdict == :innocent -> hold(state, id, false)
        verdict == :likely and deaths >= state.most -> hold(state, id, false)
        deaths >= state.most -> ended(state, id, :died)
        true -> hold(%{state | deaths: Map.put(state.deaths, id, deaths + 1)}, id, suspects?)
      end
    end)
  end

  defp hold(state, id, suspect?) do
    deaths = Map.get(state.deaths, id, 0)
    deadly? = deaths > 0 and deaths >= min(2, state.most)

    if suspect? or deadly? or Suspects.member?(state.suspects, id),
      do: %{state | suspects: Suspects.add(state.suspects, id, state.now)},
      else: %{state | held: [id | state.held]}
  end

  defp ended(state, id, answer) do
    suspects = Suspects.drop(state.suspects, id, state.now)
    at_peer = Map.delete(state.at_peer, id)
    answers = Map.put_new(state.answers, id, answer)
    window_end = suspects.window && state.window_end
    %{state | suspects: suspects, at_peer: at_peer, answers: answers, window_end: window_end}
  end

  defp advance(%{up: nil} = state) do
    state = Enum.reduce(Enum.sort(state.held), %{state | held: []}, &give/2)

    if Suspects.due?(state.suspects) do
      {ids, window_ms, suspects} = Suspects.next(state.suspects, state.now)
      state = %{state | suspects: suspects, held: ids, window_end: state.now + (window_ms || 0)}
      advance(state)
    else
      state
    end
  end

  defp advance(state), do: state

  defp give(id, state) do
    sent = Map.update(state.sent, id, 1, &(&1 + 1))
    state = %{state | sent: sent}

    case state.calls[id] do
      {_at, {:answers, ms}} ->
        %{state | at_peer: Map.put(state.at_peer, id, {state.now, state.now + ms})}

      {_at, {:kills, after_ms}} ->
        death = min(state.death, state.now + after_ms.())
        %{state | at_peer: Map.put(state.at_peer, id, {state.now, nil}), death: death}
    end
  end
end
