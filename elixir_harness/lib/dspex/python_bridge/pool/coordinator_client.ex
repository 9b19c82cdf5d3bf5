defmodule DSPex.PythonBridge.Pool.CoordinatorClient do
  @moduledoc """
  How a process asks a pool's keeper for something, on the keeper's node. A keeper that is being started again
  is waited for: it takes no more than a moment, or else the pool ends with it.
  """

  alias DSPex.PythonBridge.Programs
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.Pool.Handle

  # How soon a keeper that is being started again is looked for anew.
  @restart_ms 5
  # For so long past its timeout a caller looks for a keeper that may have lent it something unheard.
  @undo_ms 50

  @doc """
  The process of a pool's keeper. One that is being started again is waited for, until the deadline; nil
  if it is not there by then, or the pool has ended.
  """
  @spec await(atom(), Caller.deadline()) :: pid() | nil
  def await(pool, deadline) do
    with nil <- Process.whereis(Handle.keeper(pool)) do
      left = Caller.left(deadline)

      # An atom is greater than any number.
      if left > 0 and Handle.fetch(pool) != nil do
        Process.sleep(min(@restart_ms, left))
        await(pool, deadline)
      end
    end
  end

  @doc """
  Lends a bridge to the calling process. If that has given up after `timeout` ms, or the keeper has ended,
  a loan that was made all the same is undone.
  """
  @spec checkout(Handle.t(), non_neg_integer()) ::
          {:ok, atom()} | {:error, :pool_exhausted | :bridge_not_running}
  def checkout(%Handle{name: name} = info, timeout) do
    ref = make_ref()

    with {:error, :bridge_not_running} = error <- ask(info, {:checkout, ref}, timeout) do
      # Behind the question, if that is still there to be read; or to the next keeper, which has the table.
      keeper = await(name, now() + @undo_ms)
      if keeper, do: GenServer.cast(keeper, {:unheard, ref})
      error
    end
  end

  @doc "Gives a bridge back, whoever has it."
  @spec checkin(Handle.t(), term(), non_neg_integer()) ::
          :ok | {:error, String.t() | :bridge_not_running}
  def checkin(%Handle{} = info, bridge, timeout), do: ask(info, {:checkin, bridge}, timeout)

  defp ask(%Handle{name: name}, question, timeout) do
    deadline = now() + timeout

    case await(name, deadline) do
      nil -> {:error, :bridge_not_running}
      keeper -> GenServer.call(keeper, question, Caller.left(deadline))
    end
  catch
    :exit, _no_answer -> {:error, :bridge_not_running}
  end

  @doc """
  Takes over a definition from another node, and waits until the peers here that are ready have it, or
  until the deadline.
  """
  @spec adopt(Handle.t(), Programs.Store.definition(), Caller.deadline()) :: :ok
  def adopt(%Handle{} = info, definition, deadline) do
    case await(info.name, deadline) do
      nil -> :ok
      keeper -> GenServer.call(keeper, {:adopt, definition}, Caller.left(deadline))
    end
  catch
    # Whether the program is there will show.
    :exit, _no_answer -> :ok
  end

  defp now, do: System.monotonic_time(:millisecond)
end
