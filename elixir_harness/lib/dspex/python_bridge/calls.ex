defmodule DSPex.PythonBridge.Calls do
  @moduledoc """
  The calls that wait for a reply, by id (the peer's name for a call) and by reference (the
  caller's name for it). A call is in the table until exactly one of these takes it out: its
  reply, its caller's timeout, its caller's death, the peer's death. Whoever comes later finds
  nothing: that is how every race between them ends.
  """

  defstruct by_id: %{}, by_ref: %{}

  # The caller's alias (nil: nobody waits) and what watches over the call.
  @type call :: {ref :: reference() | nil, watch()}
  @type watch :: {:monitor, reference()} | {:timer, reference()}
  @type t :: %__MODULE__{
          by_id: %{pos_integer() => call()},
          by_ref: %{reference() => pos_integer()}
        }

  @doc "An empty table."
  @spec new() :: t()
  def new, do: %__MODULE__{}

  @doc "How many calls wait."
  @spec size(t()) :: non_neg_integer()
  def size(%__MODULE__{by_id: by_id}), do: map_size(by_id)

  @doc "Adds a call under a new id."
  @spec put(t(), pos_integer(), call()) :: t()
  def put(%__MODULE__{} = calls, id, {nil, _watch} = call),
    do: %{calls | by_id: Map.put(calls.by_id, id, call)}

  def put(%__MODULE__{by_id: by_id, by_ref: by_ref}, id, {ref, _watch} = call),
    do: %__MODULE__{by_id: Map.put(by_id, id, call), by_ref: Map.put(by_ref, ref, id)}

  @doc "Takes a call out; nil if it is not there (any more)."
  @spec pop(t(), pos_integer()) :: {call() | nil, t()}
  def pop(%__MODULE__{by_id: by_id, by_ref: by_ref} = calls, id) do
    case by_id do
      %{^id => {ref, _watch} = call} ->
        {call, %__MODULE__{by_id: Map.delete(by_id, id), by_ref: Map.delete(by_ref, ref)}}

      _gone ->
        {nil, calls}
    end
  end

  @doc "The id of the call that its caller knows by `ref`; nil if it is not there (any more)."
  @spec id_of(t(), reference()) :: pos_integer() | nil
  def id_of(%__MODULE__{by_ref: by_ref}, ref), do: Map.get(by_ref, ref)

  @doc "Takes out all calls whose id does not satisfy `keep?`."
  @spec pop_unless(t(), (pos_integer() -> boolean())) :: {[call()], t()}
  def pop_unless(%__MODULE__{} = calls, keep?) do
    {kept, popped} = Enum.split_with(calls.by_id, fn {id, _call} -> keep?.(id) end)
    by_ref = for {id, {ref, _watch}} <- kept, ref != nil, into: %{}, do: {ref, id}
    {Enum.map(popped, &elem(&1, 1)), %__MODULE__{by_id: Map.new(kept), by_ref: by_ref}}
  end
end
