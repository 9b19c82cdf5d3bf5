defmodule DSPex.PythonBridge.Calls.Table do
  @moduledoc """
  The calls that wait for a reply, by id (the peer's name for a call) and by reference (the
  caller's name for it). A call is in the table until exactly one of these takes it out: its
  reply, its caller's timeout, its caller's death, a peer's death that it may not outlive. Whoever
  comes later finds nothing: that is how every race between them ends.
  """

  defmodule Call do
    @moduledoc """
    One call:

      * `ref` – the caller's alias; nil: nobody waits
      * `watch` – what watches over it
      * `deadline` – monotonic ms, or `:infinity`
      * `body` – of the request, kept to be sent again, or for the change that it makes
      * `retry` – what is done about a peer's death: `:here` sends it again, `:never` fails,
        `:caller` tells the caller, who knows other peers
      * `what` – the change that it makes to the programs, if any
      * `deaths` – the peers that died with it
      * `at` – the port that it was given to; nil: to none yet
      * `since` – when it was given to that
      * `stream?` – whether the caller takes chunks
      * `tools?` – whether it has given tools
      * `begun?` – whether it has been given a chunk: the call cannot be begun anew
    """

    @enforce_keys [:ref, :watch, :deadline, :body, :retry, :what, :deaths]
    defstruct [:ref, :watch, :deadline, :body, :retry, :what, :deaths, :at, :since] ++
                [stream?: false, tools?: false, begun?: false]

    @type t :: %__MODULE__{
            ref: reference() | nil,
            watch: {:monitor, reference()} | {:timer, reference()},
            deadline: integer() | :infinity,
            body: binary(),
            retry: :here | :never | :caller,
            what: DSPex.PythonBridge.Programs.Store.change() | nil,
            deaths: non_neg_integer(),
            at: port() | nil,
            since: integer() | nil,
            stream?: boolean(),
            tools?: boolean(),
            begun?: boolean()
          }
  end

  # counts: of each port that has calls, how many, and how many of them change the programs. Asked for
  # with each reply, also while thousands wait.
  defstruct by_id: %{}, by_ref: %{}, counts: %{}

  @type t :: %__MODULE__{
          by_id: %{pos_integer() => Call.t()},
          by_ref: %{reference() => pos_integer()},
          counts: %{port() => {calls :: pos_integer(), changes :: non_neg_integer()}}
        }

  @doc "An empty table."
  @spec new() :: t()
  def new, do: %__MODULE__{}

  @doc "How many calls wait."
  @spec size(t()) :: non_neg_integer()
  def size(%__MODULE__{by_id: by_id}), do: map_size(by_id)

  @doc "Adds a call under a new id."
  @spec put(t(), pos_integer(), Call.t()) :: t()
  def put(%__MODULE__{} = calls, id, %Call{ref: nil} = call),
    do: %{calls | by_id: Map.put(calls.by_id, id, call), counts: count(calls.counts, call, 1)}

  def put(%__MODULE__{} = calls, id, %Call{ref: ref} = call) do
    %__MODULE__{
      by_id: Map.put(calls.by_id, id, call),
      by_ref: Map.put(calls.by_ref, ref, id),
      counts: count(calls.counts, call, 1)
    }
  end

  @doc "The call of this id, or nil."
  @spec get(t(), pos_integer()) :: Call.t() | nil
  def get(%__MODULE__{by_id: by_id}, id), do: Map.get(by_id, id)

  @doc "The call of this id, which is there."
  @spec fetch!(t(), pos_integer()) :: Call.t()
  def fetch!(%__MODULE__{by_id: by_id}, id), do: Map.fetch!(by_id, id)

  @doc "Another state of a call that is there."
  @spec replace(t(), pos_integer(), Call.t()) :: t()
  def replace(%__MODULE__{by_id: by_id, counts: counts} = calls, id, %Call{} = call) do
    counts = counts |> count(Map.fetch!(by_id, id), -1) |> count(call, 1)
    %{calls | by_id: %{by_id | id => call}, counts: counts}
  end

  @doc "Takes a call out; nil if it is not there (any more)."
  @spec pop(t(), pos_integer()) :: {Call.t() | nil, t()}
  def pop(%__MODULE__{by_id: by_id, by_ref: by_ref} = calls, id) do
    case by_id do
      %{^id => %Call{ref: ref} = call} ->
        {call,
         %__MODULE__{
           by_id: Map.delete(by_id, id),
           by_ref: Map.delete(by_ref, ref),
           counts: count(calls.counts, call, -1)
         }}

      _gone ->
        {nil, calls}
    end
  end

  @doc "The id of the call that its caller knows by `ref`; nil if it is not there (any more)."
  @spec id_of(t(), reference()) :: pos_integer() | nil
  def id_of(%__MODULE__{by_ref: by_ref}, ref), do: Map.get(by_ref, ref)

  @doc "Whether `port` has calls to answer."
  @spec busy?(t(), port()) :: boolean()
  def busy?(%__MODULE__{counts: counts}, port), do: is_map_key(counts, port)

  @doc "Whether `port` has calls to answer that change the programs."
  @spec changing?(t(), port()) :: boolean()
  def changing?(%__MODULE__{counts: counts}, port),
    do: match?(%{^port => {_calls, changes}} when changes > 0, counts)

  @doc """
  The calls given to `port`, oldest first; nil: those given to none. It looks at all calls: for what
  happens once to a peer, not to a call.
  """
  @spec at(t(), port() | nil) :: [{pos_integer(), Call.t()}]
  def at(%__MODULE__{by_id: by_id}, port),
    do: Enum.sort(for {id, %Call{at: ^port} = call} <- by_id, do: {id, call})

  defp count(counts, %Call{at: nil}, _by), do: counts

  defp count(counts, %Call{at: port, what: what}, by) do
    {calls, changes} = Map.get(counts, port, {0, 0})

    case calls + by do
      0 -> Map.delete(counts, port)
      calls -> Map.put(counts, port, {calls, if(what, do: changes + by, else: changes)})
    end
  end
end
