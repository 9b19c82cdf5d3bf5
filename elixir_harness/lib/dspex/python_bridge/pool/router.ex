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

  # How soon the keeper, which is being started again, is looked for anew.
  @keeper_ms 5

  @doc "Brings the call to a peer, here or elsewhere."
  @spec run(Handle.t(), Request.t()) :: reply()
  def run(%Handle{} = info, %Request{} = request) do
    with {:nobody, request} <- here(info, request),
         {:nobody, request} <- RemoteCall.elsewhere(info, request) do
      if request.overloaded?, do: failed(:overloaded), else: wait(info, request)
    else
      {:done, reply} -> reply
    end
  end

  @doc "The same for as long as a peer of this node can serve, without waiting for one."
  @spec here(Handle.t(), Request.t()) :: {:done, reply()} | {:nobody, Request.t()}
  def here(%Handle{} = info, %Request{} = request) do
    preference = if request.deaths == 0, do: :least_busy, else: :longest_up

    case LoadCounters.pick(info.slots, passed(info, request), preference) do
      nil -> {:nobody, request}
      index -> try_slot(info, request, index)
    end
  end

  # A slot that has become ready again since may be tried again.
  defp passed(_info, %Request{passed: []}), do: []

  defp passed(info, %Request{passed: passed}),
    do:
      for(
        {index, since} <- passed,
        LoadCounters.ready_since(info.slots, index) == since,
        do: index
      )

  defp try_slot(info, request, index) do
    since = LoadCounters.ready_since(info.slots, index)

    case ask(info, request, index) do
      {:frame, _bytes} = reply ->
        judge(info, request, index, since, Caller.read(reply))

      {:error, {:died, :sent}} when request.deaths >= info.settings.max_retries ->
        {:done, failed(:python_process_died)}

      {:error, {:died, :sent}} ->
        resent(info, index)
        here(info, pass(%{request | deaths: request.deaths + 1}, index, since))

      {:error, :overloaded} ->
        here(info, pass(%{request | overloaded?: true}, index, since))

      {:error, gone} when gone in [{:died, :unsent}, :bridge_not_running] ->
        here(info, pass(request, index, since))

      # Its time has passed, or it is too large.
      {:error, _final} = reply ->
        {:done, Caller.read(reply)}
    end
  end

  defp resent(info, index) do
    metadata = %{bridge: Handle.bridge(info, index), pool: info.name, reason: :died}
    Telemetry.execute([:bridge, :resend], %{count: 1}, metadata)
  end

  defp pass(request, index, since), do: %{request | passed: [{index, since} | request.passed]}

  # Counted before it is sent; the bridge counts it out when it is over, in whatever way, unless it
  # never got it.
  defp ask(info, request, index) do
    case Process.whereis(Handle.bridge(info, index)) do
      nil ->
        {:error, :bridge_not_running}

      pid ->
        life = LoadCounters.take(info.slots, index)
        terms = {:caller, request.deaths, nil}
        reply = Caller.send_and_wait(pid, Request.left(request), request.body, terms)

        if reply == {:error, :bridge_not_running},
          do: LoadCounters.give_back(info.slots, index, life)

        reply
    end
  end

  # Two errors of a peer's can be mended: by another peer, and by the definition.
  defp judge(info, request, index, since, {:error, %Error{type: :overloaded}}),
    do: here(info, pass(%{request | overloaded?: true}, index, since))

  defp judge(info, request, index, _since, {:error, %Error{type: :program_not_found}} = reply)
       when request.program != nil do
    if index in request.repaired,
      do: {:done, reply},
      else: repair(info, request, index, reply)
  end

  defp judge(_info, _request, _index, _since, reply), do: {:done, reply}

  defp repair(info, request, index, reply) do
    keeper = CoordinatorClient.await(info.name, request.deadline)

    case create_at(keeper, request, index) do
      {:ok, _id, _created, _meta} ->
        try_slot(info, %{request | repaired: [index | request.repaired]}, index)

      # The pool has no such program, or its bridge has just ended; or the keeper has.
      {:error, %Error{type: :bridge_not_running}} when keeper != nil ->
        if Process.alive?(keeper), do: {:done, reply}, else: repair(info, request, index, reply)

      # Then that is why it is missing.
      refusal ->
        {:done, refusal}
    end
  end

  defp create_at(nil, _request, _index), do: failed(:bridge_not_running)

  # By the keeper, which knows what the program is now, and in the order of all changes.
  defp create_at(keeper, request, index) do
    terms = {:never, 0, {:repair, index, request.program}}
    Caller.read(Caller.send_and_wait(keeper, Request.left(request), "", terms))
  end

  ## Nobody can serve now

  # The keeper is told what was tried, since it may have changed before the message gets there.
  defp wait(info, request) do
    keeper = Handle.keeper(info.name)
    ref = :erlang.monitor(:process, keeper, alias: :reply_demonitor)
    tell(keeper, {:wait, ref, self(), request.passed, request.passed_nodes})

    receive do
      {^ref, :changed} -> again(info.name, request)
      {:DOWN, ^ref, :process, _keeper, _reason} -> wait_for_keeper(info.name, request)
    after
      Request.left(request) ->
        Process.demonitor(ref, [:flush])
        tell(keeper, {:abandon, ref})

        # It may have come between the two.
        receive do
          {^ref, :changed} -> failed(:timeout)
        after
          0 -> failed(:timeout)
        end
    end
  end

  # It is being started again, unless the pool has ended.
  defp wait_for_keeper(name, request) do
    receive do
    after
      min(@keeper_ms, Request.left(request)) -> :ok
    end

    if Request.left(request) == 0, do: failed(:timeout), else: again(name, request)
  end

  # The pool may have been started anew meanwhile, with other slots.
  defp again(name, request) do
    case Handle.fetch(name) do
      nil -> failed(:bridge_not_running)
      info -> run(info, Request.renew(request))
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
