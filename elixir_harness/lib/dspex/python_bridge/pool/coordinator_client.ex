defmodule DSPex.PythonBridge.Pool.CoordinatorClient do
  @moduledoc """
  How a process asks a pool's coordinator for something, on the coordinator's node. A coordinator that is being started again
  is waited for: it takes no more than a moment, or else the pool ends with it.
  """

  alias DSPex.PythonBridge.Programs
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Pool.Handle

  # How soon a coordinator that is being started again is looked for anew.
  @restart_ms 5
  # For so long past its timeout a caller looks for a coordinator that may have lent it something unheard.
  @undo_ms 50

  @doc """
  The process of a pool's coordinator. One that is being started again is waited for, until the deadline; nil
  if it is not there by then, or the pool has ended.
  """
  @spec await(atom(), Deadline.t()) :: pid() | nil
  def await(pool, deadline) do
    with nil <- Process.whereis(Handle.coordinator(pool)) do
      left = Deadline.left(deadline)

      # An atom is greater than any number.
      if left > 0 and Handle.fetch(pool) != nil do
        Process.sleep(min(@restart_ms, left))
        await(pool, deadline)
      end
    end
  end

  @doc """
  Lends a bridge to the calling process. If that has given up after `timeout` ms, or the coordinator has ended,
  a loan that was made all the same is undone.
  """
  @spec checkout(Handle.t(), non_neg_integer()) ::
          {:ok, atom()} | {:error, :pool_exhausted | :bridge_not_running}
  def checkout(%Handle{name: name} = handle, timeout) do
    ref = make_ref()

    with {:error, :bridge_not_running} = error <- ask(handle, {:checkout, ref}, timeout) do
      # Behind the question, if that is still there to be read; or to the next coordinator, which has the table.
      coordinator = await(name, Deadline.new(@undo_ms))
      if coordinator, do: GenServer.cast(coordinator, {:unheard, ref})
      error
    end
  end

  @doc "Gives a bridge back, whoever has it."
  @spec checkin(Handle.t(), term(), non_neg_integer()) ::
          :ok | {:error, String.t() | :bridge_not_running}
  def checkin(%Handle{} = handle, bridge, timeout), do: ask(handle, {:checkin, bridge}, timeout)

  defp ask(%Handle{name: name}, question, timeout) do
    deadline = Deadline.new(timeout)

    case await(name, deadline) do
      nil -> {:error, :bridge_not_running}
      coordinator -> GenServer.call(coordinator, question, Deadline.left(deadline))
    end
  catch
    :exit, _no_answer -> {:error, :bridge_not_running}
  end

  @doc """
  Takes over a definition from another node, and waits until the peers here that are ready have it, or
  until the deadline.
  """
  @spec adopt(Handle.t(), Programs.Store.definition(), Deadline.t()) :: :ok
  def adopt(%Handle{} = handle, definition, deadline) do
    case await(handle.name, deadline) do
      nil -> :ok
      coordinator -> GenServer.call(coordinator, {:adopt, definition}, Deadline.left(deadline))
    end
  catch
    # Whether the program is there will show.
    :exit, _no_answer -> :ok
  end
end
