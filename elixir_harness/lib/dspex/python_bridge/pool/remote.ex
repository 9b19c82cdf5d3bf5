defmodule DSPex.PythonBridge.Pool.Remote do
  @moduledoc false
  # The part of a call to another node that runs on that node: see `DSPex.PythonBridge.Pool.Cluster.RemoteCall`. Nodes of
  # other versions start it by these names and with these arguments, so they do not change, nor does the struct
  # `DSPex.PythonBridge.Pool.Request`.

  alias DSPex.PythonBridge.Programs
  alias DSPex.PythonBridge.OTP.{Deadline, ServerGuard}
  alias DSPex.PythonBridge.Pool.{Attempt, CoordinatorClient, Handle, LocalCall, Request}
  alias DSPex.PythonBridge.Pool.Cluster.Relay

  @doc "Makes the call for a courier; `deadline` of the request is the ms that are left."
  @spec proxy(pid(), atom(), Request.t(), Programs.Store.definition() | nil) :: :ok
  def proxy(courier, name, request, definition) do
    ServerGuard.run(fn ->
      attempt = &Attempt.make(%Attempt{}, &1, &2, &3)
      send(courier, {:served, serve(name, received(request), definition, attempt)})
    end)

    :ok
  end

  @doc """
  Starts the process that makes a call with chunks or tools, or one that must not be made twice: the caller's proxy sends
  that its request, with the body that `request` does not have. Later versions may add keys to the last argument.
  """
  @spec open(pid(), atom(), Request.t(), Programs.Store.definition() | nil, %{retry: boolean()}) ::
          pid()
  def open(caller, name, request, definition, %{retry: retry}) do
    request = received(request)

    Relay.start(caller, retry, fn body, attempt ->
      serve(name, %{request | body: body}, definition, attempt)
    end)
  end

  defp received(request), do: %{request | deadline: Deadline.new(request.deadline)}

  defp serve(name, request, definition, attempt) do
    case Handle.fetch(name) do
      nil -> {:nobody, request.deaths, nil}
      handle -> run(handle, request, definition, attempt)
    end
  end

  defp run(handle, request, definition, attempt) do
    if definition, do: adopt(handle, definition, request.deadline)

    case LocalCall.run(handle, request, attempt) do
      {:done, reply} -> {:done, reply}
      {:nobody, request} -> {:nobody, request.deaths, request.overloaded}
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
