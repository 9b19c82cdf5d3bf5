defmodule DSPex.PythonBridge.Pool.Slot do
  @moduledoc false
  # The place of a bridge in its pool, and what the pool does with what the bridge tells it
  # (`t:DSPex.PythonBridge.Calls.InFlight.event/0`), in the process of the bridge.

  alias DSPex.PythonBridge.Calls.InFlight
  alias DSPex.PythonBridge.Pool.{Handle, LoadCounters}

  @enforce_keys [:handle, :index]
  defstruct @enforce_keys

  @type t :: %__MODULE__{handle: Handle.t(), index: LoadCounters.index()}

  @doc "Handles an event of the bridge."
  @spec notify(t(), InFlight.event()) :: :ok
  def notify(%__MODULE__{handle: %Handle{counters: counters}, index: index}, {:load, n, last?}),
    do: LoadCounters.put_calls(counters, index, n, last?)

  def notify(%__MODULE__{handle: handle, index: index}, :start) do
    LoadCounters.put_state(handle.counters, index, :down)
    LoadCounters.put_calls(handle.counters, index, 0, false)
  end

  def notify(%__MODULE__{handle: handle, index: index}, silence)
      when silence in [:silent, :heard],
      do: GenServer.cast(Handle.monitor(handle.name, index), monitors(silence))

  # The peers have it before its caller has the reply.
  def notify(%__MODULE__{handle: handle}, {:changed, {_kind, ids, _stamp} = change, body}) do
    Handle.tell_bridges(handle, ids)
    tell_coordinator(handle, {:changed, change, body})
  end

  def notify(%__MODULE__{handle: handle, index: index}, state) do
    LoadCounters.put_state(handle.counters, index, if(state == :ready, do: :ready, else: :down))
    tell_coordinator(handle, {:slot, index, state})
  end

  defp monitors(:silent), do: :unanswered
  defp monitors(:heard), do: :heard

  defp tell_coordinator(handle, message) do
    with pid when is_pid(pid) <- Process.whereis(Handle.coordinator(handle.name)),
         do: send(pid, message)

    :ok
  end
end
