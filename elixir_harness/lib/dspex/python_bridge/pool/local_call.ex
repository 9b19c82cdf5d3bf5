defmodule DSPex.PythonBridge.Pool.LocalCall do
  @moduledoc false
  # One call to the peers of this node, in the caller's process: to the least busy one, and to the next if that
  # one fails.
  #
  # A request that took a peer down may take the next one down, too: after `max_retries` more deaths it is given
  # up. Until then it goes to the peer that has been up longest, so that all such requests meet in one bridge,
  # which finds out which of them kills (`DSPex.PythonBridge.Calls.Suspects`), and the other peers stay up.

  alias DSPex.PythonBridge.{Calls, Error, Programs, Protocol, Telemetry}
  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.Pool.{Attempt, CoordinatorClient, Handle, Request}

  # For each call.
  @compile {:inline, passed: 2, ask: 4}

  @typedoc "A result of `DSPex.PythonBridge.Client.Caller.read/1`."
  @type reply :: {:ok, Protocol.id(), term(), map()} | {:error, Error.t()}

  @typedoc "Makes the call at one bridge: see `DSPex.PythonBridge.Pool.Attempt.make/4`."
  @type attempt :: (pid(), Attempt.slot(), Request.t() -> Calls.Request.reply() | Attempt.begun())

  @doc "Sends the call to peers of this node as long as one can serve it, without waiting for one."
  @spec run(Handle.t(), Request.t(), attempt()) ::
          {:done, reply() | Attempt.begun()} | {:nobody, Request.t()}
  def run(%Handle{} = handle, %Request{} = request, attempt) do
    preference = if request.deaths == 0, do: :least_busy, else: :longest_up

    case LoadCounters.pick(handle.counters, passed(handle, request), preference) do
      nil -> {:nobody, request}
      index -> try_slot(handle, request, index, attempt)
    end
  end

  # A slot that has become ready again since may be tried again.
  defp passed(_handle, %Request{passed: []}), do: []

  defp passed(handle, %Request{passed: passed}),
    do:
      for(
        {index, since} <- passed,
        LoadCounters.ready_since(handle.counters, index) == since,
        do: index
      )

  defp try_slot(handle, request, index, attempt) do
    since = LoadCounters.ready_since(handle.counters, index)

    case ask(handle, request, index, attempt) do
      {:frame, _bytes} = reply ->
        judge(handle, request, {index, since}, attempt, Caller.read(reply))

      {:begun, call, frame} ->
        call = Map.put(call, :follow, &follow(handle, request, {index, since}, &1))
        {:done, {:begun, call, frame}}

      reply ->
        with {:again, request} <- follow(handle, request, {index, since}, reply),
             do: run(handle, request, attempt)
    end
  end

  @doc "Whether another peer may be tried after a reply."
  @spec again?(Calls.Request.reply()) :: boolean()
  def again?({:error, {:died, _how}}), do: true
  def again?({:error, reason}), do: reason in [:bridge_not_running, :overloaded]
  def again?(_final), do: false

  # What follows from a reply.
  defp follow(handle, request, {index, since}, reply) do
    counts? = reply == {:error, {:died, :sent}}

    cond do
      counts? and request.deaths >= handle.settings.max_retries ->
        {:done, {:error, Error.new(:python_process_died)}}

      counts? ->
        metadata = %{bridge: Handle.bridge(handle, index), pool: handle.name, reason: :died}
        Telemetry.execute([:bridge, :resend], %{count: 1}, metadata)
        {:again, pass(%{request | deaths: request.deaths + 1}, index, since)}

      again?(reply) ->
        # What a peer says of it tells more.
        overloaded =
          request.overloaded || if(reply == {:error, :overloaded}, do: Error.new(:overloaded))

        {:again, pass(%{request | overloaded: overloaded}, index, since)}

      # Its time has passed, or it is too large.
      true ->
        {:done, Caller.read(reply)}
    end
  end

  defp pass(request, index, since), do: %{request | passed: [{index, since} | request.passed]}

  defp ask(handle, request, index, attempt) do
    case Process.whereis(Handle.bridge(handle, index)) do
      nil -> {:error, :bridge_not_running}
      bridge -> attempt.(bridge, {handle.counters, index}, request)
    end
  end

  # Two errors of a peer can be repaired: `overloaded` by another peer, unless the run has asked LMs or tools, which
  # would be asked again; a missing program by its definition.
  defp judge(handle, request, {index, since}, attempt, reply) do
    case reply do
      {:error, %Error{type: :overloaded, retryable: true} = error} ->
        run(handle, pass(%{request | overloaded: error}, index, since), attempt)

      {:error, %Error{type: :program_not_found}} when request.program != nil ->
        cond do
          index in request.repaired -> {:done, reply}
          error = hopeless(handle, request) -> {:done, {:error, error}}
          true -> repair(handle, request, index, attempt, reply)
        end

      _final ->
        {:done, reply}
    end
  end

  # A declaration that is not a definition.
  defp hopeless(handle, request) do
    Programs.Store.undeclared(handle.programs)[request.program]
  rescue
    # The table has ended with the pool.
    ArgumentError -> nil
  end

  # By the coordinator, which has the program's current definition and orders all changes.
  defp repair(handle, request, index, attempt, reply) do
    coordinator = CoordinatorClient.await(handle.name, request.deadline)

    case create_at(coordinator, request, index) do
      {:ok, _id, _created, _meta} ->
        try_slot(handle, %{request | repaired: [index | request.repaired]}, index, attempt)

      # The pool has no such program, or its bridge has just ended; or the coordinator has.
      {:error, %Error{type: :bridge_not_running}} when coordinator != nil ->
        if Process.alive?(coordinator),
          do: {:done, reply},
          else: repair(handle, request, index, attempt, reply)

      # The reason why the program is missing.
      {:error, error} ->
        {:done, {:error, Programs.Declared.not_loaded(request.program, error)}}
    end
  end

  defp create_at(nil, _request, _index), do: {:error, Error.new(:bridge_not_running)}

  defp create_at(coordinator, request, index) do
    repair = %Calls.Request{body: "", change: {:repair, index, request.program}}
    Caller.read(Caller.send_and_wait(coordinator, Request.left(request), repair))
  end
end
