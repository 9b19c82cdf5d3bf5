defmodule DSPex.PythonBridge.Calls.Quarantine do
  @moduledoc """
  Which of the calls that a peer died with is what it died of: part of
  `DSPex.PythonBridge.Calls.InFlight`.

  A call with which peers died is a suspect from the second death on, or when only one retry is left.
  Suspects are tried in groups, and everything else is held meanwhile, until the group is answered or has
  outlived the time in which the last peer died. A group is as large as leaves, if it dies, enough retries
  to sort its members; a call on its last retry is tried alone. So what kills each time is sent once and
  `max_retries` times again, and nothing else fails by it.
  """

  # So long at least a suspect must live to be acquitted without an answer.
  @acquit_ms 1_000
  # And so long at most: all others wait meanwhile.
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
  `waiting`: by the peers that died with them, a few numbers of which none has no id. `on_trial`: those in
  flight of which it is not known. `trial?`: whether everything else is held.
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

  @doc "Nobody is suspected."
  @spec new(non_neg_integer()) :: t()
  def new(max_retries), do: %__MODULE__{max_retries: max_retries}

  @doc "Whether a call with which so many peers died must not be sent beside others."
  @spec suspect?(t(), non_neg_integer()) :: boolean()
  def suspect?(%__MODULE__{}, 0), do: false
  def suspect?(%__MODULE__{max_retries: most}, deaths), do: deaths >= 2 or deaths >= most

  @doc "A suspect waits to be tried."
  @spec add(t(), id(), pos_integer()) :: t()
  def add(%__MODULE__{waiting: waiting} = quarantine, id, deaths) do
    alike = :gb_sets.add(id, Map.get(waiting, deaths, :gb_sets.empty()))
    %{quarantine | waiting: Map.put(waiting, deaths, alike)}
  end

  @doc "It does so no longer."
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

  @doc "Whether any waits."
  @spec any?(t()) :: boolean()
  def any?(%__MODULE__{waiting: waiting}), do: waiting != %{}

  @doc """
  The next group: of those with which the fewest peers died. With `left` retries after this one, n
  suspects take the fewest rounds in groups of n to the power of left / (left + 1).

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
    # Not more than there are, whatever the rounding.
    size = ceil(:math.pow(:gb_sets.size(alike), left / (left + 1)))
    {group, alike} = take(alike, min(size, :gb_sets.size(alike)), [])
    {group, leave_waiting(quarantine, fewest, alike)}
  end

  # What a group costs depends on its size alone: alone, each of thousands is one.
  defp take(ids, 0, taken), do: {Enum.reverse(taken), ids}

  defp take(ids, count, taken) do
    {id, ids} = :gb_sets.take_smallest(ids)
    take(ids, count - 1, [id | taken])
  end

  @doc """
  These are in flight and may kill the peer. `{:timeout, timer, :acquit}` comes to the calling process
  when they have outlived their time.
  """
  @spec try_out(t(), [id()]) :: t()
  def try_out(%__MODULE__{} = quarantine, ids) do
    quarantine = stop(quarantine)
    timer = :erlang.start_timer(quarantine.acquit_ms, self(), :acquit)
    %{quarantine | trial?: true, timer: timer, on_trial: Map.from_keys(ids, true)}
  end

  @doc "Whether some are being tried."
  @spec trying?(t()) :: boolean()
  def trying?(%__MODULE__{on_trial: on_trial}), do: on_trial != %{}

  @doc "One was answered, or is not waited for any more."
  @spec leave(t(), id()) :: t()
  def leave(%__MODULE__{} = quarantine, id),
    do: %{quarantine | on_trial: Map.delete(quarantine.on_trial, id)}

  @doc "The timer has fired; one of an earlier trial changes nothing."
  @spec acquit(t(), reference()) :: t()
  def acquit(%__MODULE__{timer: timer} = quarantine, timer),
    do: %{quarantine | on_trial: %{}, timer: nil}

  def acquit(%__MODULE__{} = quarantine, _earlier), do: quarantine

  @doc "The trial is over, or the peer is."
  @spec stop(t()) :: t()
  def stop(%__MODULE__{trial?: false} = quarantine), do: quarantine

  def stop(%__MODULE__{} = quarantine) do
    if quarantine.timer, do: :erlang.cancel_timer(quarantine.timer, async: true, info: false)
    %{quarantine | trial?: false, timer: nil, on_trial: %{}}
  end

  @doc "A peer died so many ms after it was given what it died of, at most: next time is like it."
  @spec learn(t(), non_neg_integer()) :: t()
  def learn(%__MODULE__{} = quarantine, ms),
    do: %{quarantine | acquit_ms: min(max(@acquit_ms, 2 * ms), @longest_acquit_ms)}
end
