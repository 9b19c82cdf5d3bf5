defmodule DSPex.PythonBridge.Pool.Loans do
  @moduledoc """
  Which bridges are lent, and to whom. Used by the keeper's process, which watches the borrowers; the
  table is the pool's, so that a keeper that is started again knows them.
  """

  alias DSPex.PythonBridge.Pool.{Info, Slots}

  @doc """
  Watches the borrowers that the table tells of: for a new keeper. A loan that the old one was killed in the
  middle of is over: nobody has heard of it, or it was given back.
  """
  @spec restore(Info.t()) :: :ok
  def restore(%Info{loans: loans, slots: slots}) do
    for index <- Slots.indexes(slots),
        not :ets.member(loans, index),
        do: Slots.unlend(slots, index)

    for {index, borrower, _monitor_of_the_old, ref} <- :ets.tab2list(loans) do
      :ets.insert(loans, {index, borrower, watch(borrower, index), ref})
    end

    :ok
  end

  @doc """
  Lends a bridge: the least busy one of those that are ready, else one whose peer is not up yet; nil
  if all are lent. `ref` is what the borrower knows the loan by.
  """
  @spec lend(Info.t(), pid(), reference()) :: atom() | nil
  def lend(%Info{slots: slots, loans: loans} = info, borrower, ref) do
    case Slots.pick(slots) || starting(info) do
      nil ->
        nil

      index ->
        Slots.lend(slots, index)
        :ets.insert(loans, {index, borrower, watch(borrower, index), ref})
        Info.bridge(info, index)
    end
  end

  # Of those that are not lent; one whose process is being started again only if there is no other.
  defp starting(%Info{slots: slots} = info) do
    slots
    |> Slots.indexes()
    |> Enum.reject(&Slots.lent?(slots, &1))
    |> Enum.min_by(&if(Process.whereis(Info.bridge(info, &1)), do: 0, else: 1), fn -> nil end)
  end

  @doc "Takes a bridge back, by its name or pid."
  @spec take_back(Info.t(), term()) :: :ok | {:error, String.t()}
  def take_back(%Info{} = info, bridge) do
    case Enum.find(Slots.indexes(info.slots), &bridge?(info, &1, bridge)) do
      nil -> {:error, "#{brief(bridge)} is no bridge of the pool #{inspect(info.name)}"}
      index -> end_loan(info, index)
    end
  end

  defp bridge?(info, index, bridge) do
    name = Info.bridge(info, index)
    bridge == name or (is_pid(bridge) and Process.whereis(name) == bridge)
  end

  defp end_loan(%Info{loans: loans} = info, index) do
    case :ets.lookup(loans, index) do
      [{_index, _borrower, monitor, _ref}] ->
        Process.demonitor(monitor, [:flush])
        :ets.delete(loans, index)
        Slots.unlend(info.slots, index)

      [] ->
        {:error, "#{inspect(Info.bridge(info, index))} is not checked out"}
    end
  end

  @doc "The borrower never heard of the loan that it asked for by `ref`; whether there is one."
  @spec undo(Info.t(), reference()) :: boolean()
  def undo(%Info{loans: loans} = info, ref) do
    case :ets.match(loans, {:"$1", :_, :_, ref}) do
      [[index]] -> end_loan(info, index) == :ok
      [] -> false
    end
  end

  @doc "The borrower watched by `monitor` is gone; whether it still had the bridge."
  @spec borrower_gone(Info.t(), Slots.index(), reference()) :: boolean()
  def borrower_gone(%Info{loans: loans} = info, index, monitor) do
    match?([{_index, _borrower, ^monitor, _ref}], :ets.lookup(loans, index)) and
      end_loan(info, index) == :ok
  end

  # The message tells the slot: {{:borrower_gone, index}, monitor, :process, pid, reason}.
  defp watch(borrower, index),
    do: :erlang.monitor(:process, borrower, tag: {:borrower_gone, index})

  # Any term may have been given; its inspection may be code of the host's, and runs in the keeper.
  defp brief(bridge) when is_atom(bridge) or is_pid(bridge), do: inspect(bridge)
  defp brief(_other), do: "this"
end
