defmodule DSPex.PythonBridge.Calls.Suspects do
  @moduledoc false
  # The calls that may have killed a peer, and which of them a death is blamed on: part of
  # `DSPex.PythonBridge.Calls.InFlight`. It only has data, and is told the time.
  #
  # Suspects are sent one at a time: the next one when the last is answered or its window has passed, in which case it
  # goes on beside the next. So they have different ages when a peer dies. A call that has lived longer before has an
  # alibi. Of the others the youngest suspect is blamed, since the older ones have outlived their windows. No suspect
  # waits for others longer than `@wait_ms` in all, and no other call waits for a suspect.
  #
  # This is a guess where a call kills later than in its window. So a call that is not blamed is spared a limited number of
  # times: a killer is sent `1 + max_retries` times, and at most ten times more.

  # The timers of many windows add up to some delay.
  @wait_ms 4_900
  # A part of it that is for those that were blamed, and are sent again.
  @reserve_ms 1_800
  # Each of two calls that were sent so close to each other may have caused a death.
  @close_ms 120
  # The window of a suspect if few wait. It is longer after a death that took longer.
  @window_ms 1_000

  # How often a call is spared: with an alibi; if it is only older than the one that is blamed; if that may be another as
  # well.
  @alibis 8
  @spared 2
  @doubted 1

  # clock: the ms of all windows, in which suspects wait for others. order, waits: those that wait, in the order in which
  # they are sent, and by when they began to wait.
  defstruct [:window, clock: 0, window_ms: @window_ms] ++
              [order: :gb_sets.empty(), waits: :gb_sets.empty(), records: %{}]

  @type t :: %__MODULE__{
          window: {id(), since :: integer()} | nil,
          clock: non_neg_integer(),
          window_ms: pos_integer(),
          order: :gb_sets.set({rank(), integer()}),
          waits: :gb_sets.set({integer(), id()}),
          records: %{id() => record()}
        }
  @type id :: pos_integer()
  @typep rank :: 0 | 1 | 2
  # Of each call that was in flight at a death. lived: its greatest age at one. since: when it began to wait, by the clock;
  # waited: how long it had waited before.
  @typep record :: %{
           lived: non_neg_integer(),
           suspect?: boolean(),
           rank: rank(),
           since: integer() | nil,
           waited: non_neg_integer(),
           spared: non_neg_integer(),
           doubted: non_neg_integer()
         }
  @typedoc "`:likely`: it, or one that was sent at about the same time. `:possible`: nothing is known."
  @type verdict :: :guilty | :likely | :possible | :innocent

  @doc "Whether suspects wait, and no window is open."
  @spec due?(t()) :: boolean()
  def due?(%__MODULE__{window: window} = state), do: window == nil and any_waits?(state)

  @doc "Whether suspects wait."
  @spec any_waits?(t()) :: boolean()
  def any_waits?(%__MODULE__{order: order}), do: not :gb_sets.is_empty(order)

  @doc "Whether a call is a suspect."
  @spec member?(t(), id()) :: boolean()
  def member?(%__MODULE__{records: records}, id), do: match?(%{^id => %{suspect?: true}}, records)

  @doc "Adds a suspect, or one that is to be sent again: it waits."
  @spec add(t(), id(), integer()) :: t()
  def add(%__MODULE__{} = state, id, now) do
    record = %{record(state, id) | suspect?: true, since: clock(state, now)}
    order = :gb_sets.add(place(id, record), state.order)
    waits = :gb_sets.add(began(id, record), state.waits)
    put(%{state | order: order, waits: waits}, id, record)
  end

  defp record(state, id) do
    new = %{lived: 0, suspect?: false, rank: 1, since: nil, waited: 0, spared: 0, doubted: 0}
    Map.get(state.records, id, new)
  end

  defp put(state, id, record), do: %{state | records: Map.put(state.records, id, record)}

  # The youngest calls first: one that kills at once was sent just before the first death.
  defp place(id, record), do: {record.rank, -id}
  defp began(id, record), do: {record.since - record.waited, id}

  defp clock(%__MODULE__{window: nil, clock: clock}, _now), do: clock

  defp clock(%__MODULE__{window: {_id, since}, clock: clock}, now),
    do: clock + max(now - since, 0)

  @doc "Forgets a call that has ended."
  @spec drop(t(), id(), integer()) :: t()
  def drop(%__MODULE__{records: records} = state, id, now) when is_map_key(records, id) do
    state = if match?({^id, _since}, state.window), do: close_window(state, now), else: state
    state = if records[id].since, do: take_out(state, id, now), else: state
    %{state | records: Map.delete(state.records, id)}
  end

  def drop(%__MODULE__{} = state, _id, _now), do: state

  defp take_out(state, id, now) do
    record = Map.fetch!(state.records, id)
    order = :gb_sets.delete(place(id, record), state.order)
    waits = :gb_sets.delete(began(id, record), state.waits)
    waited = record.waited + clock(state, now) - record.since
    put(%{state | order: order, waits: waits}, id, %{record | since: nil, waited: waited})
  end

  @doc "Closes the window of the suspect that was sent last."
  @spec close_window(t(), integer()) :: t()
  def close_window(%__MODULE__{} = state, now),
    do: %{state | clock: clock(state, now), window: nil}

  @doc "What is sent now: all that have waited long enough, else the next one, with its window in ms."
  @spec next(t(), integer()) :: {[id(), ...], window_ms :: non_neg_integer() | nil, t()}
  def next(%__MODULE__{window: nil} = state, now) do
    case released(state, now, []) do
      {[], state} -> open_window(state, now)
      {ids, state} -> {ids, nil, state}
    end
  end

  defp released(state, now, ids) do
    with true <- any_waits?(state),
         {began, id} when state.clock - began >= @wait_ms <- :gb_sets.smallest(state.waits) do
      state |> take_out(id, now) |> released(now, [id | ids])
    else
      _not_yet -> {ids, state}
    end
  end

  defp open_window(state, now) do
    {rank, place} = :gb_sets.smallest(state.order)
    state = take_out(state, -place, now)
    {[-place], window_ms(state, rank), %{state | window: {-place, now}}}
  end

  # All that wait share what the first of them may still wait.
  defp window_ms(%__MODULE__{} = state, rank) do
    if any_waits?(state) do
      {began, _id} = :gb_sets.smallest(state.waits)
      left = @wait_ms - (state.clock - began)
      shared = if rank > 0 and left > @reserve_ms, do: left - @reserve_ms, else: left
      share = div(shared, :gb_sets.size(state.waits))
      share = if rank == 0, do: max(share, min(@close_ms, left)), else: share
      min(state.window_ms, share)
    else
      state.window_ms
    end
  end

  @doc """
  A peer has died with calls in flight, which had been sent at these times: the verdict for each; and whether all but the
  innocent are suspects from now on, since there were suspects among them.
  """
  @spec died(t(), [{id(), sent :: integer()}], integer()) ::
          {%{id() => verdict()}, boolean(), t()}
  def died(%__MODULE__{} = state, [], _now), do: {%{}, false, state}

  def died(%__MODULE__{} = state, calls, now) do
    lost = for {id, sent} <- calls, do: {id, now - sent, record(state, id)}
    {_id, youngest, _record} = Enum.min_by(lost, &elem(&1, 1))
    # The next death may take as long as this one took at least.
    window_ms = (2 * youngest) |> max(@window_ms) |> min(@wait_ms)
    blamed = blamed(lost)

    {verdicts, records} =
      Enum.map_reduce(lost, state.records, fn {id, age, record}, records ->
        verdict = verdict(id, age, record, blamed)
        record = note(%{record | lived: max(age, record.lived)}, verdict)
        {{id, verdict}, Map.put(records, id, record)}
      end)

    suspects? = Enum.any?(lost, fn {_id, _age, record} -> record.suspect? end)
    {Map.new(verdicts), suspects?, %{state | window_ms: window_ms, records: records}}
  end

  # The youngest suspect without an alibi, and those that were sent shortly before it.
  defp blamed(lost) do
    accused =
      for {id, age, %{suspect?: true} = record} <- lost, not alibi?(age, record), do: {age, id}

    {youngest, _id} = Enum.min(accused, fn -> {nil, nil} end)
    Map.new(for {age, id} <- accused, age - youngest < @close_ms, do: {id, true})
  end

  defp alibi?(age, record), do: age < record.lived - @close_ms

  defp verdict(id, _age, record, blamed) when is_map_key(blamed, id) do
    cond do
      map_size(blamed) == 1 -> :guilty
      record.doubted < @doubted -> :likely
      true -> :possible
    end
  end

  defp verdict(_id, age, record, _blamed) do
    most = if alibi?(age, record), do: @alibis, else: if(record.suspect?, do: @spared, else: 0)
    if record.spared < most, do: :innocent, else: :possible
  end

  # Those blamed are sent next, those spared last, when all that kill at once are known.
  defp note(record, :guilty), do: %{record | rank: 0}
  defp note(record, :likely), do: %{record | rank: 0, doubted: record.doubted + 1}
  defp note(record, :innocent), do: %{record | rank: 2, spared: record.spared + 1}
  defp note(record, :possible), do: record
end
