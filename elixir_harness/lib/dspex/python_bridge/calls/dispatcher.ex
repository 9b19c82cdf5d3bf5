defmodule DSPex.PythonBridge.Calls.Dispatcher do
  @moduledoc """
  Which calls are with which peer, and which are held: part of `DSPex.PythonBridge.Calls.InFlight`.

  At most one peer serves; others may start, or finish what they were given. A call is held while
  none serves, is given to the one that does, and is held again when that dies, `max_retries` times
  at most. While calls are tried that a peer may have died of (`DSPex.PythonBridge.Calls.Quarantine`), all
  others are held, too.
  """

  alias DSPex.PythonBridge.{Calls, Protocol}
  alias DSPex.PythonBridge.Calls.{InFlight, Quarantine, SendQueue}
  alias DSPex.PythonBridge.Calls.Table.Call

  ## Calls

  @doc "A new call: it is given to the peer that serves, or held."
  @spec offer(InFlight.t(), pos_integer(), Call.t(), integer()) :: InFlight.t()
  def offer(in_flight, id, call, now) do
    if at_once?(in_flight, call) do
      {call, send_queues} = give(in_flight, id, call, now)
      %{in_flight | calls: Calls.Table.put(in_flight.calls, id, call), send_queues: send_queues}
    else
      advance(hold(%{in_flight | calls: Calls.Table.put(in_flight.calls, id, call)}, id, call))
    end
  end

  # The first is the usual way. A ping can harm nobody, and those who watch over the peer by it must
  # not take a trial for a peer that hangs.
  defp at_once?(%InFlight{to: nil}, _call), do: false

  defp at_once?(%InFlight{} = in_flight, %Call{} = call) do
    (not in_flight.quarantine.trial? and :gb_sets.is_empty(in_flight.held) and
       not Quarantine.suspect?(in_flight.quarantine, call.deaths) and
       (call.what == nil or not in_flight.hold_changes?)) or Protocol.ping?(call.body)
  end

  @doc "A call was answered: others may have waited for that."
  @spec answered(InFlight.t(), pos_integer()) :: InFlight.t()
  def answered(%InFlight{quarantine: %Quarantine{trial?: false}} = in_flight, _id), do: in_flight

  def answered(%InFlight{} = in_flight, id),
    do: advance(%{in_flight | quarantine: Quarantine.leave(in_flight.quarantine, id)})

  @doc """
  Nobody waits for a call any more: it is taken back if it still waits to be written, else cancelled in
  the peer.
  """
  @spec withdraw(InFlight.t(), pos_integer(), Call.t()) :: InFlight.t()
  # Others may be held behind it.
  def withdraw(in_flight, id, %Call{at: nil} = call),
    do: in_flight |> forget(id, call) |> advance()

  def withdraw(in_flight, id, call), do: in_flight |> take_from_peer(id, call) |> answered(id)

  defp take_from_peer(%InFlight{send_queues: send_queues} = in_flight, id, call) do
    send_queue = Map.fetch!(send_queues, call.at)

    if SendQueue.member?(send_queue, id) do
      %{in_flight | send_queues: %{send_queues | call.at => SendQueue.drop(send_queue, id)}}
    else
      in_flight = control(in_flight, call.at, Protocol.cancel_frame(id))
      # The peer may have made the change by then.
      if call.what, do: late_change(in_flight, id, call), else: in_flight
    end
  end

  defp late_change(%InFlight{late: late} = in_flight, id, call) do
    of_port = late |> Map.get(call.at, %{}) |> Map.put(id, {call.what, call.body})
    %{in_flight | late: Map.put(late, call.at, of_port)}
  end

  @doc """
  Sends a control frame to a peer, unless that is gone. `about`: the call with whose end the frame, if it
  still waits to be written then, becomes of no use.
  """
  @spec control(InFlight.t(), port(), iodata(), pos_integer() | nil) :: InFlight.t()
  def control(
        %InFlight{send_queues: send_queues, next_id: key} = in_flight,
        port,
        frame,
        about \\ nil
      ) do
    case send_queues do
      %{^port => send_queue} ->
        send_queues = %{
          send_queues
          | port => SendQueue.push_control(send_queue, key, frame, about)
        }

        %{in_flight | send_queues: send_queues, next_id: key + 1}

      _gone ->
        in_flight
    end
  end

  @doc "A call failed: if it was held, it is so no longer."
  @spec forget(InFlight.t(), pos_integer(), Call.t()) :: InFlight.t()
  def forget(in_flight, id, %Call{at: nil} = call) do
    held = :gb_sets.delete_any(id, in_flight.held)
    %{in_flight | held: held, quarantine: Quarantine.drop(in_flight.quarantine, id, call.deaths)}
  end

  def forget(in_flight, _id, _call), do: in_flight

  ## Peers

  @doc "A peer was started: only what `own_request/3` sends goes to it, until `serve/2`."
  @spec attach(InFlight.t(), port()) :: InFlight.t()
  def attach(%InFlight{} = in_flight, port),
    do: %{in_flight | send_queues: Map.put(in_flight.send_queues, port, SendQueue.new(port))}

  @doc "Sends a request of the bridge's own to a peer; gives its id, to know the reply by."
  @spec own_request(InFlight.t(), port(), binary()) :: {pos_integer(), InFlight.t()}
  def own_request(%InFlight{next_id: id, send_queues: send_queues} = in_flight, port, body) do
    send_queue = SendQueue.push_request(Map.fetch!(send_queues, port), id, :infinity, body)
    {id, %{in_flight | send_queues: %{send_queues | port => send_queue}, next_id: id + 1}}
  end

  @doc "From now on calls go to this peer; those that are held, too."
  @spec serve(InFlight.t(), port()) :: InFlight.t()
  def serve(%InFlight{} = in_flight, port) do
    in_flight =
      if in_flight.to in [nil, port], do: in_flight, else: take_back(in_flight, in_flight.to)

    quarantine = Quarantine.stop(in_flight.quarantine)
    advance(%{in_flight | to: port, hold_changes?: false, quarantine: quarantine})
  end

  # What still waits to be written to one peer is for the next.
  defp take_back(in_flight, port) do
    {ids, send_queue} = SendQueue.take_back(Map.fetch!(in_flight.send_queues, port))
    in_flight = %{in_flight | send_queues: %{in_flight.send_queues | port => send_queue}}

    # Those of the bridge's own are nobody's calls, and were for that peer alone.
    for id <- ids, call = Calls.Table.get(in_flight.calls, id), reduce: in_flight do
      in_flight ->
        call = %{call | at: nil}
        hold(%{in_flight | calls: Calls.Table.replace(in_flight.calls, id, call)}, id, call)
    end
  end

  @doc """
  Holds calls that change the programs, and all after the first of them, until `serve/2`: the
  programs are about to be given to another peer.
  """
  @spec hold_changes(InFlight.t()) :: InFlight.t()
  def hold_changes(%InFlight{} = in_flight), do: %{in_flight | hold_changes?: true}

  @doc "Whether a peer may still change its programs, by what it was given."
  @spec changing?(InFlight.t(), port()) :: boolean()
  def changing?(%InFlight{} = in_flight, port),
    do: is_map_key(in_flight.late, port) or Calls.Table.changing?(in_flight.calls, port)

  @doc "Whether a peer has calls to answer."
  @spec busy?(InFlight.t(), port()) :: boolean()
  def busy?(%InFlight{} = in_flight, port), do: Calls.Table.busy?(in_flight.calls, port)

  @doc """
  A peer is gone. It `:died`: with each call in flight, or is `:replaced`, for which none is to blame.
  Each is sent again or fails, as it asked for; what was not written to the peer is not affected.
  """
  @spec lost(InFlight.t(), port(), :died | :replaced) :: InFlight.t()
  def lost(%InFlight{send_queues: send_queues} = in_flight, port, _how)
      when not is_map_key(send_queues, port),
      do: in_flight

  def lost(%InFlight{} = in_flight, port, how) do
    {send_queue, send_queues} = Map.pop!(in_flight.send_queues, port)
    unwritten = MapSet.new(SendQueue.close(send_queue))
    calls = Calls.Table.at(in_flight.calls, port)
    in_flight = %{in_flight | send_queues: send_queues, late: Map.delete(in_flight.late, port)}
    in_flight = if in_flight.to == port, do: none_serves(in_flight), else: in_flight
    in_flight = if how == :died, do: learn(in_flight, calls), else: in_flight

    calls
    |> Enum.reduce(in_flight, fn {id, call}, in_flight ->
      sort_out(in_flight, id, call, if(id in unwritten, do: :unsent, else: how))
    end)
    |> release_callers()
    |> advance()
  end

  defp none_serves(in_flight),
    do: %{in_flight | to: nil, quarantine: Quarantine.stop(in_flight.quarantine)}

  # What has been begun was written.
  defp sort_out(in_flight, id, %Call{begun?: true}, how),
    do: InFlight.fail(in_flight, id, failure(how))

  defp sort_out(in_flight, id, %Call{retry: :caller}, how),
    do: InFlight.fail(in_flight, id, {:died, if(how == :died, do: :sent, else: :unsent)})

  defp sort_out(in_flight, id, %Call{retry: :never}, how) when how in [:died, :replaced],
    do: InFlight.fail(in_flight, id, failure(how))

  defp sort_out(%{max_retries: most} = in_flight, id, %Call{deaths: deaths}, :died)
       when deaths >= most,
       do: InFlight.fail(in_flight, id, :python_process_died)

  defp sort_out(in_flight, id, call, how) do
    call = %{call | at: nil, deaths: if(how == :died, do: call.deaths + 1, else: call.deaths)}
    resent = if how == :unsent, do: in_flight.resent, else: in_flight.resent + 1

    hold(
      %{in_flight | calls: Calls.Table.replace(in_flight.calls, id, call), resent: resent},
      id,
      call
    )
  end

  defp failure(:died), do: :python_process_died
  defp failure(:replaced), do: :replaced

  # Who knows other peers need not wait for this one's successor.
  defp release_callers(%InFlight{to: nil} = in_flight) do
    for {id, %Call{retry: :caller}} <- Calls.Table.at(in_flight.calls, nil), reduce: in_flight do
      in_flight -> InFlight.fail(in_flight, id, {:died, :unsent})
    end
  end

  defp release_callers(in_flight), do: in_flight

  defp learn(in_flight, calls) do
    case for {_id, %Call{since: since}} <- calls, do: since do
      [] ->
        in_flight

      sent ->
        %{in_flight | quarantine: Quarantine.learn(in_flight.quarantine, now() - Enum.min(sent))}
    end
  end

  @doc "To be told of every `:DOWN` of a process, which may be a send queue's helper."
  @spec written(InFlight.t(), reference()) :: InFlight.t()
  def written(%InFlight{send_queues: send_queues} = in_flight, monitor) do
    send_queues =
      Map.new(send_queues, fn {port, send_queue} ->
        {port, SendQueue.written(send_queue, monitor)}
      end)

    %{in_flight | send_queues: send_queues}
  end

  @doc "Whether nothing waits to be written, bar what the send queues' helpers hold."
  @spec all_written?(InFlight.t()) :: boolean()
  def all_written?(%InFlight{} = in_flight) do
    :gb_sets.is_empty(in_flight.held) and not Quarantine.any?(in_flight.quarantine) and
      Enum.all?(in_flight.send_queues, fn {_port, send_queue} -> SendQueue.empty?(send_queue) end)
  end

  ## What is held, and when it goes out

  defp hold(in_flight, id, call) do
    if Quarantine.suspect?(in_flight.quarantine, call.deaths),
      do: %{in_flight | quarantine: Quarantine.add(in_flight.quarantine, id, call.deaths)},
      else: %{in_flight | held: :gb_sets.add(id, in_flight.held)}
  end

  defp give(in_flight, id, call, now) do
    send_queues = in_flight.send_queues
    send_queue = Map.fetch!(send_queues, in_flight.to)
    send_queue = SendQueue.push_request(send_queue, id, call.deadline, call.body)
    {%{call | at: in_flight.to, since: now}, %{send_queues | in_flight.to => send_queue}}
  end

  defp give_all(in_flight, ids) do
    Enum.reduce(ids, in_flight, fn id, in_flight ->
      {call, send_queues} = give(in_flight, id, Calls.Table.fetch!(in_flight.calls, id), now())

      %{
        in_flight
        | calls: Calls.Table.replace(in_flight.calls, id, call),
          send_queues: send_queues
      }
    end)
  end

  defp advance(%InFlight{to: nil} = in_flight), do: in_flight

  defp advance(%InFlight{quarantine: quarantine} = in_flight) do
    cond do
      Quarantine.trying?(quarantine) ->
        in_flight

      not Quarantine.any?(quarantine) ->
        give_held(%{in_flight | quarantine: Quarantine.stop(quarantine)})

      # Any of these may kill the peer, and a suspect with it.
      not quarantine.trial? and busy?(in_flight, in_flight.to) ->
        ids = for {id, _call} <- Calls.Table.at(in_flight.calls, in_flight.to), do: id
        %{in_flight | quarantine: Quarantine.try_out(quarantine, ids)}

      # They may change the programs, which are being given to the next peer: it will have them.
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
         false <- in_flight.hold_changes? and Calls.Table.fetch!(in_flight.calls, id).what != nil do
      give_held(give_all(%{in_flight | held: rest}, [id]))
    else
      true -> in_flight
    end
  end

  @doc "The timer `:acquit` has fired: those on trial have outlived their time."
  @spec acquit(InFlight.t(), reference()) :: InFlight.t()
  def acquit(%InFlight{} = in_flight, timer),
    do: advance(%{in_flight | quarantine: Quarantine.acquit(in_flight.quarantine, timer)})

  defp now, do: System.monotonic_time(:millisecond)
end
