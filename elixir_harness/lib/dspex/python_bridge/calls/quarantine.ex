defmodule DSPex.PythonBridge.Calls.Quarantine do
  @moduledoc false
  # Finds out which of the calls that a peer died with has killed it: part of `DSPex.PythonBridge.Calls.InFlight`.
  #
  # A call with which peers died is a suspect from the second death on, or when it has only one retry left. Suspects are
  # tried in groups, and all other calls are held, until the group is answered or has outlived the time in which the last
  # peer died. If a group dies, there are enough retries left to sort its members; a call on its last retry is tried
  # alone. So a call that kills each time is sent once and `max_retries` times again, and no other call fails by it.

  # The least time after which a suspect without an answer is acquitted.
  @acquit_ms 1_000
  # The longest: all other calls wait meanwhile.
  @longest_acquit_ms 5_000

  @enforce_keys [:max_retries]
  defstruct [
    :max_retries,
    :timer,
    waiting: %{},
    on_trial: %{},
    trial?: false,
    acquit_ms: @acquit_ms
  ]

  @typedoc """
  `waiting`: suspects by the number of peers that died with them; no number has an empty set. `on_trial`: suspects
  that are in flight. `trial?`: whether all other calls are held.
  """
  @type t :: %__MODULE__{
          max_retries: non_neg_integer(),
          timer: reference() | nil,
          waiting: %{(deaths :: pos_integer()) => :gb_sets.set(id())},
          on_trial: %{id() => true},
          trial?: boolean(),
          acquit_ms: pos_integer()
        }
  @type id :: pos_integer()

  @doc "A quarantine without suspects."
  @spec new(non_neg_integer()) :: t()
  def new(max_retries), do: %__MODULE__{max_retries: max_retries}

  @doc "Whether a call with which so many peers died is a suspect."
  @spec suspect?(t(), non_neg_integer()) :: boolean()
  def suspect?(%__MODULE__{}, 0), do: false
  def suspect?(%__MODULE__{max_retries: most}, deaths), do: deaths >= 2 or deaths >= most

  @doc "Adds a suspect, which waits to be tried."
  @spec add(t(), id(), pos_integer()) :: t()
  def add(%__MODULE__{waiting: waiting} = quarantine, id, deaths) do
    alike = :gb_sets.add(id, Map.get(waiting, deaths, :gb_sets.empty()))
    %{quarantine | waiting: Map.put(waiting, deaths, alike)}
  end

  @doc "Removes a suspect that waits."
  @spec drop(t(), id(), non_neg_integer()) :: t()
  def drop(%__MODULE__{waiting: waiting} = quarantine, id, deaths)
      when is_map_key(waiting, deaths),
      do: leave_waiting(quarantine, deaths, :gb_sets.delete_any(id, Map.fetch!(waiting, deaths)))

  def drop(%__MODULE__{} = quarantine, _id, _deaths), do: quarantine

  defp leave_waiting(%__MODULE__{waiting: waiting} = quarantine, deaths, alike) do
    if :gb_sets.is_empty(alike),
      do: %{quarantine | waiting: Map.delete(waiting, deaths)},
      else: %{quarantine | waiting: Map.put(waiting, deaths, alike)}
  end

  @doc "Whether suspects wait."
  @spec any?(t()) :: boolean()
  def any?(%__MODULE__{waiting: waiting}), do: waiting != %{}

  @doc """
  Takes the next group, from those with which the fewest peers died. With `left` retries after this one, n suspects
  need the fewest rounds in groups of n to the power of left / (left + 1).

      iex> alias DSPex.PythonBridge.Calls.Quarantine
      iex> quarantine = Enum.reduce(1..16, Quarantine.new(3), &Quarantine.add(&2, &1, 2))
      iex> {group, _rest} = Quarantine.take_group(quarantine)
      iex> group
      [1, 2, 3, 4]
  """
  @spec take_group(t()) :: {[id(), ...], t()}
  def take_group(%__MODULE__{waiting: waiting, max_retries: most} = quarantine) do
    fewest = waiting |> Map.keys() |> Enum.min()
    alike = Map.fetch!(waiting, fewest)
    left = max(most - fewest, 0)
    # Rounding may give one more than there are.
    size = ceil(:math.pow(:gb_sets.size(alike), left / (left + 1)))
    {group, alike} = take(alike, min(size, :gb_sets.size(alike)), [])
    {group, leave_waiting(quarantine, fewest, alike)}
  end

  # The cost only depends on the size of the group, not on the number of suspects.
  defp take(ids, 0, taken), do: {Enum.reverse(taken), ids}

  defp take(ids, count, taken) do
    {id, ids} = :gb_sets.take_smallest(ids)
    take(ids, count - 1, [id | taken])
  end

  @doc """
  Puts calls in flight on trial. `{:timeout, timer, :acquit}` comes to the calling process when they have outlived
  their time.
  """
  @spec try_out(t(), [id()]) :: t()
  def try_out(%__MODULE__{} = quarantine, ids) do
    quarantine = stop(quarantine)
    timer = :erlang.start_timer(quarantine.acquit_ms, self(), :acquit)
    %{quarantine | trial?: true, timer: timer, on_trial: Map.from_keys(ids, true)}
  end

  @doc "Whether calls are on trial."
  @spec trying?(t()) :: boolean()
  def trying?(%__MODULE__{on_trial: on_trial}), do: on_trial != %{}

  @doc "Removes a call from the trial: it was answered, or nobody waits for it any longer."
  @spec leave(t(), id()) :: t()
  def leave(%__MODULE__{} = quarantine, id),
    do: %{quarantine | on_trial: Map.delete(quarantine.on_trial, id)}

  @doc "Acquits the calls on trial, when the timer has fired; the timer of an earlier trial changes nothing."
  @spec acquit(t(), reference()) :: t()
  def acquit(%__MODULE__{timer: timer} = quarantine, timer),
    do: %{quarantine | on_trial: %{}, timer: nil}

  def acquit(%__MODULE__{} = quarantine, _earlier), do: quarantine

  @doc "Ends the trial."
  @spec stop(t()) :: t()
  def stop(%__MODULE__{trial?: false} = quarantine), do: quarantine

  def stop(%__MODULE__{} = quarantine) do
    if quarantine.timer, do: :erlang.cancel_timer(quarantine.timer, async: true, info: false)
    %{quarantine | trial?: false, timer: nil, on_trial: %{}}
  end

  @doc "Learns from a death, at most so many ms after the call that caused it: the next one may take as long."
  @spec learn(t(), non_neg_integer()) :: t()
  def learn(%__MODULE__{} = quarantine, ms),
    do: %{quarantine | acquit_ms: min(max(@acquit_ms, 2 * ms), @longest_acquit_ms)}
end
