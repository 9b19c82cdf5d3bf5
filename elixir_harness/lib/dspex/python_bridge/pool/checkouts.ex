defmodule DSPex.PythonBridge.Pool.Checkouts do
  @moduledoc false
  # Which bridges are checked out, and by whom. The coordinator's process uses it and monitors the borrowers; the table
  # belongs to the pool, so that a restarted coordinator knows them.
  #
  # Rows: {index, borrower, monitor, the reference that the borrower sent}; and {{:over, reference}}, which a borrower
  # writes for a checkout that it has no more, before it tells the coordinator: that may be killed before it has read it.

  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.Pool.Handle

  @doc """
  Monitors the borrowers in the table: for a new coordinator. A checkout in the middle of which the old one was killed
  is ended: its borrower never got the bridge, or has checked it in.
  """
  @spec restore(Handle.t()) :: :ok
  def restore(%Handle{checkouts: checkouts, counters: counters} = handle) do
    for index <- LoadCounters.indexes(counters),
        not :ets.member(checkouts, index),
        do: LoadCounters.check_in(counters, index)

    for {index, borrower, _monitor_of_the_old, ref} <- :ets.tab2list(checkouts) do
      :ets.insert(checkouts, {index, borrower, watch(borrower, index), ref})
    end

    for {{:over, ref}} <- :ets.tab2list(checkouts), do: undo(handle, ref)
    :ok
  end

  @doc """
  Checks out a bridge: the least busy one that is ready, else one whose peer is not up yet; nil if all are checked
  out. `undo/2` takes `ref`.
  """
  @spec check_out(Handle.t(), pid(), reference()) :: atom() | nil
  def check_out(%Handle{counters: counters, checkouts: checkouts} = handle, borrower, ref) do
    if index = LoadCounters.pick(counters) || starting(handle) do
      LoadCounters.check_out(counters, index)
      :ets.insert(checkouts, {index, borrower, watch(borrower, index), ref})
      Handle.bridge(handle, index)
    end
  end

  # One whose process is being restarted only if there is no other.
  defp starting(%Handle{counters: counters} = handle) do
    counters
    |> LoadCounters.indexes()
    |> Enum.reject(&LoadCounters.checked_out?(counters, &1))
    |> Enum.min_by(&if(Process.whereis(Handle.bridge(handle, &1)), do: 0, else: 1), fn -> nil end)
  end

  @doc "Checks in a bridge, by its name or pid."
  @spec check_in(Handle.t(), term()) :: :ok | {:error, String.t()}
  def check_in(%Handle{} = handle, bridge) do
    case Enum.find(LoadCounters.indexes(handle.counters), &bridge?(handle, &1, bridge)) do
      nil -> {:error, "#{brief(bridge)} is not a bridge of the pool #{inspect(handle.name)}"}
      index -> remove(handle, index)
    end
  end

  defp bridge?(handle, index, bridge) do
    name = Handle.bridge(handle, index)
    bridge == name or (is_pid(bridge) and Process.whereis(name) == bridge)
  end

  defp remove(%Handle{checkouts: checkouts} = handle, index) do
    case :ets.lookup(checkouts, index) do
      [{_index, _borrower, monitor, _ref}] ->
        Process.demonitor(monitor, [:flush])
        :ets.delete(checkouts, index)
        LoadCounters.check_in(handle.counters, index)

      [] ->
        {:error, "#{inspect(Handle.bridge(handle, index))} is not checked out"}
    end
  end

  @doc "In the borrower's process: the checkout with this reference is over, or never was heard of. `undo/2` follows."
  @spec over(Handle.t(), reference()) :: :ok
  def over(%Handle{checkouts: checkouts}, ref) do
    :ets.insert(checkouts, {{:over, ref}})
    :ok
  rescue
    # The pool has ended, and its table with it.
    ArgumentError -> :ok
  end

  @doc "Ends the checkout with this reference; whether there was one."
  @spec undo(Handle.t(), reference()) :: boolean()
  def undo(%Handle{checkouts: checkouts} = handle, ref) do
    :ets.delete(checkouts, {:over, ref})

    case :ets.match(checkouts, {:"$1", :_, :_, ref}) do
      [[index]] -> remove(handle, index) == :ok
      [] -> false
    end
  end

  @doc "The borrower with this monitor is gone; whether it still had the bridge."
  @spec borrower_gone(Handle.t(), LoadCounters.index(), reference()) :: boolean()
  def borrower_gone(%Handle{checkouts: checkouts} = handle, index, monitor) do
    match?([{_index, _borrower, ^monitor, _ref}], :ets.lookup(checkouts, index)) and
      remove(handle, index) == :ok
  end

  # The message has the slot: {{:borrower_gone, index}, monitor, :process, pid, reason}.
  defp watch(borrower, index),
    do: :erlang.monitor(:process, borrower, tag: {:borrower_gone, index})

  # Any term may be given. Inspecting it may run code of the application's in this process.
  defp brief(bridge) when is_atom(bridge) or is_pid(bridge), do: inspect(bridge)
  defp brief(_other), do: "this"
end
