defmodule DSPex.PythonBridge.Calls.Journal do
  @moduledoc false
  # The answers of LMs that the peers of a run have sent, as they were written. A peer that gets the run with them asks no
  # LM for these again, and makes the same tool calls.
  #
  # The bridge has one for each run, to resend it, and so has the process of the call, for the next bridge.

  alias DSPex.PythonBridge.{Error, Protocol}

  @enforce_keys [:most]
  @derive {Inspect, only: [:most, :bytes]}
  defstruct [:most, entries: [], bytes: 0]

  @typedoc """
  `entries`: the newest first; nil once they had more than `most` bytes: the run begins anew then.
  """
  @type t :: %__MODULE__{
          most: integer() | :infinity,
          entries: [binary()] | nil,
          bytes: non_neg_integer()
        }

  @doc """
  The journal of a call with these options of `DSPex.PythonBridge.Client.Caller.exchange/5`, of at most `most` bytes; nil if it
  has none. Runs have one if they have chunks or tools, and may be resent, or if their answers are `:counted`. `:journal` in the
  options has the entries that the caller has, the oldest first: there is no limit then.
  """
  @spec new(keyword(), Protocol.command(), map(), non_neg_integer()) :: t() | nil
  # The usual options first: they need no lookup.
  def new(opts, _command, _args, _most) when opts in [[], [meta: true]], do: nil

  def new(opts, command, args, most) do
    cond do
      entries = opts[:journal] -> Enum.reduce(entries, %__MODULE__{most: :infinity}, &add(&2, &1))
      command not in [:execute_program, "execute_program"] -> nil
      # The peer refuses it.
      is_map_key(args, :optimize) or is_map_key(args, "optimize") -> nil
      most == 0 or opts[:retry] == false -> if opts[:counted], do: %__MODULE__{most: 0}
      opts[:stream] || opts[:tools] || opts[:counted] -> %__MODULE__{most: most}
      true -> nil
    end
  end

  @doc "Whether an error is about the journal of a run, which may succeed without it, and whose caller has given none."
  @spec refused?(t() | nil, Error.t()) :: boolean()
  def refused?(%__MODULE__{most: most}, %Error{type: type, message: text})
      when most != :infinity do
    type == :journal_mismatch or
      (type in [:invalid_request, :invalid_args, :not_allowed, :frame_too_large] and
         String.starts_with?(text, "journal"))
  end

  def refused?(_none, _error), do: false

  @doc "A journal of the bridge's own that takes at most these bytes of a frame."
  @spec fit(t() | nil, integer()) :: t() | nil
  def fit(%__MODULE__{most: most} = journal, room) when most != :infinity and most > room do
    journal = %{journal | most: room}
    if journal.bytes > room, do: drop(journal), else: journal
  end

  def fit(journal, _room), do: journal

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
