defmodule DSPex.PythonBridge.Pool.CoordinatorClient do
  @moduledoc false
  # Calls to a pool's coordinator from its node. They wait for a coordinator that is being restarted, which takes a
  # moment, or else ends the pool.

  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Pool.{Checkouts, Handle}

  # The interval at which a coordinator that is being restarted is looked for.
  @restart_ms 5
  # The coordinator answers at once, unless it is being restarted.
  @answer_ms 5_000

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
  ended, a checkout that was made nevertheless is undone. `ref` is of `with_bridge/3`.
  """
  @spec checkout(Handle.t(), timeout(), reference()) ::
          {:ok, atom()} | {:error, :pool_exhausted | :bridge_not_running}
  def checkout(%Handle{name: name} = handle, timeout \\ @answer_ms, ref \\ make_ref()) do
    with {:error, :bridge_not_running} = error <- ask(handle, {:checkout, ref}, timeout) do
      # A coordinator that is not there yet finds it in the table; one that is there reads this after the question.
      Checkouts.over(handle, ref)
      GenServer.cast(Handle.coordinator(name), {:over, ref})
      error
    end
  end

  @doc """
  Calls `fun` with a bridge that is checked out for the calling process, until it returns or raises, throws or exits.
  `report` is called with the result of the checkout.
  """
  @spec with_bridge(Handle.t(), (atom() -> value), (term() -> term())) ::
          {:ok, value} | {:error, :pool_exhausted | :bridge_not_running}
        when value: term()
  def with_bridge(%Handle{} = handle, fun, report) do
    ref = make_ref()
    checkout = checkout(handle, @answer_ms, ref)
    report.(checkout)

    with {:ok, bridge} <- checkout do
      try do
        {:ok, fun.(bridge)}
      after
        # By its reference: it may be checked in already, and be another's.
        Checkouts.over(handle, ref)
        ask(handle, {:over, ref}, @answer_ms)
      end
    end
  end

  @doc "Checks in a bridge, for any process."
  @spec checkin(Handle.t(), term()) :: :ok | {:error, String.t() | :bridge_not_running}
  def checkin(%Handle{} = handle, bridge), do: ask(handle, {:checkin, bridge}, @answer_ms)

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
