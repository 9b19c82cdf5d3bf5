defmodule DSPex.PythonBridge.Stub.Coordinator do
  @moduledoc false
  # The coordinator of a stub's name, as `DSPex.PythonBridge.Pool` finds it. The stub's process is the only bridge, which
  # any number of processes may check out: tests that run at the same time do not wait for each other.

  use GenServer
  use DSPex.PythonBridge.OTP.ServerGuard

  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Pool.Handle

  @doc "Starts the coordinator of the calling process, a stub of this name."
  @spec start_link(atom()) :: GenServer.on_start()
  def start_link(name),
    do: GenServer.start_link(__MODULE__, {name, self()}, name: Handle.coordinator(name))

  @doc "Stops it, if it has not ended."
  @spec stop(pid()) :: :ok
  def stop(coordinator) do
    GenServer.stop(coordinator)
  catch
    :exit, _has_ended -> :ok
  end

  @impl GenServer
  def init({name, stub}), do: {:ok, {name, stub}}

  @impl GenServer
  def handle_call({:checkout, _ref}, _from, {name, _stub} = state),
    do: {:reply, {:ok, name}, state}

  def handle_call({:checkin, bridge}, _from, {name, stub} = state) when bridge in [name, stub],
    do: {:reply, :ok, state}

  def handle_call({:checkin, _other}, _from, {name, _stub} = state),
    do: {:reply, {:error, "this is not a bridge of the pool #{inspect(name)}"}, state}

  def handle_call(question, from, state) do
    ServerGuard.drop({:"$gen_call", from, question}, __MODULE__)
    {:noreply, state}
  end

  @impl GenServer
  def handle_cast({:unheard, _ref}, state), do: {:noreply, state}

  # There is no other definition than the stub's, which has refused the run.
  @impl GenServer
  def handle_info({:request, %Request{change: {:repair, _index, _id}, ref: ref}}, state) do
    send(ref, {ref, {:error, :bridge_not_running}})
    {:noreply, state}
  end

  # A change of the programs, or its caller's end: the reply goes to the caller directly.
  def handle_info(message, {_name, stub} = state) do
    send(stub, message)
    {:noreply, state}
  end
end
