defmodule DSPex.PythonBridge.Pool.Router do
  @moduledoc false
  # The path of one call, in the caller's process: a peer of this node; if none can serve, another node of the
  # cluster; if none can either, a wait until that changes, and again from the start.

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Pool.{Handle, LocalCall, Request}
  alias DSPex.PythonBridge.Pool.Cluster.RemoteCall

  # The interval at which a coordinator that is being restarted is looked for.
  @coordinator_ms 5

  @doc "Runs the call on a peer of this or another node; waits for one until the request's deadline."
  @spec run(Handle.t(), Request.t()) :: LocalCall.reply()
  def run(%Handle{} = handle, %Request{} = request) do
    with {:nobody, request} <- LocalCall.run(handle, request),
         {:nobody, request} <- RemoteCall.run(handle, request) do
      if request.overloaded?, do: failed(:overloaded), else: wait(handle, request)
    else
      {:done, reply} -> reply
    end
  end

  ## Nobody can serve now

  # What was tried goes along: it may have changed before the message is read.
  defp wait(handle, request) do
    coordinator = Handle.coordinator(handle.name)
    ref = :erlang.monitor(:process, coordinator, alias: :reply_demonitor)
    notify(coordinator, {:wait, ref, self(), request.passed, request.passed_nodes})

    receive do
      {^ref, :changed} -> again(handle.name, request)
      {:DOWN, ^ref, :process, _coordinator, _reason} -> wait_for_coordinator(handle.name, request)
    after
      Request.left(request) ->
        Process.demonitor(ref, [:flush])
        notify(coordinator, {:abandon, ref})

        # It may have come between the two.
        receive do
          {^ref, :changed} -> failed(:timeout)
        after
          0 -> failed(:timeout)
        end
    end
  end

  # It is being restarted, unless the pool has ended.
  defp wait_for_coordinator(name, request) do
    Process.sleep(min(@coordinator_ms, Request.left(request)))
    if Request.left(request) == 0, do: failed(:timeout), else: again(name, request)
  end

  # The pool may have been restarted meanwhile, with other slots.
  defp again(name, request) do
    case Handle.fetch(name) do
      nil -> failed(:bridge_not_running)
      handle -> run(handle, Request.renew(request))
    end
  end

  defp failed(type), do: {:error, Error.new(type)}

  # Sending to a name that is not registered raises.
  defp notify(name, message) do
    case Process.whereis(name) do
      nil -> :ok
      pid -> send(pid, message)
    end
  end
end
