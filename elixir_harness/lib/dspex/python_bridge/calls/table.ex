defmodule DSPex.PythonBridge.Calls.Table do
  @moduledoc false
  # The calls that wait for a reply, by id, which the peer uses, and by reference, which the caller uses. A call is
  # in the table until exactly one of these takes it out: its reply, its caller's timeout, its caller's death, the
  # death of a peer. Whichever comes later finds nothing: all races between them end like that.

  alias DSPex.PythonBridge.Calls.Request

  # counts: the number of calls of each port with any. It is read with each reply, also while thousands wait.
  # by_ref: only for callers whose time is over, so it is made when one of many calls is abandoned, and kept until all
  # are answered: without it a call, 256 at once, takes 7 % less CPU.
  defstruct by_id: %{}, by_ref: nil, counts: %{}

  @type t :: %__MODULE__{
          by_id: %{pos_integer() => Request.t()},
          by_ref: %{reference() => pos_integer()} | nil,
          counts: %{port() => pos_integer()}
        }

  @doc "An empty table."
  @spec new() :: t()
  def new, do: %__MODULE__{}

  @doc "The number of calls."
  @spec size(t()) :: non_neg_integer()
  def size(%__MODULE__{by_id: by_id}), do: map_size(by_id)

  @doc "Adds a call under a new id."
  @spec put(t(), pos_integer(), Request.t()) :: t()
  def put(%__MODULE__{by_ref: by_ref} = calls, id, %Request{ref: ref} = request) do
    %__MODULE__{
      by_id: Map.put(calls.by_id, id, request),
      by_ref: if(by_ref && ref, do: Map.put(by_ref, ref, id), else: by_ref),
      counts: count(calls.counts, request, 1)
    }
  end

  @doc "The call of an id, or nil."
  @spec get(t(), pos_integer()) :: Request.t() | nil
  def get(%__MODULE__{by_id: by_id}, id), do: Map.get(by_id, id)

  @doc "The call of an id that is in the table."
  @spec fetch!(t(), pos_integer()) :: Request.t()
  def fetch!(%__MODULE__{by_id: by_id}, id), do: Map.fetch!(by_id, id)

  @doc "Replaces a call that is in the table."
  @spec replace(t(), pos_integer(), Request.t()) :: t()
  def replace(%__MODULE__{by_id: by_id, counts: counts} = calls, id, %Request{} = request) do
    counts = counts |> count(Map.fetch!(by_id, id), -1) |> count(request, 1)
    %{calls | by_id: %{by_id | id => request}, counts: counts}
  end

  @doc "Takes a call out; nil if it is not there (any longer)."
  @spec pop(t(), pos_integer()) :: {Request.t() | nil, t()}
  def pop(%__MODULE__{by_id: by_id, by_ref: by_ref} = calls, id) do
    case by_id do
      %{^id => %Request{ref: ref} = request} ->
        rest = Map.delete(by_id, id)
        by_ref = if by_ref && rest != %{}, do: Map.delete(by_ref, ref)

        {request,
         %__MODULE__{by_id: rest, by_ref: by_ref, counts: count(calls.counts, request, -1)}}

      _gone ->
        {nil, calls}
    end
  end

  @doc "The id of the call of a caller's reference, or nil if it is not there (any longer); and the table, for the next."
  @spec id_of(t(), reference()) :: {pos_integer() | nil, t()}
  def id_of(%__MODULE__{by_ref: nil, by_id: by_id} = calls, ref) do
    by_ref = for {id, %Request{ref: ref}} when ref != nil <- by_id, into: %{}, do: {ref, id}
    {Map.get(by_ref, ref), %{calls | by_ref: by_ref}}
  end

  def id_of(%__MODULE__{by_ref: by_ref} = calls, ref), do: {Map.get(by_ref, ref), calls}

  @doc "Whether `port` has calls to answer."
  @spec busy?(t(), port()) :: boolean()
  def busy?(%__MODULE__{counts: counts}, port), do: is_map_key(counts, port)

  @doc """
  The calls of `port`, oldest first; with nil, those that no peer has. It reads the whole table, so it is for what
  happens once for each peer, not for each call.
  """
  @spec at(t(), port() | nil) :: [{pos_integer(), Request.t()}]
  def at(%__MODULE__{by_id: by_id}, port),
    do: Enum.sort(for {id, %Request{at: ^port} = request} <- by_id, do: {id, request})

  defp count(counts, %Request{at: nil}, _by), do: counts

  defp count(counts, %Request{at: port}, by) do
    case counts do
      %{^port => 1} when by == -1 -> Map.delete(counts, port)
      %{^port => calls} -> %{counts | port => calls + by}
      _none -> Map.put(counts, port, 1)
    end
  end
end
