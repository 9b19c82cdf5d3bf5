defmodule DSPex.PythonBridge.Pool.Checkouts do
  @moduledoc """
  Which bridges are lent, and to whom. Used by the coordinator's process, which watches the borrowers; the
  table is the pool's, so that a coordinator that is started again knows them.
  """

  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.Pool.Handle

  @doc """
  Watches the borrowers that the table tells of: for a new coordinator. A loan that the old one was killed in the
  middle of is over: nobody has heard of it, or it was given back.
  """
  @spec restore(Handle.t()) :: :ok
  def restore(%Handle{checkouts: checkouts, counters: counters}) do
    for index <- LoadCounters.indexes(counters),
        not :ets.member(checkouts, index),
        do: LoadCounters.unlend(counters, index)

    for {index, borrower, _monitor_of_the_old, ref} <- :ets.tab2list(checkouts) do
      :ets.insert(checkouts, {index, borrower, watch(borrower, index), ref})
    end

    :ok
  end

  @doc """
  Lends a bridge: the least busy one of those that are ready, else one whose peer is not up yet; nil
  if all are lent. `ref` is what the borrower knows the loan by.
  """
  @spec lend(Handle.t(), pid(), reference()) :: atom() | nil
  def lend(%Handle{counters: counters, checkouts: checkouts} = handle, borrower, ref) do
    case LoadCounters.pick(counters) || starting(handle) do
      nil ->
        nil

      index ->
        LoadCounters.lend(counters, index)
        :ets.insert(checkouts, {index, borrower, watch(borrower, index), ref})
        Handle.bridge(handle, index)
    end
  end

  # Of those that are not lent; one whose process is being started again only if there is no other.
  defp starting(%Handle{counters: counters} = handle) do
    counters
    |> LoadCounters.indexes()
    |> Enum.reject(&LoadCounters.lent?(counters, &1))
    |> Enum.min_by(&if(Process.whereis(Handle.bridge(handle, &1)), do: 0, else: 1), fn -> nil end)
  end

  @doc "Takes a bridge back, by its name or pid."
  @spec take_back(Handle.t(), term()) :: :ok | {:error, String.t()}
  def take_back(%Handle{} = handle, bridge) do
    case Enum.find(LoadCounters.indexes(handle.counters), &bridge?(handle, &1, bridge)) do
      nil -> {:error, "#{brief(bridge)} is no bridge of the pool #{inspect(handle.name)}"}
      index -> end_loan(handle, index)
    end
  end

  defp bridge?(handle, index, bridge) do
    name = Handle.bridge(handle, index)
    bridge == name or (is_pid(bridge) and Process.whereis(name) == bridge)
  end

  defp end_loan(%Handle{checkouts: checkouts} = handle, index) do
    case :ets.lookup(checkouts, index) do
      [{_index, _borrower, monitor, _ref}] ->
        Process.demonitor(monitor, [:flush])
        :ets.delete(checkouts, index)
        LoadCounters.unlend(handle.counters, index)

      [] ->
        {:error, "#{inspect(Handle.bridge(handle, index))} is not checked out"}
    end
  end

  @doc "The borrower never heard of the loan that it asked for by `ref`; whether there is one."
  @spec undo(Handle.t(), reference()) :: boolean()
  def undo(%Handle{checkouts: checkouts} = handle, ref) do
    case :ets.match(checkouts, {:"$1", :_, :_, ref}) do
      [[index]] -> end_loan(handle, index) == :ok
      [] -> false
    end
  end

  @doc "The borrower watched by `monitor` is gone; whether it still had the bridge."
  @spec borrower_gone(Handle.t(), LoadCounters.index(), reference()) :: boolean()
  def borrower_gone(%Handle{checkouts: checkouts} = handle, index, monitor) do
    match?([{_index, _borrower, ^monitor, _ref}], :ets.lookup(checkouts, index)) and
      end_loan(handle, index) == :ok
  end

  # The message tells the slot: {{:borrower_gone, index}, monitor, :process, pid, reason}.
  defp watch(borrower, index),
    do: :erlang.monitor(:process, borrower, tag: {:borrower_gone, index})

  # Any term may have been given; its inspection may be code of the host's, and runs in the coordinator.
  defp brief(bridge) when is_atom(bridge) or is_pid(bridge), do: inspect(bridge)
  defp brief(_other), do: "this"
end
