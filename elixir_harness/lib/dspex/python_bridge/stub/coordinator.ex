defmodule DSPex.PythonBridge.Stub.Coordinator do
  @moduledoc false
  # The coordinator of a stub's name, as `DSPex.PythonBridge.Pool` finds it. The stub's process is the only bridge.

  use GenServer
  use DSPex.PythonBridge.OTP.ServerGuard

  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Pool.Handle

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
  def handle_call(question, from, handle) do
    ServerGuard.drop({:"$gen_call", from, question}, __MODULE__)
    {:noreply, handle}
  end

  @impl GenServer
  def handle_cast(message, handle) do
    ServerGuard.drop({:"$gen_cast", message}, __MODULE__)
    {:noreply, handle}
  end

  # A change has been made by the stub, the only bridge.
  @impl GenServer
  def handle_info({:settle, ref, _coordinator, _ids}, handle) do
    send(ref, {ref, :ok})
    {:noreply, handle}
  end

  # A change of the programs, or its caller's end: the reply goes to the caller directly.
  def handle_info(message, %Handle{pid: stub} = handle) do
    send(stub, message)
    {:noreply, handle}
  end
end
