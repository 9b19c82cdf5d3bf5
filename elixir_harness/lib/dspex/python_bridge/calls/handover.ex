defmodule DSPex.PythonBridge.Calls.Handover do
  @moduledoc false
  # What the start and end of a peer do to the calls: a peer that serves is given the programs and the held calls, and
  # when it dies its calls are held for the next one, `max_retries` times at most.

  alias DSPex.PythonBridge.{Calls, Programs}
  alias DSPex.PythonBridge.Calls.{Dispatcher, InFlight, Request, SendQueue, Suspects}

  @doc "Adds a peer that was started. Until `serve/2` only `Dispatcher.own_request/3` sends to it."
  @spec attach(InFlight.t(), port()) :: InFlight.t()
  def attach(%InFlight{} = in_flight, port),
    do: %{in_flight | send_queues: Map.put(in_flight.send_queues, port, SendQueue.new(port))}

  @doc """
  Sends calls to this peer from now on, the held ones first, behind the definitions of all programs. Changes of the
  programs that the peer before has not answered are made here: it may have made them, too, but nobody uses it any more.
  """
  @spec serve(InFlight.t(), port()) :: InFlight.t()
  def serve(%InFlight{} = in_flight, port) do
    in_flight = if in_flight.to, do: take_back(in_flight, in_flight.to), else: in_flight
    # Another peer was silent.
    in_flight = if in_flight.silent?, do: Calls.heard(in_flight), else: in_flight
    pause? = not :gb_sets.is_empty(in_flight.held)
    suspects = if pause?, do: Suspects.pause(in_flight.suspects), else: in_flight.suspects
    in_flight = give_programs(%{in_flight | suspects: suspects}, port)
    Dispatcher.advance(%{in_flight | to: port})
  end

  # The peer loads a program with the first run that needs it.
  defp give_programs(%InFlight{send_queues: send_queues} = in_flight, port) do
    bodies =
      for {_id, _stamp, body} <- Programs.Store.definitions(in_flight.programs),
          do: Programs.Definition.lazy(body)

    send_queue = SendQueue.push_first(Map.fetch!(send_queues, port), bodies)
    %{in_flight | send_queues: %{send_queues | port => send_queue}}
  end

  # What still waits to be written to one peer goes to the next.
  defp take_back(%InFlight{send_queues: send_queues} = in_flight, port) do
    {ids, send_queue} = SendQueue.take_back(Map.fetch!(send_queues, port))
    unwritten = MapSet.new(ids)
    suspects = Suspects.stop(in_flight.suspects)
    send_queues = %{send_queues | port => send_queue}
    in_flight = %{in_flight | send_queues: send_queues, suspects: suspects}

    for {id, request} <- Calls.Table.at(in_flight.calls, port), reduce: in_flight do
      in_flight ->
        cond do
          request.change && request.watch == nil -> InFlight.fail(in_flight, id, :replaced)
          request.change || id in unwritten -> hold(in_flight, id, %{request | at: nil})
          true -> in_flight
        end
    end
  end

  @doc """
  Removes a peer. It `:died`, which any call in flight may have caused; or none has: something else did (`:spared`), or
  it was `:replaced`. Each of its calls is sent again or fails, as its caller asked for; what was not written to it is
  held.
  """
  @spec lost(InFlight.t(), port(), :died | :spared | :replaced) :: InFlight.t()
  def lost(%InFlight{send_queues: send_queues} = in_flight, port, _how)
      when not is_map_key(send_queues, port),
      do: in_flight

  def lost(%InFlight{} = in_flight, port, how) do
    {send_queue, send_queues} = Map.pop!(in_flight.send_queues, port)
    unwritten = MapSet.new(SendQueue.close(send_queue))
    calls = Calls.Table.at(in_flight.calls, port)
    in_flight = %{in_flight | send_queues: send_queues}
    # Suspects are tried with the peer that serves.
    suspects = if in_flight.to == port, do: in_flight.suspects, else: %Suspects{}
    in_flight = if in_flight.to == port, do: none_serves(in_flight), else: in_flight

    in_flight =
      for {id, request} <- calls, reduce: in_flight do
        in_flight ->
          cond do
            id in unwritten ->
              lost_call(in_flight, id, request, :unsent)

            how == :died and
                not Suspects.blamed?(suspects, id, request, in_flight.max_retries) ->
              lost_call(in_flight, id, %{request | spared: request.spared + 1}, :spared)

            true ->
              lost_call(in_flight, id, request, how)
          end
      end

    in_flight |> release_callers() |> Dispatcher.advance()
  end

  defp none_serves(in_flight),
    do: %{in_flight | to: nil, suspects: Suspects.stop(in_flight.suspects)}

  # What has begun a tool, or was streamed from, was written.
  defp lost_call(in_flight, id, %Request{bound?: true}, _how),
    do: InFlight.fail(in_flight, id, :tool_begun)

  defp lost_call(in_flight, id, %Request{streamed?: true}, how),
    do: InFlight.fail(in_flight, id, failure(how))

  defp lost_call(in_flight, id, %Request{retry: :pool}, how),
    do: InFlight.fail(in_flight, id, {:died, callers_failure(how)})

  defp lost_call(in_flight, id, %Request{retry: :never}, how) when how != :unsent,
    do: InFlight.fail(in_flight, id, failure(how))

  # A change that nobody waits for.
  defp lost_call(in_flight, id, %Request{watch: nil}, how),
    do: InFlight.fail(in_flight, id, failure(how))

  defp lost_call(%{max_retries: most} = in_flight, id, %{deaths: deaths}, :died)
       when deaths >= most,
       do: InFlight.fail(in_flight, id, :python_process_died)

  defp lost_call(in_flight, id, request, how) do
    Calls.Events.restarted(request)
    deaths = if how == :died, do: request.deaths + 1, else: request.deaths
    resent = if how == :unsent, do: in_flight.resent, else: in_flight.resent + 1
    request = %{request | at: nil, deaths: deaths, told?: false}
    hold(%{in_flight | resent: resent}, id, request)
  end

  defp hold(%InFlight{calls: calls} = in_flight, id, request) do
    in_flight = %{in_flight | calls: Calls.Table.replace(calls, id, request)}
    Dispatcher.hold(in_flight, id, request)
  end

  defp failure(:replaced), do: :replaced
  defp failure(_died), do: :python_process_died

  defp callers_failure(:died), do: :sent
  defp callers_failure(:unsent), do: :unsent
  # It may be sent again, and is not blamed.
  defp callers_failure(_spared_or_replaced), do: :spared

  # A caller that knows other peers need not wait for the next one.
  defp release_callers(%InFlight{to: nil} = in_flight) do
    for {id, %Request{retry: :pool}} <- Calls.Table.at(in_flight.calls, nil), reduce: in_flight do
      in_flight -> InFlight.fail(in_flight, id, {:died, :unsent})
    end
  end

  defp release_callers(in_flight), do: in_flight
end
