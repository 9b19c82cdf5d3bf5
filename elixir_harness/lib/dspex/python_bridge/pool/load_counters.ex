defmodule DSPex.PythonBridge.Pool.LoadCounters do
  @moduledoc false
  # The load and readiness of a pool's bridges, in `:atomics`: callers choose a bridge in well under a microsecond
  # and ask no process.
  #
  # Each bridge has a slot, numbered from 1, of two words:
  #
  #   * calls: the number of calls that the bridge has, and a bit with which a bridge looks busier than any other: its
  #     peer is silent, or has just started (`put_calls/4`). The bridge writes it. A caller adds one right before it sends
  #     (`sending/2`), so that many that choose at once do not all choose the same bridge
  #   * ready: 0, or a number that grows from one readiness to the next. The bridge writes it
  #
  # A value may be outdated when it is used: a bridge may die right after it. Then the caller gets the error.

  import Bitwise

  @last 1 <<< 31
  # Word 1 is where the next search starts, so that equally busy bridges are used round-robin.
  @turn 1

  @typedoc "The slots of one pool."
  @opaque t :: {:atomics.atomics_ref(), pos_integer()}
  @type index :: pos_integer()

  @doc "Counters with that many slots, all down."
  @spec new(pos_integer()) :: t()
  def new(size), do: {:atomics.new(1 + 2 * size, signed: true), size}

  @doc "All indexes."
  @spec indexes(t()) :: Range.t()
  def indexes({_ref, size}), do: 1..size

  @doc "Sets whether the bridge's peer may get calls."
  @spec put_state(t(), index(), :ready | :down) :: :ok
  def put_state({ref, _size}, index, :down), do: :atomics.put(ref, ready(index), 0)

  def put_state({ref, _size}, index, :ready),
    do: :atomics.put(ref, ready(index), System.unique_integer([:positive, :monotonic]))

  @doc """
  Sets the number of calls that the bridge has. It is chosen `last?` if a call to its peer was given up, and that has
  sent nothing since, or if it has just started.
  """
  @spec put_calls(t(), index(), non_neg_integer(), last? :: boolean()) :: :ok
  def put_calls({ref, _size}, index, count, last?),
    do: :atomics.put(ref, calls(index), if(last?, do: count ||| @last, else: count))

  @doc """
  The slot for the next call: the least busy one that is ready and not excluded, a silent one only as the last
  resort; nil if there is none.
  """
  @spec pick(t(), [index()]) :: index() | nil
  def pick({ref, size}, excluded \\ []) do
    start = rem(:atomics.add_get(ref, @turn, 1), size)
    search(ref, size, start, size, excluded, nil, nil)
  end

  @doc "A call is sent next."
  @spec sending(t(), index()) :: :ok
  def sending({ref, _size}, index), do: :atomics.add(ref, calls(index), 1)

  @doc "The number of calls that a bridge has, or that are on their way to it."
  @spec busy(t(), index()) :: non_neg_integer()
  def busy({ref, _size}, index), do: :atomics.get(ref, calls(index)) &&& bnot(@last)

  @doc "The number of the peer's readiness; 0 if it may not get calls."
  @spec ready_since(t(), index()) :: non_neg_integer()
  def ready_since({ref, _size}, index), do: :atomics.get(ref, ready(index))

  @doc "Whether `pick/2` could choose a bridge, other than those of these readinesses."
  @spec any?(t(), [{index(), since :: non_neg_integer()}]) :: boolean()
  def any?({_ref, size} = counters, but \\ []) do
    Enum.any?(1..size, fn index ->
      since = ready_since(counters, index)
      since > 0 and {index, since} not in but
    end)
  end

  @doc "Of these readinesses those that last: a slot that has become ready again since is another one."
  @spec still(t(), [{index(), since :: non_neg_integer()}]) :: [index()]
  def still(_counters, []), do: []

  def still(counters, slots),
    do: for({index, since} <- slots, ready_since(counters, index) == since, do: index)

  # For each call.
  @compile {:inline, calls: 1, ready: 1}

  defp calls(index), do: 2 * index
  defp ready(index), do: 2 * index + 1

  defp search(_ref, _size, _start, 0, _excluded, best, _least), do: best

  defp search(ref, size, start, left, excluded, best, least) do
    index = rem(start + left, size) + 1

    # An atom is greater than any number.
    with true <- :atomics.get(ref, ready(index)) > 0 and not :lists.member(index, excluded),
         count when count < least <- :atomics.get(ref, calls(index)) do
      search(ref, size, start, left - 1, excluded, index, count)
    else
      _not_better -> search(ref, size, start, left - 1, excluded, best, least)
    end
  end
end
