defmodule DSPex.PythonBridge.Calls.LoadCounters do
  @moduledoc false
  # The load and readiness of a pool's bridges, in `:atomics`: callers choose a bridge in well under a microsecond
  # and ask no process.
  #
  # Each bridge has a slot, numbered from 1, of three words, each with one kind of writer:
  #
  #   * calls: the number of calls that the bridge has. Callers increment it before they send (`take/2`), the bridge
  #     decrements it (`done/2`). Its upper half counts the lives of the bridge's process: a caller whose call never
  #     reached the bridge decrements it, but only in the same life (`give_back/3`); each life starts at 0 (`reset/2`). The
  #     bit between the two, with which a bridge looks busier than any other, is set by the bridge when a call was given
  #     up and its peer has sent nothing since (`silent/2`, `heard/2`)
  #   * ready: 0, or a number that grows from one readiness to the next, so that the smallest is that of the peer that has
  #     been up longest. The bridge writes it
  #   * checked out: 0 or 1. The pool's coordinator writes it
  #
  # A value may be outdated when it is used: a bridge may die right after it. Then the caller gets the error.
  #
  # A caller that is killed after `take/2`, and before it has sent the call some microseconds later, leaves its count until
  # the next life of the bridge, which until then looks busier than it is by one.

  import Bitwise

  @lives_shift 32
  @silent 1 <<< (@lives_shift - 1)
  @calls_mask @silent - 1
  @rank_mask @silent ||| @calls_mask
  # Word 1 is where the next search starts, so that equally busy bridges are used round-robin.
  @turn 1
  @words_per_slot 3

  @typedoc "The slots of one pool."
  @opaque t :: {:atomics.atomics_ref(), pos_integer()}
  @type index :: pos_integer()
  @typedoc "A bridge's slot in its pool, and the names of the pool's coordinator and of the bridge's monitor."
  @type slot :: {t(), index(), coordinator :: atom(), monitor :: atom()}
  @type state :: :down | :ready
  @typedoc "The number of a life of a bridge's process."
  @type life :: non_neg_integer()

  @doc "Counters with that many slots, all down."
  @spec new(pos_integer()) :: t()
  def new(size), do: {:atomics.new(1 + @words_per_slot * size, signed: true), size}

  @doc "All indexes."
  @spec indexes(t()) :: Range.t()
  def indexes({_ref, size}), do: 1..size

  ## For the bridge

  @doc "Starts a life of a bridge's process, without calls and without a peer."
  @spec reset(t(), index()) :: :ok
  def reset({ref, _size} = counters, index) do
    put_state(counters, index, :down)
    change(ref, calls(index), fn word -> ((word >>> @lives_shift) + 1) <<< @lives_shift end)
  end

  @doc "Sets whether the bridge's peer may get calls."
  @spec put_state(t(), index(), state()) :: :ok
  def put_state({ref, _size}, index, :down), do: :atomics.put(ref, ready(index), 0)

  def put_state({ref, _size} = counters, index, :ready) do
    heard(counters, index)
    :atomics.put(ref, ready(index), System.unique_integer([:positive, :monotonic]))
  end

  @doc "Marks a bridge whose peer had a call that was given up, and has sent nothing since."
  @spec silent(t(), index()) :: :ok
  def silent({ref, _size}, index), do: change(ref, calls(index), &(&1 ||| @silent))

  @doc "Removes the mark: the peer has sent something."
  @spec heard(t(), index()) :: :ok
  def heard({ref, _size}, index), do: change(ref, calls(index), &(&1 &&& bnot(@silent)))

  @doc "Counts a call out that was counted by `take/2`."
  @spec done(t(), index()) :: :ok
  def done({ref, _size}, index), do: change(ref, calls(index), &one_less/1)

  ## For callers

  @doc """
  The slot for the next call: ready, not checked out and not excluded; nil if there is none. It is the least busy one,
  or the one that has been up longest; a silent one only as the last resort.
  """
  @spec pick(t(), [index()], :least_busy | :longest_up) :: index() | nil
  def pick({ref, size}, excluded \\ [], preference \\ :least_busy) do
    start = rem(:atomics.add_get(ref, @turn, 1), size)
    search(ref, size, start, size, excluded, preference, nil, nil)
  end

  @doc "Counts a call in, right before it is sent."
  @spec take(t(), index()) :: life()
  def take({ref, _size}, index), do: :atomics.add_get(ref, calls(index), 1) >>> @lives_shift

  @doc "Counts a call out that never reached the bridge, whose process had ended."
  @spec give_back(t(), index(), life()) :: :ok
  def give_back({ref, _size}, index, life) do
    change(ref, calls(index), fn word ->
      if word >>> @lives_shift == life, do: one_less(word), else: word
    end)
  end

  @doc "The number of calls of a bridge."
  @spec busy(t(), index()) :: non_neg_integer()
  def busy({ref, _size}, index), do: :atomics.get(ref, calls(index)) &&& @calls_mask

  @doc "The number of the peer's readiness; 0 if it may not get calls."
  @spec ready_since(t(), index()) :: non_neg_integer()
  def ready_since({ref, _size}, index), do: :atomics.get(ref, ready(index))

  @doc """
  Whether `pick/3` could choose a bridge, other than those of these readinesses.
  """
  @spec any?(t(), [{index(), since :: non_neg_integer()}]) :: boolean()
  def any?({ref, size}, but \\ []) do
    Enum.any?(1..size, fn index ->
      free?(ref, index) and {index, :atomics.get(ref, ready(index))} not in but
    end)
  end

  ## For the coordinator

  @doc "Excludes a bridge from the choice."
  @spec check_out(t(), index()) :: :ok
  def check_out({ref, _size}, index), do: :atomics.put(ref, checked_out(index), 1)

  @doc "Includes a bridge in the choice again."
  @spec check_in(t(), index()) :: :ok
  def check_in({ref, _size}, index), do: :atomics.put(ref, checked_out(index), 0)

  @doc "Whether a bridge is checked out."
  @spec checked_out?(t(), index()) :: boolean()
  def checked_out?({ref, _size}, index), do: :atomics.get(ref, checked_out(index)) == 1

  ## Words

  # For each call.
  @compile {:inline, calls: 1, ready: 1, checked_out: 1, free?: 2, rank: 3, change: 3}

  defp calls(index), do: @words_per_slot * index - 1
  defp ready(index), do: @words_per_slot * index
  defp checked_out(index), do: @words_per_slot * index + 1

  defp free?(ref, index),
    do: :atomics.get(ref, ready(index)) > 0 and :atomics.get(ref, checked_out(index)) == 0

  defp search(_ref, _size, _start, 0, _excluded, _preference, best, _rank), do: best

  defp search(ref, size, start, left, excluded, preference, best, rank) do
    index = rem(start + left, size) + 1

    # An atom is greater than any number.
    with true <- free?(ref, index) and not :lists.member(index, excluded),
         new when new < rank <- rank(ref, index, preference) do
      search(ref, size, start, left - 1, excluded, preference, index, new)
    else
      _not_better -> search(ref, size, start, left - 1, excluded, preference, best, rank)
    end
  end

  defp rank(ref, index, :least_busy), do: :atomics.get(ref, calls(index)) &&& @rank_mask

  # More than any number of a readiness.
  defp rank(ref, index, :longest_up),
    do: :atomics.get(ref, ready(index)) + ((:atomics.get(ref, calls(index)) &&& @silent) <<< 32)

  # Never below 0, which would change the number of the life.
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
