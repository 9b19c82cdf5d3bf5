defmodule DSPex.PythonBridge.Calls.Journal do
  @moduledoc false
  # The answers of LMs that the peers of a run have sent, as they were written. A peer that gets the run with them asks no
  # LM for these again, and makes the same tool calls.
  #
  # The bridge has one for each run, to resend it, and so has the process of the call, for the next bridge.

  @enforce_keys [:most]
  @derive {Inspect, only: [:most, :bytes]}
  defstruct [:most, entries: [], bytes: 0]

  @typedoc """
  `entries`: the newest first; nil once they had more than `most` bytes: the run begins anew then.
  """
  @type t :: %__MODULE__{
          most: pos_integer() | :infinity,
          entries: [binary()] | nil,
          bytes: non_neg_integer()
        }

  @doc """
  The journal of a call with these options of `DSPex.PythonBridge.Client.Caller.exchange/5`; nil if it needs none. `:journal` in
  them has the entries that the caller has, the oldest first: there is no limit then.
  """
  @spec new(keyword()) :: t() | nil
  def new(opts) do
    if entries = opts[:journal],
      do: Enum.reduce(entries, %__MODULE__{most: :infinity}, &add(&2, &1))
  end

  @doc "Adds an entry."
  @spec add(t(), binary()) :: t()
  def add(%__MODULE__{entries: nil} = journal, _entry), do: journal

  def add(%__MODULE__{entries: entries, bytes: bytes} = journal, entry) do
    # And its comma.
    bytes = bytes + byte_size(entry) + 1
    # An integer is less than any atom.
    if bytes > journal.most,
      do: drop(journal),
      else: %{journal | entries: [entry | entries], bytes: bytes}
  end

  @doc "Forgets the entries."
  @spec drop(t() | nil) :: t() | nil
  def drop(nil), do: nil
  def drop(%__MODULE__{} = journal), do: %{journal | entries: nil, bytes: 0}

  @doc "The bytes that it adds to a request."
  @spec bytes(t() | nil) :: non_neg_integer()
  def bytes(nil), do: 0
  def bytes(%__MODULE__{bytes: bytes}), do: bytes

  @doc "The body of a request with its journal."
  @spec body(t() | nil, binary()) :: iodata()
  def body(%__MODULE__{entries: entries}, body) when entries != nil do
    entries = entries |> Enum.reverse() |> Enum.intersperse(?,)
    [~s(,"journal":[), entries, ?], body]
  end

  def body(_none, body), do: body
end
