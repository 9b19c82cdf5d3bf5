defmodule DSPex.PythonBridge.Stub.Coordinator do
  @moduledoc false
  # The coordinator of a stub's name, as `DSPex.PythonBridge.Pool` finds it. The stub's process is the only bridge, which
  # any number of processes may check out: tests that run at the same time do not wait for each other.

  use GenServer
  use DSPex.PythonBridge.OTP.ServerGuard

  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Pool.{Checkouts, Handle}

  @doc "Starts the coordinator of the calling process, a stub."
  @spec start_link(Handle.t()) :: GenServer.on_start()
  def start_link(%Handle{name: name} = handle),
    do: GenServer.start_link(__MODULE__, handle, name: Handle.coordinator(name))

  @doc "Stops it, if it has not ended."
  @spec stop(pid()) :: :ok
  def stop(coordinator) do
    GenServer.stop(coordinator)
  catch
    :exit, _has_ended -> :ok
  end

  @impl GenServer
  def init(%Handle{} = handle), do: {:ok, handle}

  @impl GenServer
  def handle_call({:checkout, _ref}, _from, handle), do: {:reply, {:ok, handle.name}, handle}
  def handle_call({:over, ref}, _from, handle), do: {:reply, over(handle, ref), handle}

  def handle_call({:checkin, bridge}, _from, %Handle{name: name, pid: pid} = handle) do
    if bridge in [name, pid],
      do: {:reply, :ok, handle},
      else: {:reply, {:error, "this is not a bridge of the pool #{inspect(name)}"}, handle}
  end

  def handle_call(question, from, handle) do
    ServerGuard.drop({:"$gen_call", from, question}, __MODULE__)
    {:noreply, handle}
  end

  @impl GenServer
  def handle_cast({:over, ref}, handle) do
    over(handle, ref)
    {:noreply, handle}
  end

  def handle_cast(message, handle) do
    ServerGuard.drop({:"$gen_cast", message}, __MODULE__)
    {:noreply, handle}
  end

  # There is no other definition than the stub's, which has refused the run.
  @impl GenServer
  def handle_info({:request, %Request{change: {:repair, _index, _id}, ref: ref}}, handle) do
    send(ref, {ref, {:error, :bridge_not_running}})
    {:noreply, handle}
  end

  # A change of the programs, or its caller's end: the reply goes to the caller directly.
  def handle_info(message, %Handle{pid: stub} = handle) do
    send(stub, message)
    {:noreply, handle}
  end

  # Only its row of the table: there is nothing to check in.
  defp over(handle, ref) do
    Checkouts.undo(handle, ref)
    :ok
  end
end
