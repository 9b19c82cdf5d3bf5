defmodule DSPex.PythonBridge.Calls.Dispatcher do
  @moduledoc false
  # Which call goes to which peer, and when. At most one peer serves; calls are held while none does. Calls that may
  # have killed a peer wait for each other (`DSPex.PythonBridge.Calls.Suspects`). What a peer's start and end do to its
  # calls is `DSPex.PythonBridge.Calls.Handover`'s.

  alias DSPex.PythonBridge.{Calls, Protocol}
  alias DSPex.PythonBridge.Calls.{InFlight, Request, SendQueue, Suspects}
  alias DSPex.PythonBridge.OTP.Deadline

  @doc "The peer that a new call can be sent to at once, or nil."
  @spec free_peer(InFlight.t(), Request.t()) :: port() | nil
  def free_peer(%InFlight{to: nil, loading: nil}, _request), do: nil

  def free_peer(%InFlight{to: nil, loading: port}, request),
    do: if(Protocol.ping?(request.body), do: port)

  # Pings bypass all: they cannot crash a peer, and a held ping looks like a hang to the Monitor.
  def free_peer(%InFlight{to: port} = in_flight, %Request{} = request) do
    free? =
      (:gb_sets.is_empty(in_flight.held) and not deadly?(in_flight, request) and
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

  @doc "To be called when a call has ended: the next suspect may have waited for that."
  @spec answered(InFlight.t()) :: InFlight.t()
  def answered(%InFlight{} = in_flight),
    do: if(Suspects.due?(in_flight.suspects), do: advance(in_flight), else: in_flight)

  @doc """
  Withdraws a call that nobody waits for any longer: it is taken back if it still waits to be written, else
  cancelled in the peer.
  """
  @spec withdraw(InFlight.t(), pos_integer(), Request.t()) :: InFlight.t()
  # Others may be held behind it.
  def withdraw(in_flight, id, %Request{at: nil} = request),
    do: in_flight |> InFlight.release(id, request) |> advance()

  def withdraw(in_flight, id, request),
    do: in_flight |> take_from_peer(id, request) |> answered()

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
    :gb_sets.is_empty(in_flight.held) and not Suspects.any_waits?(in_flight.suspects) and
      Enum.all?(in_flight.send_queues, fn {_port, send_queue} -> SendQueue.empty?(send_queue) end)
  end

  @doc "To be called when the timer `:window` has fired: the next suspect is sent."
  @spec window_over(InFlight.t(), reference()) :: InFlight.t()
  def window_over(%InFlight{window_timer: timer} = in_flight, timer),
    do: in_flight |> close_window() |> advance()

  # Of an earlier window.
  def window_over(%InFlight{} = in_flight, _timer), do: in_flight

  @doc "Closes the window of the suspect that was sent last, if any: no peer serves, or another one."
  @spec close_window(InFlight.t()) :: InFlight.t()
  def close_window(%InFlight{} = in_flight),
    do: %{in_flight | suspects: Suspects.close_window(in_flight.suspects, Deadline.now())}

  ## Held calls, and when they are sent

  @doc "Holds a call, as a suspect if it is one already, `suspect?` says so, or peers have died with it."
  @spec hold(InFlight.t(), pos_integer(), Request.t(), suspect? :: boolean()) :: InFlight.t()
  def hold(%InFlight{} = in_flight, id, request, suspect? \\ false) do
    suspect? = suspect? or Suspects.member?(in_flight.suspects, id) or deadly?(in_flight, request)

    if suspect? and not Protocol.ping?(request.body),
      do: %{in_flight | suspects: Suspects.add(in_flight.suspects, id, Deadline.now())},
      else: %{in_flight | held: :gb_sets.add(id, in_flight.held)}
  end

  # Two peers have died with it, or it has only one retry left.
  defp deadly?(_in_flight, %Request{deaths: 0}), do: false
  defp deadly?(in_flight, request), do: request.deaths >= min(2, in_flight.max_retries)

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

  def advance(%InFlight{} = in_flight), do: in_flight |> give_held() |> give_suspects()

  defp give_suspects(%InFlight{held: held, suspects: suspects} = in_flight) do
    if Suspects.due?(suspects) do
      {ids, window_ms, suspects} = Suspects.next(suspects, Deadline.now())
      held = :gb_sets.union(held, :gb_sets.from_list(ids))
      in_flight = give_held(%{in_flight | held: held, suspects: suspects})
      if window_ms, do: start_window(in_flight, window_ms), else: give_suspects(in_flight)
    else
      in_flight
    end
  end

  defp start_window(%InFlight{window_timer: before} = in_flight, window_ms) do
    if before, do: :erlang.cancel_timer(before, async: true, info: false)
    %{in_flight | window_timer: :erlang.start_timer(window_ms, self(), :window)}
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
