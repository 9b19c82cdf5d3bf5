defmodule DSPex.PythonBridge.Calls.Dispatcher do
  @moduledoc false
  # Which call goes to which peer, and when. At most one peer serves; calls are held while none does. Calls that may
  # have killed a peer wait for each other (`DSPex.PythonBridge.Calls.Suspects`). What a peer's start and end do to its
  # calls is `DSPex.PythonBridge.Calls.Handover`'s.

  alias DSPex.PythonBridge.{Calls, Protocol}
  alias DSPex.PythonBridge.Calls.{InFlight, Request, SendQueue, Suspects}

  @doc "The peer that a new call can be sent to at once, or nil."
  @spec free_peer(InFlight.t(), Request.t()) :: port() | nil
  def free_peer(%InFlight{to: port, max_retries: most}, %Request{} = request),
    do: if(not Suspects.suspect?(request, most), do: port)

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
  @spec answered(InFlight.t(), Request.t()) :: InFlight.t()
  def answered(%InFlight{} = in_flight, %Request{deaths: 0}), do: in_flight
  def answered(%InFlight{} = in_flight, %Request{}), do: advance(in_flight)

  @doc """
  Withdraws a call that nobody waits for any longer: it is taken back if it still waits to be written, else
  cancelled in the peer.
  """
  @spec withdraw(InFlight.t(), pos_integer(), Request.t()) :: InFlight.t()
  def withdraw(in_flight, id, %Request{at: nil} = request),
    do: InFlight.release(in_flight, id, request)

  def withdraw(in_flight, id, request),
    do: in_flight |> take_from_peer(id, request) |> answered(request)

  defp take_from_peer(
         %InFlight{send_queues: send_queues} = in_flight,
         id,
         %Request{at: port} = request
       ) do
    send_queue = Map.fetch!(send_queues, port)

    if SendQueue.member?(send_queue, id) do
      %{in_flight | send_queues: %{send_queues | port => SendQueue.drop(send_queue, id)}}
    else
      in_flight |> control(port, Protocol.cancel_frame(id)) |> keep_change(id, request)
    end
  end

  # The peer may have made the change before it reads the cancel.
  defp keep_change(in_flight, _id, %Request{change: nil}), do: in_flight

  defp keep_change(%InFlight{calls: calls} = in_flight, id, request) do
    request = %{request | ref: nil, pid: nil, watch: nil}
    %{in_flight | calls: Calls.Table.put(calls, id, request)}
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

  @doc "Sends the peer that serves, if any, a request whose reply nobody needs, behind all that was sent before."
  @spec tell(InFlight.t(), iodata()) :: InFlight.t()
  def tell(%InFlight{to: nil} = in_flight, _body), do: in_flight

  def tell(%InFlight{to: port} = in_flight, body),
    do: control(in_flight, port, Protocol.request_frame(0, :infinity, body))

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
    :gb_sets.is_empty(in_flight.held) and :gb_sets.is_empty(in_flight.suspects.waiting) and
      Enum.all?(in_flight.send_queues, fn {_port, send_queue} -> SendQueue.empty?(send_queue) end)
  end

  @doc "To be called when the timer `:trial` has fired: the next suspects are sent."
  @spec trial_over(InFlight.t(), reference()) :: InFlight.t()
  def trial_over(%InFlight{} = in_flight, timer),
    do: advance(%{in_flight | suspects: Suspects.timeout(in_flight.suspects, timer)})

  ## Held calls, and when they are sent

  @doc "Holds a call, as a suspect if it is one."
  @spec hold(InFlight.t(), pos_integer(), Request.t()) :: InFlight.t()
  def hold(%InFlight{} = in_flight, id, request) do
    if Suspects.suspect?(request, in_flight.max_retries),
      do: %{in_flight | suspects: Suspects.add(in_flight.suspects, id, request)},
      else: %{in_flight | held: :gb_sets.add(id, in_flight.held)}
  end

  @doc "Sends the held calls that may be sent now."
  @spec advance(InFlight.t()) :: InFlight.t()
  def advance(%InFlight{to: nil} = in_flight), do: in_flight

  def advance(%InFlight{} = in_flight) do
    {ids, suspects} = Suspects.next(in_flight.suspects)
    in_flight = give(in_flight, :gb_sets.to_list(in_flight.held))
    give(%{in_flight | held: :gb_sets.empty(), suspects: suspects}, ids)
  end

  defp give(in_flight, ids) do
    Enum.reduce(ids, in_flight, fn id, %InFlight{calls: calls, to: port} = in_flight ->
      request = %{Calls.Table.fetch!(calls, id) | at: port}
      send_queues = push(in_flight.send_queues, id, request)
      %{in_flight | calls: Calls.Table.replace(calls, id, request), send_queues: send_queues}
    end)
  end

  defp push(send_queues, id, %Request{at: port, deadline: deadline, body: body}) do
    send_queue = SendQueue.push_request(Map.fetch!(send_queues, port), id, deadline, body)
    %{send_queues | port => send_queue}
  end
end
