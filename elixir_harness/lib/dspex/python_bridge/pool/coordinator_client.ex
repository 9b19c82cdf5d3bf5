defmodule DSPex.PythonBridge.Pool.CoordinatorClient do
  @moduledoc false
  # Calls to a pool's coordinator from its node. They wait for a coordinator that is being restarted, which takes a
  # moment, or else ends the pool.

  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Pool.Handle

  # The interval at which a coordinator that is being restarted is looked for.
  @restart_ms 5
  # A caller looks so long past its timeout for a coordinator that may have checked out a bridge for it.
  @undo_ms 50

  @doc "The coordinator's process; nil if there is none by the deadline, or the pool has ended."
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
  Checks out a bridge for the calling process. If that has stopped waiting after `timeout` ms, or the coordinator has
  ended, a checkout that was made nevertheless is undone.
  """
  @spec checkout(Handle.t(), non_neg_integer()) ::
          {:ok, atom()} | {:error, :pool_exhausted | :bridge_not_running}
  def checkout(%Handle{name: name} = handle, timeout) do
    ref = make_ref()

    with {:error, :bridge_not_running} = error <- ask(handle, {:checkout, ref}, timeout) do
      # It is read after the question, or by the next coordinator, which has the table.
      coordinator = await(name, Deadline.new(@undo_ms))
      if coordinator, do: GenServer.cast(coordinator, {:unheard, ref})
      error
    end
  end

  @doc "Checks in a bridge, for any process."
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
end
