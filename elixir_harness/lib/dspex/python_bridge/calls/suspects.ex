defmodule DSPex.PythonBridge.Calls.Suspects do
  @moduledoc false
  # Calls that were in flight at two deaths of a peer, or have one retry left: any of them may be what kills it. They
  # are tried in groups, first one alone, and no other call waits for them.
  #
  # A trial ends when a suspect that is alone is answered, or after a second: then its group goes on beside the next, so
  # that slow ones hold nobody. Groups have 1, 3 and 9 suspects, and the fourth all the others, so that 256 innocent ones
  # are sent within 5 s. Those with the most deaths come first, and of these the youngest, since a call that kills at once
  # was sent just before the first death. A peer that has just taken over, and was given calls that were held, gets the
  # first suspect a second later: one of these may kill, too.
  #
  # A peer that follows another is cold: it may still be importing DSPy. The second only begins when it has done so, or
  # after `@cold_ms`. Till then a pool prefers other peers.
  #
  # If a peer dies during a trial, the suspects on trial are blamed, and the others are not. Of a group it is not known
  # which one killed, so none of it fails: up to ten are tried one at a time, for half a second each, more in groups that
  # begin with a quarter of them and double. Only one that was alone fails for its last death. One that kills later than
  # its trial is spared `@most_spared` times at most, and others that run as long may be blamed for it.

  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.Protocol

  @trial_ms 1_000
  @cold_ms 10_000
  @most_spared 8
  # Of a group in which a peer died.
  @search_ms 500
  @most_alone 10
  @sizes %{1 => 3, 3 => 9}
  # As many as a peer runs at once.
  @largest_trial 256

  defstruct waiting: :gb_sets.empty(),
            trial: [],
            size: 1,
            searching?: false,
            timer: nil,
            cold?: false

  @typedoc """
  `waiting`: deaths and id of each, negated; `trial`: the ids on trial; `timer`: of the trial, or of the pause;
  `size`: of the next group; `searching?`: a group has died; `cold?`: whether the peer follows
  another, and is not known to have imported DSPy.
  """
  @type t :: %__MODULE__{
          waiting: :gb_sets.set({integer(), integer()}),
          trial: [pos_integer()],
          size: pos_integer(),
          searching?: boolean(),
          timer: reference() | nil,
          cold?: boolean()
        }

  @doc "Whether a call is a suspect. Pings cannot kill a peer, and a held one looks like a hang to the Monitor."
  @spec suspect?(Request.t(), non_neg_integer()) :: boolean()
  def suspect?(%Request{deaths: 0}, _max_retries), do: false

  def suspect?(%Request{deaths: deaths, body: body}, max_retries),
    do: deaths >= min(2, max_retries) and not Protocol.ping?(body)

  @doc "Adds a suspect, which waits."
  @spec add(t(), pos_integer(), Request.t()) :: t()
  def add(%__MODULE__{} = state, id, request),
    do: %{state | waiting: :gb_sets.add({-request.deaths, -id}, state.waiting)}

  @doc "Forgets a call that has ended."
  @spec drop(t(), pos_integer(), Request.t()) :: t()
  def drop(%__MODULE__{trial: [id]} = state, id, _request), do: trial_over(state)

  def drop(%__MODULE__{} = state, id, request) do
    waiting = :gb_sets.delete_any({-request.deaths, -id}, state.waiting)
    %{state | trial: List.delete(state.trial, id), waiting: waiting}
  end

  @doc "The suspects that are sent now: none during a trial or a pause."
  @spec next(t(), max_retries :: non_neg_integer()) :: {[pos_integer()], t()}
  def next(%__MODULE__{timer: nil} = state, max_retries) do
    searched = searched(:gb_sets.iterator(state.waiting), min(2, max_retries), 0)
    alone? = searched in 1..@most_alone

    case take(state.waiting, if(alone?, do: 1, else: state.size), []) do
      {[], _none} ->
        {[], %{state | size: 1, searching?: false}}

      {ids, waiting} ->
        timer = start_timer(state, if(alone?, do: @search_ms, else: @trial_ms))
        {ids, %{state | trial: ids, waiting: waiting, timer: timer}}
    end
  end

  def next(%__MODULE__{} = state, _max_retries), do: {[], state}

  # How many have more deaths than a suspect at first, as far as that matters.
  defp searched(_iterator, _first_deaths, count) when count > @most_alone, do: count

  defp searched(iterator, first_deaths, count) do
    case :gb_sets.next(iterator) do
      {{deaths, _id}, rest} when -deaths > first_deaths -> searched(rest, first_deaths, count + 1)
      _other_or_none -> count
    end
  end

  defp take(waiting, size, ids) do
    if size == 0 or :gb_sets.is_empty(waiting) do
      {ids, waiting}
    else
      {{_deaths, place}, waiting} = :gb_sets.take_smallest(waiting)
      take(waiting, size - 1, [-place | ids])
    end
  end

  defp start_timer(%{cold?: cold?}, ms),
    do: :erlang.start_timer(if(cold?, do: @cold_ms, else: ms), self(), :trial)

  @doc "The peer has imported DSPy."
  @spec warm(t()) :: t()
  def warm(%__MODULE__{timer: nil} = state), do: %{state | cold?: false}

  def warm(%__MODULE__{timer: timer} = state) do
    cancel(timer)
    state = %{state | cold?: false}
    %{state | timer: start_timer(state, @trial_ms)}
  end

  defp cancel(timer), do: :erlang.cancel_timer(timer, async: true, info: false)

  @doc "Handles the timer `:trial`."
  @spec timeout(t(), reference()) :: t()
  def timeout(%__MODULE__{timer: timer, trial: []} = state, timer),
    do: %{state | timer: nil, cold?: false}

  def timeout(%__MODULE__{timer: timer} = state, timer), do: trial_over(%{state | cold?: false})
  # Of an earlier trial.
  def timeout(%__MODULE__{} = state, _timer), do: state

  defp trial_over(%{timer: timer, size: size, searching?: searching?} = state) do
    cancel(timer)
    size = if searching?, do: 2 * size, else: Map.get(@sizes, size, @largest_trial)
    %{state | trial: [], timer: nil, size: min(size, @largest_trial)}
  end

  @doc "Ends the trial: the peer has died, or another takes over."
  @spec stop(t(), :died | :spared | :replaced) :: t()
  def stop(%__MODULE__{timer: timer, trial: trial} = state, how) do
    if timer, do: cancel(timer)
    state = %{state | trial: [], timer: nil, cold?: true}

    case {how, trial} do
      {:died, [_, _ | _]} -> %{state | size: max(div(length(trial), 4), 1), searching?: true}
      _none_or_one -> %{state | size: 1}
    end
  end

  @doc "A peer serves. `held?`: whether it is given calls that were held; then the first trial comes after a pause."
  @spec start(t(), held? :: boolean()) :: t()
  def start(%__MODULE__{waiting: waiting} = state, held?) do
    if state.cold? and (held? or :gb_sets.is_empty(waiting)),
      do: %{state | timer: start_timer(state, @trial_ms)},
      else: state
  end

  @doc """
  Whether the death of a peer, which had the call, counts against it: alone, as one of a group, which it survives, or
  not (`:spared`).
  """
  @spec blame(t(), pos_integer(), Request.t(), non_neg_integer()) :: :died | :in_group | :spared
  def blame(%__MODULE__{trial: trial}, id, request, max_retries) do
    cond do
      trial in [[], [id]] or not suspect?(request, max_retries) -> :died
      id in trial and request.deaths < max_retries + @most_spared -> :in_group
      id in trial or request.spared >= @most_spared -> :died
      true -> :spared
    end
  end
end
