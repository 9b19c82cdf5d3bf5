defmodule DSPex.PythonBridge.Pool.Router do
  @moduledoc """
  The way of one call to a peer, in the caller's process: the least busy peer of this node; if none can
  serve, another node; if none can either, a wait until something changes; and on from there when what
  was chosen fails.

  A peer's death counts, and after `max_retries` of them more the call is given up: it may be what
  kills them. A suspect goes to the peer that has been up longest, so that suspects meet there, where
  its bridge tells them apart, and do not take all peers down one after another.
  """

  alias DSPex.PythonBridge.{Error, Protocol, Telemetry}
  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.Pool.{CoordinatorClient, Handle, Request}
  alias DSPex.PythonBridge.Pool.Cluster.RemoteCall

  @typedoc "What `DSPex.PythonBridge.Client.Caller.read/1` gives."
  @type reply :: {:ok, Protocol.id(), term(), map()} | {:error, Error.t()}

  # How soon the coordinator, which is being started again, is looked for anew.
  @coordinator_ms 5

  @doc "Brings the call to a peer, here or elsewhere."
  @spec run(Handle.t(), Request.t()) :: reply()
  def run(%Handle{} = handle, %Request{} = request) do
    with {:nobody, request} <- here(handle, request),
         {:nobody, request} <- RemoteCall.elsewhere(handle, request) do
      if request.overloaded?, do: failed(:overloaded), else: wait(handle, request)
    else
      {:done, reply} -> reply
    end
  end

  @doc "The same for as long as a peer of this node can serve, without waiting for one."
  @spec here(Handle.t(), Request.t()) :: {:done, reply()} | {:nobody, Request.t()}
  def here(%Handle{} = handle, %Request{} = request) do
    preference = if request.deaths == 0, do: :least_busy, else: :longest_up

    case LoadCounters.pick(handle.counters, passed(handle, request), preference) do
      nil -> {:nobody, request}
      index -> try_slot(handle, request, index)
    end
  end

  # A slot that has become ready again since may be tried again.
  defp passed(_info, %Request{passed: []}), do: []

  defp passed(handle, %Request{passed: passed}),
    do:
      for(
        {index, since} <- passed,
        LoadCounters.ready_since(handle.counters, index) == since,
        do: index
      )

  defp try_slot(handle, request, index) do
    since = LoadCounters.ready_since(handle.counters, index)

    case ask(handle, request, index) do
      {:frame, _bytes} = reply ->
        judge(handle, request, index, since, Caller.read(reply))

      {:error, {:died, :sent}} when request.deaths >= handle.settings.max_retries ->
        {:done, failed(:python_process_died)}

      {:error, {:died, :sent}} ->
        resent(handle, index)
        here(handle, pass(%{request | deaths: request.deaths + 1}, index, since))

      {:error, :overloaded} ->
        here(handle, pass(%{request | overloaded?: true}, index, since))

      {:error, gone} when gone in [{:died, :unsent}, :bridge_not_running] ->
        here(handle, pass(request, index, since))

      # Its time has passed, or it is too large.
      {:error, _final} = reply ->
        {:done, Caller.read(reply)}
    end
  end

  defp resent(handle, index) do
    metadata = %{bridge: Handle.bridge(handle, index), pool: handle.name, reason: :died}
    Telemetry.execute([:bridge, :resend], %{count: 1}, metadata)
  end

  defp pass(request, index, since), do: %{request | passed: [{index, since} | request.passed]}

  # Counted before it is sent; the bridge counts it out when it is over, in whatever way, unless it
  # never got it.
  defp ask(handle, request, index) do
    case Process.whereis(Handle.bridge(handle, index)) do
      nil ->
        {:error, :bridge_not_running}

      pid ->
        life = LoadCounters.take(handle.counters, index)
        terms = {:caller, request.deaths, nil}
        reply = Caller.send_and_wait(pid, Request.left(request), request.body, terms)

        if reply == {:error, :bridge_not_running},
          do: LoadCounters.give_back(handle.counters, index, life)

        reply
    end
  end

  # Two errors of a peer's can be mended: by another peer, and by the definition.
  defp judge(handle, request, index, since, {:error, %Error{type: :overloaded}}),
    do: here(handle, pass(%{request | overloaded?: true}, index, since))

  defp judge(handle, request, index, _since, {:error, %Error{type: :program_not_found}} = reply)
       when request.program != nil do
    if index in request.repaired,
      do: {:done, reply},
      else: repair(handle, request, index, reply)
  end

  defp judge(_info, _request, _index, _since, reply), do: {:done, reply}

  defp repair(handle, request, index, reply) do
    coordinator = CoordinatorClient.await(handle.name, request.deadline)

    case create_at(coordinator, request, index) do
      {:ok, _id, _created, _meta} ->
        try_slot(handle, %{request | repaired: [index | request.repaired]}, index)

      # The pool has no such program, or its bridge has just ended; or the coordinator has.
      {:error, %Error{type: :bridge_not_running}} when coordinator != nil ->
        if Process.alive?(coordinator),
          do: {:done, reply},
          else: repair(handle, request, index, reply)

      # Then that is why it is missing.
      refusal ->
        {:done, refusal}
    end
  end

  defp create_at(nil, _request, _index), do: failed(:bridge_not_running)

  # By the coordinator, which knows what the program is now, and in the order of all changes.
  defp create_at(coordinator, request, index) do
    terms = {:never, 0, {:repair, index, request.program}}
    Caller.read(Caller.send_and_wait(coordinator, Request.left(request), "", terms))
  end

  ## Nobody can serve now

  # The coordinator is told what was tried, since it may have changed before the message gets there.
  defp wait(handle, request) do
    coordinator = Handle.coordinator(handle.name)
    ref = :erlang.monitor(:process, coordinator, alias: :reply_demonitor)
    tell(coordinator, {:wait, ref, self(), request.passed, request.passed_nodes})

    receive do
      {^ref, :changed} -> again(handle.name, request)
      {:DOWN, ^ref, :process, _coordinator, _reason} -> wait_for_coordinator(handle.name, request)
    after
      Request.left(request) ->
        Process.demonitor(ref, [:flush])
        tell(coordinator, {:abandon, ref})

        # It may have come between the two.
        receive do
          {^ref, :changed} -> failed(:timeout)
        after
          0 -> failed(:timeout)
        end
    end
  end

  # It is being started again, unless the pool has ended.
  defp wait_for_coordinator(name, request) do
    receive do
    after
      min(@coordinator_ms, Request.left(request)) -> :ok
    end

    if Request.left(request) == 0, do: failed(:timeout), else: again(name, request)
  end

  # The pool may have been started anew meanwhile, with other slots.
  defp again(name, request) do
    case Handle.fetch(name) do
      nil -> failed(:bridge_not_running)
      handle -> run(handle, Request.renew(request))
    end
  end

  defp failed(type), do: {:error, Error.new(type)}

  # To a name that nobody has, sending raises.
  defp tell(name, message) do
    case Process.whereis(name) do
      nil -> :ok
      pid -> send(pid, message)
    end
  end
end
