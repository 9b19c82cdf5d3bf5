defmodule DSPex.PythonBridge.Calls.Suspects do
  @moduledoc false
  # Calls that were in flight at two deaths of a peer, or have one retry left: any of them may be what kills it. They
  # are tried one at a time, and no other call waits for them.
  #
  # A trial ends when the suspect is answered, or has run for a second: then it goes on beside the next, so that a slow
  # one holds nobody. After each trial that nobody died of twice as many are tried together, so that hundreds of
  # innocent ones are through in some seconds; after a death one again. Those with the most deaths come first, and of
  # these the youngest, since a call that kills at once was sent just before the first death. A peer that has just
  # taken over gets the first suspect a second after the other calls: one of these may kill, too.
  #
  # If a peer dies during a trial of one suspect, that one is blamed, and the other suspects are not: so a call that
  # kills within a second takes no other with it. One that kills later than that is spared `@most_spared` times at most,
  # and others that run as long may be blamed for it.

  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.Protocol

  @trial_ms 1_000
  @most_spared 8
  # As many as a peer runs at once.
  @largest_trial 256

  defstruct waiting: :gb_sets.empty(), trial: [], size: 1, timer: nil

  @typedoc "`waiting`: deaths and id of each, negated; `trial`: the ids on trial. `timer`: of the trial, or of the pause."
  @type t :: %__MODULE__{
          waiting: :gb_sets.set({integer(), integer()}),
          trial: [pos_integer()],
          size: pos_integer(),
          timer: reference() | nil
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
  @spec next(t()) :: {[pos_integer()], t()}
  def next(%__MODULE__{timer: nil, size: size} = state) do
    case take(state.waiting, size, []) do
      {[], _none} -> {[], state}
      {ids, waiting} -> {ids, %{state | trial: ids, waiting: waiting, timer: start_timer()}}
    end
  end

  def next(%__MODULE__{} = state), do: {[], state}

  defp take(waiting, size, ids) do
    if size == 0 or :gb_sets.is_empty(waiting) do
      {ids, waiting}
    else
      {{_deaths, place}, waiting} = :gb_sets.take_smallest(waiting)
      take(waiting, size - 1, [-place | ids])
    end
  end

  defp start_timer, do: :erlang.start_timer(@trial_ms, self(), :trial)

  @doc "Handles the timer `:trial`."
  @spec timeout(t(), reference()) :: t()
  def timeout(%__MODULE__{timer: timer, trial: []} = state, timer), do: %{state | timer: nil}
  def timeout(%__MODULE__{timer: timer} = state, timer), do: trial_over(state)
  # Of an earlier trial.
  def timeout(%__MODULE__{} = state, _timer), do: state

  defp trial_over(state),
    do: %{stop(state) | size: min(2 * state.size, @largest_trial)}

  @doc "Ends the trial: the peer has died, or serves no longer."
  @spec stop(t()) :: t()
  def stop(%__MODULE__{timer: timer} = state) do
    if timer, do: :erlang.cancel_timer(timer, async: true, info: false)
    %{state | trial: [], size: 1, timer: nil}
  end

  @doc "As `stop/1`, and the next trial comes after a pause."
  @spec pause(t()) :: t()
  def pause(%__MODULE__{} = state), do: %{stop(state) | timer: start_timer()}

  @doc "Whether the death of a peer, which had the call, counts against it."
  @spec blamed?(t(), pos_integer(), Request.t(), non_neg_integer()) :: boolean()
  def blamed?(%__MODULE__{trial: []}, _id, _request, _max_retries), do: true
  def blamed?(%__MODULE__{trial: [id]}, id, _request, _max_retries), do: true

  def blamed?(%__MODULE__{}, _id, request, max_retries),
    do: request.spared >= @most_spared or not suspect?(request, max_retries)
end
