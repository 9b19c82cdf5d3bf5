defmodule DSPex.PythonBridge.Pool.Cluster.Confirmations do
  @moduledoc false
  # Changes to the programs that were made here and wait for the other nodes to have made them, too: at most a few
  # seconds, and a little less than their callers wait.

  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Pool.Broadcast

  @longest_wait_ms 3_000

  @typedoc "By the number of the change: the change, and the coordinators that have not confirmed it."
  @type t :: %{
          pos_integer() => %{change: Broadcast.over(), open: MapSet.t(pid()), timer: reference()}
        }
  @type result :: {t(), done :: [Broadcast.over()]}

  @doc "Waits for these coordinators. The timer's message is `{:timeout, _, {:spread, id}}`."
  @spec add(t(), Broadcast.over(), MapSet.t(pid())) :: result()
  def add(waits, change, open) do
    timer = :erlang.start_timer(wait_ms(change.deadline), self(), {:spread, change.id})
    settle(waits, %{change: change, open: open, timer: timer})
  end

  # A tenth less than is left to the caller, so that it gets the reply. An atom is greater than any number.
  defp wait_ms(deadline) do
    left = min(Deadline.left(deadline), 2 * @longest_wait_ms)
    min(left - div(left, 10), @longest_wait_ms)
  end

  @doc "A coordinator has made the change."
  @spec confirmed(t(), integer(), pid()) :: result()
  def confirmed(waits, id, coordinator) do
    case waits do
      %{^id => wait} -> settle(waits, %{wait | open: MapSet.delete(wait.open, coordinator)})
      _done -> {waits, []}
    end
  end

  @doc "Coordinators are gone: no change waits for them."
  @spec gone(t(), [pid()]) :: result()
  def gone(waits, coordinators) do
    for id <- Map.keys(waits), coordinator <- coordinators, reduce: {waits, []} do
      {waits, done} ->
        {waits, more} = confirmed(waits, id, coordinator)
        {waits, more ++ done}
    end
  end

  @doc "The timer of a change has fired."
  @spec expired(t(), integer()) :: result()
  def expired(waits, id) do
    case waits do
      %{^id => wait} -> settle(waits, %{wait | open: MapSet.new()})
      _done -> {waits, []}
    end
  end

  defp settle(waits, %{change: change} = wait) do
    if MapSet.size(wait.open) == 0 do
      :erlang.cancel_timer(wait.timer, async: true, info: false)
      {Map.delete(waits, change.id), [change]}
    else
      {Map.put(waits, change.id, wait), []}
    end
  end
end
