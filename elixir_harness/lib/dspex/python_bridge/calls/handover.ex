defmodule DSPex.PythonBridge.Calls.Handover do
  @moduledoc false
  # What the start and end of a peer do to the calls: a peer that serves is given the held ones, and when it dies its
  # calls are held for the next one, `max_retries` times at most.

  alias DSPex.PythonBridge.Calls
  alias DSPex.PythonBridge.Calls.{Dispatcher, InFlight, Request, SendQueue, Suspects}
  alias DSPex.PythonBridge.OTP.Deadline

  @doc "Adds a peer that was started. Until `loading/2` only `Dispatcher.own_request/3` sends to it."
  @spec attach(InFlight.t(), port()) :: InFlight.t()
  def attach(%InFlight{} = in_flight, port),
    do: %{in_flight | send_queues: Map.put(in_flight.send_queues, port, SendQueue.new(port))}

  @doc "The peer is up, and is given the programs: until `serve/2` it gets pings, if no other serves."
  @spec loading(InFlight.t(), port()) :: InFlight.t()
  def loading(%InFlight{} = in_flight, port),
    do: Dispatcher.give_pings(%{in_flight | loading: port})

  @doc "Sends calls to this peer from now on, the held ones first."
  @spec serve(InFlight.t(), port()) :: InFlight.t()
  def serve(%InFlight{} = in_flight, port) do
    in_flight =
      if in_flight.to in [nil, port], do: in_flight, else: take_back(in_flight, in_flight.to)

    # Another peer was silent.
    heard? = in_flight.silent? and in_flight.to != port
    in_flight = if heard?, do: Calls.heard(in_flight), else: in_flight
    in_flight = Dispatcher.close_window(%{in_flight | to: port, loading: nil})
    Dispatcher.advance(%{in_flight | hold_changes?: false})
  end

  # Requests that still wait to be written to one peer go to the next.
  defp take_back(%InFlight{send_queues: send_queues} = in_flight, port) do
    {ids, send_queue} = SendQueue.take_back(Map.fetch!(send_queues, port))
    in_flight = %{in_flight | send_queues: %{send_queues | port => send_queue}}

    # The bridge's own requests are not in the table, and were for that peer only.
    for id <- ids, request = Calls.Table.get(in_flight.calls, id), reduce: in_flight do
      in_flight -> hold(in_flight, id, %{request | at: nil})
    end
  end

  @doc """
  Holds calls that change the programs, and all after the first of them, until `serve/2`: the programs are about to
  be loaded into another peer.
  """
  @spec hold_changes(InFlight.t()) :: InFlight.t()
  def hold_changes(%InFlight{} = in_flight), do: %{in_flight | hold_changes?: true}

  @doc """
  Removes a peer. It `:died`, which any call in flight may have caused, or was `:replaced`, which none has. Each
  of its calls is sent again or fails, as its caller asked for; what was not written to it is held.
  """
  @spec lost(InFlight.t(), port(), :died | :replaced) :: InFlight.t()
  def lost(%InFlight{send_queues: send_queues} = in_flight, port, _how)
      when not is_map_key(send_queues, port),
      do: in_flight

  def lost(%InFlight{} = in_flight, port, how) do
    {send_queue, send_queues} = Map.pop!(in_flight.send_queues, port)
    unwritten = MapSet.new(SendQueue.close(send_queue))
    calls = Calls.Table.at(in_flight.calls, port)
    cancelled = Map.delete(in_flight.cancelled_changes, port)
    in_flight = %{in_flight | send_queues: send_queues, cancelled_changes: cancelled}
    in_flight = if in_flight.to == port, do: none_serves(in_flight), else: in_flight
    # A program that it loads has ended it, not the pings that it had.
    how = if in_flight.loading == port, do: :unsent, else: how
    in_flight = if how == :unsent, do: %{in_flight | loading: nil}, else: in_flight
    {held, sent} = Enum.split_with(calls, fn {id, _request} -> id in unwritten end)

    in_flight
    |> lost_calls(held, :unsent)
    |> lost_calls(sent, how)
    |> release_pools()
    |> Dispatcher.give_pings()
    |> Dispatcher.advance()
  end

  defp none_serves(in_flight), do: Dispatcher.close_window(%{in_flight | to: nil})

  defp lost_calls(in_flight, calls, :died) do
    sent = for {id, request} <- calls, do: {id, request.since}
    {verdicts, suspects?, suspects} = Suspects.died(in_flight.suspects, sent, Deadline.now())

    for {id, request} <- calls, reduce: %{in_flight | suspects: suspects} do
      in_flight ->
        case Map.fetch!(verdicts, id) do
          :innocent ->
            lost_call(in_flight, id, request, :spared, false)

          :likely when request.deaths >= in_flight.max_retries ->
            lost_call(in_flight, id, request, :spared, false)

          _counted ->
            lost_call(in_flight, id, request, :died, suspects?)
        end
    end
  end

  defp lost_calls(in_flight, calls, how) do
    for {id, request} <- calls, reduce: in_flight do
      in_flight -> lost_call(in_flight, id, request, how, false)
    end
  end

  # What has begun a tool, or was streamed from, was written.
  defp lost_call(in_flight, id, %Request{bound?: true}, _how, _suspect?),
    do: InFlight.fail(in_flight, id, :tool_begun)

  defp lost_call(in_flight, id, %Request{streamed?: true}, how, _suspect?),
    do: InFlight.fail(in_flight, id, failure(how))

  defp lost_call(in_flight, id, %Request{retry: :pool}, how, _suspect?),
    do: InFlight.fail(in_flight, id, {:died, pool_failure(how)})

  defp lost_call(in_flight, id, %Request{retry: :never}, how, _suspect?) when how != :unsent,
    do: InFlight.fail(in_flight, id, failure(how))

  defp lost_call(%{max_retries: most} = in_flight, id, %{deaths: deaths}, :died, _suspect?)
       when deaths >= most,
       do: InFlight.fail(in_flight, id, :python_process_died)

  defp lost_call(in_flight, id, request, how, suspect?) do
    Calls.Events.restarted(request)
    deaths = if how == :died, do: request.deaths + 1, else: request.deaths
    request = %{request | at: nil, deaths: deaths, told?: false}
    resent = if how == :unsent, do: in_flight.resent, else: in_flight.resent + 1
    hold(%{in_flight | resent: resent}, id, request, suspect?)
  end

  defp hold(%InFlight{calls: calls} = in_flight, id, request, suspect? \\ false) do
    in_flight = %{in_flight | calls: Calls.Table.replace(calls, id, request)}
    Dispatcher.hold(in_flight, id, request, suspect?)
  end

  defp failure(:replaced), do: :replaced
  defp failure(_died), do: :python_process_died

  defp pool_failure(:died), do: :sent
  defp pool_failure(:unsent), do: :unsent
  # It may be sent again, and is not blamed.
  defp pool_failure(_spared_or_replaced), do: :spared

  # A pool knows other peers, and need not wait for the next one.
  defp release_pools(%InFlight{to: nil} = in_flight) do
    for {id, %Request{retry: :pool}} <- Calls.Table.at(in_flight.calls, nil), reduce: in_flight do
      in_flight -> InFlight.fail(in_flight, id, {:died, :unsent})
    end
  end

  defp release_pools(in_flight), do: in_flight
end
