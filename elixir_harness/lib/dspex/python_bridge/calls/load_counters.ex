defmodule DSPex.PythonBridge.Calls.LoadCounters do
  @moduledoc false
  # The load and readiness of a pool's bridges, in `:atomics`: callers choose a bridge in well under a microsecond
  # and ask no process.
  #
  # Each bridge has a slot, numbered from 1, of five words, each with one kind of writer:
  #
  #   * calls: the number of calls that the bridge has, and a bit with which a bridge looks busier than any other: its
  #     peer is silent, or has just started (`put_calls/4`). The bridge writes it
  #   * sent: how many calls were sent to the bridge, ever, and when the last one was. A caller writes both right before it
  #     sends (`ticket/2`), so that many that choose at once do not all choose the same bridge
  #   * received: the last of their numbers that the bridge has received (`arrived/3`). So calls that were never sent,
  #     since their callers were killed, count until the next call arrives, or for `@on_the_way_ms`
  #   * ready: 0, or a number that grows from one readiness to the next, so that the smallest is that of the peer that has
  #     been up longest. The bridge writes it
  #
  # A value may be outdated when it is used: a bridge may die right after it. Then the caller gets the error.

  import Bitwise

  alias DSPex.PythonBridge.OTP.Deadline

  @silent 1 <<< 31
  # If the last call to a bridge was sent longer ago, none is on its way any more: one takes microseconds.
  @on_the_way_ms 20
  # Word 1 is where the next search starts, so that equally busy bridges are used round-robin.
  @turn 1
  @words_per_slot 5

  @typedoc "The slots of one pool."
  @opaque t :: {:atomics.atomics_ref(), pos_integer()}
  @type index :: pos_integer()
  @typedoc "A bridge's slot in its pool, and the names of the pool's coordinator and of the bridge's monitor."
  @type slot :: {t(), index(), coordinator :: atom(), monitor :: atom()}
  @type state :: :down | :ready
  @typedoc "The number of a call to a bridge."
  @type ticket :: pos_integer()

  @doc "Counters with that many slots, all down."
  @spec new(pos_integer()) :: t()
  def new(size), do: {:atomics.new(1 + @words_per_slot * size, signed: true), size}

  @doc "All indexes."
  @spec indexes(t()) :: Range.t()
  def indexes({_ref, size}), do: 1..size

  ## For the bridge

  @doc "A bridge's process starts, without calls and without a peer."
  @spec reset(t(), index()) :: :ok
  def reset({ref, _size} = counters, index) do
    put_state(counters, index, :down)
    :atomics.put(ref, calls(index), 0)
    :atomics.put(ref, received(index), :atomics.get(ref, sent(index)))
  end

  @doc "Sets whether the bridge's peer may get calls."
  @spec put_state(t(), index(), state()) :: :ok
  def put_state({ref, _size}, index, :down), do: :atomics.put(ref, ready(index), 0)

  def put_state({ref, _size}, index, :ready),
    do: :atomics.put(ref, ready(index), System.unique_integer([:positive, :monotonic]))

  @doc "The bridge has received the call of this number."
  @spec arrived(t(), index(), ticket()) :: :ok
  def arrived({ref, _size}, index, ticket), do: :atomics.put(ref, received(index), ticket)

  @doc """
  Sets the number of calls that the bridge has. It is chosen `last?` if a call to its peer was given up, and that has
  sent nothing since, or if it has just started.
  """
  @spec put_calls(t(), index(), non_neg_integer(), last? :: boolean()) :: :ok
  def put_calls({ref, _size}, index, count, last?),
    do: :atomics.put(ref, calls(index), if(last?, do: count ||| @silent, else: count))

  ## For callers

  @doc """
  The slot for the next call: ready and not excluded; nil if there is none. It is the least busy one,
  or the one that has been up longest; a silent one only as the last resort.
  """
  @spec pick(t(), [index()], :least_busy | :longest_up) :: index() | nil
  def pick({ref, size}, excluded \\ [], preference \\ :least_busy) do
    start = rem(:atomics.add_get(ref, @turn, 1), size)
    search(ref, size, start, size, excluded, preference, nil, nil)
  end

  @doc "The number of a call that is sent next."
  @spec ticket(t(), index()) :: ticket()
  def ticket({ref, _size}, index) do
    # First, so that no new call looks old.
    :atomics.put(ref, sent_at(index), Deadline.now())
    :atomics.add_get(ref, sent(index), 1)
  end

  @doc "The number of calls that a bridge has, or that are on their way to it."
  @spec busy(t(), index()) :: non_neg_integer()
  def busy({ref, _size}, index),
    do: on_the_way_too(ref, index, :atomics.get(ref, calls(index))) &&& bnot(@silent)

  @doc "The number of the peer's readiness; 0 if it may not get calls."
  @spec ready_since(t(), index()) :: non_neg_integer()
  def ready_since({ref, _size}, index), do: :atomics.get(ref, ready(index))

  @doc """
  Whether `pick/3` could choose a bridge, other than those of these readinesses.
  """
  @spec any?(t(), [{index(), since :: non_neg_integer()}]) :: boolean()
  def any?({ref, size}, but \\ []) do
    Enum.any?(1..size, fn index ->
      since = :atomics.get(ref, ready(index))
      since > 0 and {index, since} not in but
    end)
  end

  @doc "Of these readinesses those that last: a slot that has become ready again since is another one."
  @spec still(t(), [{index(), since :: non_neg_integer()}]) :: [index()]
  def still(_counters, []), do: []

  def still(counters, slots),
    do: for({index, since} <- slots, ready_since(counters, index) == since, do: index)

  ## Words

  # For each call.
  @compile {:inline, calls: 1, ready: 1, sent: 1, received: 1, sent_at: 1, rank: 3}

  defp calls(index), do: @words_per_slot * index - 3
  defp ready(index), do: @words_per_slot * index - 2
  defp received(index), do: @words_per_slot * index - 1
  defp sent(index), do: @words_per_slot * index
  defp sent_at(index), do: @words_per_slot * index + 1

  defp search(_ref, _size, _start, 0, _excluded, _preference, best, _rank), do: best

  defp search(ref, size, start, left, excluded, preference, best, rank) do
    index = rem(start + left, size) + 1

    # An atom is greater than any number.
    with true <- :atomics.get(ref, ready(index)) > 0 and not :lists.member(index, excluded),
         new when new < rank <- rank(ref, index, preference) do
      search(ref, size, start, left - 1, excluded, preference, index, new)
    else
      _not_better -> search(ref, size, start, left - 1, excluded, preference, best, rank)
    end
  end

  defp rank(ref, index, :least_busy),
    do: on_the_way_too(ref, index, :atomics.get(ref, calls(index)))

  # More than any number of a readiness.
  defp rank(ref, index, :longest_up),
    do: :atomics.get(ref, ready(index)) + ((:atomics.get(ref, calls(index)) &&& @silent) <<< 32)

  defp on_the_way_too(ref, index, calls) do
    on_the_way = :atomics.get(ref, sent(index)) - :atomics.get(ref, received(index))

    if on_the_way > 0 and Deadline.now() - :atomics.get(ref, sent_at(index)) < @on_the_way_ms,
      do: calls + on_the_way,
      else: calls
  end
end
