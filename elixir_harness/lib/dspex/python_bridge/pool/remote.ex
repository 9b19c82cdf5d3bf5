defmodule DSPex.PythonBridge.Pool.Remote do
  @moduledoc false
  # The part of a call to another node that runs on that node: see `DSPex.PythonBridge.Pool.Cluster.RemoteCall`. Nodes of
  # other versions start it by this name and with these arguments, so neither changes, nor does the struct
  # `DSPex.PythonBridge.Pool.Request`.

  alias DSPex.PythonBridge.Programs
  alias DSPex.PythonBridge.OTP.{Deadline, ServerGuard}
  alias DSPex.PythonBridge.Pool.{Attempt, CoordinatorClient, Handle, LocalCall, Request}

  @doc "Makes the call for a courier; `deadline` of the request is the ms that are left."
  @spec proxy(pid(), atom(), Request.t(), Programs.Store.definition() | nil) :: :ok
  def proxy(courier, name, request, definition) do
    ServerGuard.run(fn ->
      result =
        case Handle.fetch(name) do
          nil ->
            {:nobody, request.deaths, false}

          handle ->
            serve(handle, %{request | deadline: Deadline.new(request.deadline)}, definition)
        end

      send(courier, {:served, result})
    end)

    :ok
  end

  defp serve(handle, request, definition) do
    if definition, do: adopt(handle, definition, request.deadline)

    case LocalCall.run(handle, request, &Attempt.make(%Attempt{}, &1, &2, &3)) do
      {:done, reply} -> {:done, reply}
      {:nobody, request} -> {:nobody, request.deaths, request.overloaded?}
    end
  end

  # Waits until the peers here that are ready have the program.
  defp adopt(handle, definition, deadline) do
    case CoordinatorClient.await(handle.name, deadline) do
      nil -> :ok
      coordinator -> GenServer.call(coordinator, {:adopt, definition}, Deadline.left(deadline))
    end
  catch
    # The call shows whether the program is there.
    :exit, _no_answer -> :ok
  end
end
