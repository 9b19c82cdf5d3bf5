defmodule DSPex.PythonBridge.Calls.LoadCounters do
  @moduledoc """
  What callers know of a pool's bridges without asking anybody: one slot a bridge, in `:atomics`.
  Choosing a bridge costs a caller well under a microsecond, and no process is in between.

  Slots are numbered from 1. Each word has one kind of writer:

    * calls: how many the bridge has. Up by callers, before they send (`take/2`), down by the bridge
      (`done/2`). Its upper half counts the bridge's lives: a call that was counted for a bridge which
      then never got it is taken back by its caller, and only if the bridge is still in that life
      (`give_back/3`); a new life starts at 0 anyhow (`reset/2`). The bit between the two, which makes
      the bridge look busier than any other, is set by the bridge when a call of its was given up and its
      peer has sent nothing since (`silent/2`, `heard/2`)
    * ready: 0, or a number that grows from one readiness to the next, so that the smallest is
      the peer that has been up longest. By the bridge
    * lent: 0 or 1. By the pool's coordinator

  What is read here is a hint: a bridge may die right after it. Whoever acts upon it gets the error.
  """

  import Bitwise

  @lives_shift 32
  @silent 1 <<< (@lives_shift - 1)
  @calls_mask @silent - 1
  @rank_mask @silent ||| @calls_mask
  # Word 1 tells where the next search starts, so that bridges with equally many calls take turns.
  @turn 1
  @words_per_slot 3

  @typedoc "The slots of one pool."
  @opaque t :: {:atomics.atomics_ref(), pos_integer()}
  @type index :: pos_integer()
  @type state :: :down | :ready
  @typedoc "One life of a bridge's process, as `take/2` found it."
  @type life :: non_neg_integer()

  @doc "That many slots; all are down."
  @spec new(pos_integer()) :: t()
  def new(size), do: {:atomics.new(1 + @words_per_slot * size, signed: true), size}

  @doc "All indexes."
  @spec indexes(t()) :: Range.t()
  def indexes({_ref, size}), do: 1..size

  ## The bridge's side

  @doc "A bridge's process starts: it has no calls, and no peer."
  @spec reset(t(), index()) :: :ok
  def reset({ref, _size} = counters, index) do
    put_state(counters, index, :down)
    change(ref, calls(index), fn word -> ((word >>> @lives_shift) + 1) <<< @lives_shift end)
  end

  @doc "Whether the bridge's peer may be given calls."
  @spec put_state(t(), index(), state()) :: :ok
  def put_state({ref, _size}, index, :down), do: :atomics.put(ref, ready(index), 0)

  def put_state({ref, _size} = counters, index, :ready) do
    heard(counters, index)
    :atomics.put(ref, ready(index), System.unique_integer([:positive, :monotonic]))
  end

  @doc "A call was given up that the bridge's peer had, and the peer has sent nothing since."
  @spec silent(t(), index()) :: :ok
  def silent({ref, _size}, index), do: change(ref, calls(index), &(&1 ||| @silent))

  @doc "The bridge's peer has sent something."
  @spec heard(t(), index()) :: :ok
  def heard({ref, _size}, index), do: change(ref, calls(index), &(&1 &&& bnot(@silent)))

  @doc "A call that was counted by `take/2` is over."
  @spec done(t(), index()) :: :ok
  def done({ref, _size}, index), do: change(ref, calls(index), &one_less/1)

  ## The callers' side

  @doc """
  A slot for the next call: ready, not lent and not among the excluded ones; nil if there is none.
  Of those the least busy one, or the one that has been up longest; one that is silent only if there is no other.
  """
  @spec pick(t(), [index()], :least_busy | :longest_up) :: index() | nil
  def pick({ref, size}, excluded \\ [], preference \\ :least_busy) do
    start = Integer.mod(:atomics.add_get(ref, @turn, 1), size)
    search(ref, size, start, size, excluded, preference, nil, nil)
  end

  @doc "Counts a call, right before it is sent."
  @spec take(t(), index()) :: life()
  def take({ref, _size}, index), do: :atomics.add_get(ref, calls(index), 1) >>> @lives_shift

  @doc "The call never reached the bridge, whose process was gone."
  @spec give_back(t(), index(), life()) :: :ok
  def give_back({ref, _size}, index, life) do
    change(ref, calls(index), fn word ->
      if word >>> @lives_shift == life, do: one_less(word), else: word
    end)
  end

  @doc "How many calls the bridge has."
  @spec busy(t(), index()) :: non_neg_integer()
  def busy({ref, _size}, index), do: :atomics.get(ref, calls(index)) &&& @calls_mask

  @doc "Since when the bridge's peer may be given calls, as a number of its own; 0 if it may not."
  @spec ready_since(t(), index()) :: non_neg_integer()
  def ready_since({ref, _size}, index), do: :atomics.get(ref, ready(index))

  @doc """
  Whether there is a bridge that `pick/3` could choose, other than those that have been ready since then.
  """
  @spec any?(t(), [{index(), since :: non_neg_integer()}]) :: boolean()
  def any?({ref, size}, but \\ []) do
    Enum.any?(1..size, fn index ->
      free?(ref, index) and {index, :atomics.get(ref, ready(index))} not in but
    end)
  end

  ## The coordinator's side

  @doc "Calls leave this bridge alone from now on."
  @spec lend(t(), index()) :: :ok
  def lend({ref, _size}, index), do: :atomics.put(ref, lent(index), 1)

  @doc "Calls may go to this bridge again."
  @spec unlend(t(), index()) :: :ok
  def unlend({ref, _size}, index), do: :atomics.put(ref, lent(index), 0)

  @doc "Whether the bridge is lent."
  @spec lent?(t(), index()) :: boolean()
  def lent?({ref, _size}, index), do: :atomics.get(ref, lent(index)) == 1

  ## Words

  defp calls(index), do: @words_per_slot * index - 1
  defp ready(index), do: @words_per_slot * index
  defp lent(index), do: @words_per_slot * index + 1

  defp free?(ref, index),
    do: :atomics.get(ref, ready(index)) > 0 and :atomics.get(ref, lent(index)) == 0

  defp search(_ref, _size, _start, 0, _excluded, _preference, best, _rank), do: best

  defp search(ref, size, start, left, excluded, preference, best, rank) do
    index = Integer.mod(start + left, size) + 1

    # An atom is greater than any number.
    with true <- free?(ref, index) and index not in excluded,
         new when new < rank <- rank(ref, index, preference) do
      search(ref, size, start, left - 1, excluded, preference, index, new)
    else
      _not_better -> search(ref, size, start, left - 1, excluded, preference, best, rank)
    end
  end

  defp rank(ref, index, :least_busy), do: :atomics.get(ref, calls(index)) &&& @rank_mask

  # Far more than there are readinesses.
  defp rank(ref, index, :longest_up),
    do: :atomics.get(ref, ready(index)) + ((:atomics.get(ref, calls(index)) &&& @silent) <<< 32)

  # Never below 0, which would take from the lives.
  defp one_less(word) when (word &&& @calls_mask) == 0, do: word
  defp one_less(word), do: word - 1

  defp change(ref, at, fun), do: change(ref, at, fun, :atomics.get(ref, at))

  defp change(ref, at, fun, word) do
    case :atomics.compare_exchange(ref, at, word, fun.(word)) do
      :ok -> :ok
      other -> change(ref, at, fun, other)
    end
  end
end
