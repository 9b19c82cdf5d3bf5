defmodule DSPex.PythonBridge.Pool.Router do
  @moduledoc false
  # The path of one call, in the caller's process: a peer of this node; if none can serve, another node of the
  # cluster; if none can either, a wait until that changes, and again from the start. One of many, which are to be spread,
  # begins at any node.

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.OTP.Ask
  alias DSPex.PythonBridge.Pool.{Attempt, CoordinatorClient, Handle, LocalCall, Request}
  alias DSPex.PythonBridge.Pool.Cluster.RemoteCall

  @doc "Runs the call on a peer of this or another node; waits for one until the request's deadline."
  @spec run(Handle.t(), Request.t(), Attempt.t()) :: LocalCall.reply() | Attempt.begun()
  def run(%Handle{} = handle, %Request{} = request, %Attempt{spread?: true} = attempt) do
    attempt = %{attempt | spread?: false}

    with true <- RemoteCall.first?(handle),
         {:nobody, request} <- RemoteCall.run(handle, request, attempt) do
      nobody(handle, request, attempt)
    else
      false -> run(handle, request, attempt)
      {:done, reply} -> done(handle, reply, attempt)
    end
  end

  def run(%Handle{} = handle, %Request{} = request, %Attempt{} = attempt) do
    with {:nobody, request} <- LocalCall.run(handle, request, &Attempt.make(attempt, &1, &2, &3)),
         {:nobody, request} <- RemoteCall.run(handle, request, attempt) do
      nobody(handle, request, attempt)
    else
      {:done, reply} -> done(handle, reply, attempt)
    end
  end

  defp done(handle, {:begun, %{follow: follow} = call, frame}, attempt) do
    follow = fn reply ->
      with {:again, request} <- follow.(Attempt.last(attempt.retry, reply)),
           do: {:again, fn -> run(handle, request, attempt) end}
    end

    {:begun, %{call | follow: follow}, frame}
  end

  defp done(_handle, reply, _attempt), do: reply

  @doc "As `run/3`, by peers of this node alone, with an attempt of the caller's own."
  @spec run_here(Handle.t(), Request.t(), LocalCall.attempt()) ::
          LocalCall.reply() | Attempt.begun()
  def run_here(%Handle{} = handle, %Request{} = request, attempt) do
    case LocalCall.run(handle, request, attempt) do
      {:done, reply} ->
        reply

      {:nobody, %Request{overloaded: %Error{} = error}} ->
        {:error, error}

      {:nobody, request} ->
        # Only what changes on this node ends the wait.
        request = %{request | passed_nodes: RemoteCall.serving(handle)}
        wait(handle, request, &run_here(&1, &2, attempt))
    end
  end

  ## Nobody can serve now

  defp nobody(_handle, %Request{overloaded: %Error{} = error}, _attempt), do: {:error, error}
  defp nobody(handle, request, attempt), do: wait(handle, request, &run(&1, &2, attempt))

  # What was tried goes along: it may have changed before the message is read.
  defp wait(handle, request, run) do
    coordinator = Process.whereis(Handle.coordinator(handle.name))
    message = &{:wait, &1, self(), request.passed, request.passed_nodes}

    case coordinator && Ask.ask(coordinator, Request.left(request), message) do
      {:ok, :changed} ->
        again(handle.name, request, run)

      {:ok, {:not_started, reason}} ->
        {:error, Error.not_started(reason)}

      {:timeout, ref} ->
        send(coordinator, {:abandon, ref})
        failed(:timeout)

      # It is being restarted, unless the pool has ended.
      _no_coordinator ->
        CoordinatorClient.await(handle.name, request.deadline)

        if Request.left(request) == 0,
          do: failed(:timeout),
          else: again(handle.name, request, run)
    end
  end

  # The pool may have been restarted meanwhile, with other slots.
  defp again(name, request, run) do
    case Handle.fetch(name) do
      nil -> {:error, Error.not_running(:pool, name)}
      handle -> run.(handle, Request.renew(request))
    end
  end

  defp failed(type), do: {:error, Error.new(type)}
end
