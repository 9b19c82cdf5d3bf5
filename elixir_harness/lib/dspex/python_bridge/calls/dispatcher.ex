defmodule DSPex.PythonBridge.Calls.Dispatcher do
  @moduledoc false
  # Which call goes to which peer, and when. At most one peer serves; calls are held while none does. While calls
  # are tried that may have killed a peer (`DSPex.PythonBridge.Calls.Quarantine`), all others are held, too. What a
  # peer's start and end do to its calls is `DSPex.PythonBridge.Calls.Handover`'s.

  alias DSPex.PythonBridge.{Calls, Protocol}
  alias DSPex.PythonBridge.Calls.{InFlight, Quarantine, Request, SendQueue}
  alias DSPex.PythonBridge.OTP.Deadline

  @doc "The peer that a new call can be sent to at once, or nil."
  @spec free_peer(InFlight.t(), Request.t()) :: port() | nil
  # The last condition of the last clause is not the usual one. A ping does not kill a peer, and the monitor must not
  # take a trial for a peer that hangs.
  def free_peer(%InFlight{to: nil, loading: nil}, _request), do: nil

  def free_peer(%InFlight{to: nil, loading: port}, request),
    do: if(Protocol.ping?(request.body), do: port)

  def free_peer(%InFlight{to: port, quarantine: quarantine} = in_flight, %Request{} = request) do
    free? =
      (not quarantine.trial? and :gb_sets.is_empty(in_flight.held) and
         not Quarantine.suspect?(quarantine, request.deaths) and
         (request.change == nil or not in_flight.hold_changes?)) or Protocol.ping?(request.body)

    if free?, do: port
  end

  @doc "Sends a new call to the peer that it is at, or holds it if it is at none. Its id is the next one."
  @spec offer(InFlight.t(), pos_integer(), Request.t()) :: InFlight.t()
  def offer(%InFlight{calls: calls} = in_flight, id, %Request{at: nil} = request) do
    calls = Calls.Table.put(calls, id, request)
    %{in_flight | calls: calls, next_id: id + 1} |> hold(id, request) |> advance()
  end

  def offer(%InFlight{calls: calls} = in_flight, id, request) do
    send_queues = push(in_flight.send_queues, id, request)
    calls = Calls.Table.put(calls, id, request)
    %{in_flight | calls: calls, send_queues: send_queues, next_id: id + 1}
  end

  @doc "To be called when a call was answered: others may have waited for that."
  @spec answered(InFlight.t(), pos_integer()) :: InFlight.t()
  def answered(%InFlight{quarantine: %Quarantine{trial?: false}} = in_flight, _id), do: in_flight

  def answered(%InFlight{} = in_flight, id),
    do: advance(%{in_flight | quarantine: Quarantine.leave(in_flight.quarantine, id)})

  @doc """
  Withdraws a call that nobody waits for any longer: it is taken back if it still waits to be written, else
  cancelled in the peer.
  """
  @spec withdraw(InFlight.t(), pos_integer(), Request.t()) :: InFlight.t()
  # Others may be held behind it.
  def withdraw(in_flight, id, %Request{at: nil} = request),
    do: in_flight |> InFlight.release(id, request) |> advance()

  def withdraw(in_flight, id, request),
    do: in_flight |> take_from_peer(id, request) |> answered(id)

  defp take_from_peer(
         %InFlight{send_queues: send_queues} = in_flight,
         id,
         %Request{at: port} = request
       ) do
    send_queue = Map.fetch!(send_queues, port)

    if SendQueue.member?(send_queue, id) do
      %{in_flight | send_queues: %{send_queues | port => SendQueue.drop(send_queue, id)}}
    else
      in_flight |> control(port, Protocol.cancel_frame(id)) |> note_cancelled(id, request)
    end
  end

  # The peer may have made the change before it reads the cancel.
  defp note_cancelled(in_flight, _id, %Request{change: nil}), do: in_flight

  defp note_cancelled(%InFlight{cancelled_changes: cancelled} = in_flight, id, request) do
    of_port = Map.put(Map.get(cancelled, request.at, %{}), id, {request.change, request.body})
    %{in_flight | cancelled_changes: Map.put(cancelled, request.at, of_port)}
  end

  @doc """
  Sends a control frame to a peer, unless that is gone. `about`: the call with whose end the frame, if it
  still waits to be written, becomes useless.
  """
  @spec control(InFlight.t(), port(), iodata(), pos_integer() | nil) :: InFlight.t()
  def control(%InFlight{send_queues: send_queues} = in_flight, port, frame, about \\ nil) do
    case send_queues do
      %{^port => send_queue} ->
        key = in_flight.next_id
        send_queue = SendQueue.push_control(send_queue, key, frame, about)
        %{in_flight | send_queues: %{send_queues | port => send_queue}, next_id: key + 1}

      _gone ->
        in_flight
    end
  end

  @doc "Sends a peer a request of the bridge itself; returns its id, which the reply will have."
  @spec own_request(InFlight.t(), port(), binary()) :: {pos_integer(), InFlight.t()}
  def own_request(%InFlight{next_id: id, send_queues: send_queues} = in_flight, port, body) do
    send_queue = SendQueue.push_request(Map.fetch!(send_queues, port), id, :infinity, body)
    {id, %{in_flight | send_queues: %{send_queues | port => send_queue}, next_id: id + 1}}
  end

  @doc "Whether a peer may still change its programs, by what it was given."
  @spec changing?(InFlight.t(), port()) :: boolean()
  def changing?(%InFlight{} = in_flight, port) do
    is_map_key(in_flight.cancelled_changes, port) or Calls.Table.changing?(in_flight.calls, port)
  end

  @doc "Whether a peer has calls to answer."
  @spec busy?(InFlight.t(), port()) :: boolean()
  def busy?(%InFlight{} = in_flight, port), do: Calls.Table.busy?(in_flight.calls, port)

  @doc "To be called with each `:DOWN` of a process, which may be the writer of a send queue."
  @spec written(InFlight.t(), reference()) :: InFlight.t()
  def written(%InFlight{send_queues: send_queues} = in_flight, monitor) do
    written = fn {port, send_queue} -> {port, SendQueue.written(send_queue, monitor)} end
    %{in_flight | send_queues: Map.new(send_queues, written)}
  end

  @doc "Whether nothing waits to be written, except what the writers of the send queues hold."
  @spec all_written?(InFlight.t()) :: boolean()
  def all_written?(%InFlight{} = in_flight) do
    :gb_sets.is_empty(in_flight.held) and not Quarantine.any?(in_flight.quarantine) and
      Enum.all?(in_flight.send_queues, fn {_port, send_queue} -> SendQueue.empty?(send_queue) end)
  end

  @doc "To be called when the timer `:acquit` has fired: the suspects on trial have outlived their time."
  @spec acquit(InFlight.t(), reference()) :: InFlight.t()
  def acquit(%InFlight{} = in_flight, timer),
    do: advance(%{in_flight | quarantine: Quarantine.acquit(in_flight.quarantine, timer)})

  ## Held calls, and when they are sent

  @doc "Holds a call."
  @spec hold(InFlight.t(), pos_integer(), Request.t()) :: InFlight.t()
  def hold(%InFlight{} = in_flight, id, request) do
    if Quarantine.suspect?(in_flight.quarantine, request.deaths),
      do: %{in_flight | quarantine: Quarantine.add(in_flight.quarantine, id, request.deaths)},
      else: %{in_flight | held: :gb_sets.add(id, in_flight.held)}
  end

  @doc "Sends the held pings to a peer that is up and loads programs, if none serves: they need no program."
  @spec give_pings(InFlight.t()) :: InFlight.t()
  def give_pings(%InFlight{to: nil, loading: port, held: held} = in_flight) when port != nil do
    pings =
      for {id, request} <- Calls.Table.at(in_flight.calls, nil),
          Protocol.ping?(request.body) and :gb_sets.is_element(id, held),
          do: id

    give_all(%{in_flight | held: :gb_sets.difference(held, :gb_sets.from_list(pings))}, pings)
  end

  def give_pings(in_flight), do: in_flight

  @doc "Sends the held calls that may be sent now."
  @spec advance(InFlight.t()) :: InFlight.t()
  def advance(%InFlight{to: nil} = in_flight), do: in_flight

  def advance(%InFlight{quarantine: quarantine} = in_flight) do
    cond do
      Quarantine.trying?(quarantine) ->
        in_flight

      not Quarantine.any?(quarantine) ->
        give_held(%{in_flight | quarantine: Quarantine.stop(quarantine)})

      # Each of these may kill the peer, and a suspect with it.
      not quarantine.trial? and busy?(in_flight, in_flight.to) ->
        ids = for {id, _request} <- Calls.Table.at(in_flight.calls, in_flight.to), do: id
        %{in_flight | quarantine: Quarantine.try_out(quarantine, ids)}

      # They may change the programs, which are being loaded into the next peer: it will get them.
      in_flight.hold_changes? ->
        in_flight

      true ->
        {ids, quarantine} = Quarantine.take_group(quarantine)
        give_all(%{in_flight | quarantine: Quarantine.try_out(quarantine, ids)}, ids)
    end
  end

  defp give_held(%InFlight{held: held} = in_flight) do
    with false <- :gb_sets.is_empty(held),
         {id, rest} = :gb_sets.take_smallest(held),
         false <-
           in_flight.hold_changes? and Calls.Table.fetch!(in_flight.calls, id).change != nil do
      give_held(give_all(%{in_flight | held: rest}, [id]))
    else
      true -> in_flight
    end
  end

  defp give_all(in_flight, ids) do
    Enum.reduce(ids, in_flight, fn id, %InFlight{calls: calls} = in_flight ->
      port = in_flight.to || in_flight.loading
      request = %{Calls.Table.fetch!(calls, id) | at: port, since: Deadline.now()}
      send_queues = push(in_flight.send_queues, id, request)
      %{in_flight | calls: Calls.Table.replace(calls, id, request), send_queues: send_queues}
    end)
  end

  defp push(send_queues, id, %Request{at: port} = request) do
    send_queue = Map.fetch!(send_queues, port)
    %{deadline: deadline, body: body, since: now} = request
    send_queue = SendQueue.push_request(send_queue, id, deadline, body, now)
    %{send_queues | port => send_queue}
  end
end
