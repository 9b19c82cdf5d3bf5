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
  def offer(traffic, id, call, now) do
    if at_once?(traffic, call) do
      {call, outboxes} = give(traffic, id, call, now)
      %{traffic | calls: Calls.Table.put(traffic.calls, id, call), outboxes: outboxes}
    else
      advance(hold(%{traffic | calls: Calls.Table.put(traffic.calls, id, call)}, id, call))
    end
  end

  # The first is the usual way. A ping can harm nobody, and those who watch over the peer by it must
  # not take a trial for a peer that hangs.
  defp at_once?(%InFlight{to: nil}, _call), do: false

  defp at_once?(%InFlight{} = traffic, %Call{} = call) do
    (not traffic.suspects.trial? and :gb_sets.is_empty(traffic.held) and
       not Quarantine.suspect?(traffic.suspects, call.deaths) and
       (call.what == nil or not traffic.hold_changes?)) or Protocol.ping?(call.body)
  end

  @doc "A call was answered: others may have waited for that."
  @spec answered(InFlight.t(), pos_integer()) :: InFlight.t()
  def answered(%InFlight{suspects: %Quarantine{trial?: false}} = traffic, _id), do: traffic

  def answered(%InFlight{} = traffic, id),
    do: advance(%{traffic | suspects: Quarantine.leave(traffic.suspects, id)})

  @doc """
  Nobody waits for a call any more: it is taken back if it still waits to be written, else cancelled in
  the peer.
  """
  @spec withdraw(InFlight.t(), pos_integer(), Call.t()) :: InFlight.t()
  # Others may be held behind it.
  def withdraw(traffic, id, %Call{at: nil} = call), do: traffic |> forget(id, call) |> advance()

  def withdraw(traffic, id, call), do: traffic |> take_from_peer(id, call) |> answered(id)

  defp take_from_peer(%InFlight{outboxes: outboxes} = traffic, id, call) do
    outbox = Map.fetch!(outboxes, call.at)

    if SendQueue.member?(outbox, id) do
      %{traffic | outboxes: %{outboxes | call.at => SendQueue.drop(outbox, id)}}
    else
      traffic = control(traffic, call.at, Protocol.cancel_frame(id))
      # The peer may have made the change by then.
      if call.what, do: late_change(traffic, id, call), else: traffic
    end
  end

  defp late_change(%InFlight{late: late} = traffic, id, call) do
    of_port = late |> Map.get(call.at, %{}) |> Map.put(id, {call.what, call.body})
    %{traffic | late: Map.put(late, call.at, of_port)}
  end

  @doc """
  Sends a control frame to a peer, unless that is gone. `about`: the call with whose end the frame, if it
  still waits to be written then, becomes of no use.
  """
  @spec control(InFlight.t(), port(), iodata(), pos_integer() | nil) :: InFlight.t()
  def control(%InFlight{outboxes: outboxes, next_id: key} = traffic, port, frame, about \\ nil) do
    case outboxes do
      %{^port => outbox} ->
        outboxes = %{outboxes | port => SendQueue.push_control(outbox, key, frame, about)}
        %{traffic | outboxes: outboxes, next_id: key + 1}

      _gone ->
        traffic
    end
  end

  @doc "A call failed: if it was held, it is so no longer."
  @spec forget(InFlight.t(), pos_integer(), Call.t()) :: InFlight.t()
  def forget(traffic, id, %Call{at: nil} = call) do
    held = :gb_sets.delete_any(id, traffic.held)
    %{traffic | held: held, suspects: Quarantine.drop(traffic.suspects, id, call.deaths)}
  end

  def forget(traffic, _id, _call), do: traffic

  ## Peers

  @doc "A peer was started: only what `own_request/3` sends goes to it, until `serve/2`."
  @spec attach(InFlight.t(), port()) :: InFlight.t()
  def attach(%InFlight{} = traffic, port),
    do: %{traffic | outboxes: Map.put(traffic.outboxes, port, SendQueue.new(port))}

  @doc "Sends a request of the bridge's own to a peer; gives its id, to know the reply by."
  @spec own_request(InFlight.t(), port(), binary()) :: {pos_integer(), InFlight.t()}
  def own_request(%InFlight{next_id: id, outboxes: outboxes} = traffic, port, body) do
    outbox = SendQueue.push_request(Map.fetch!(outboxes, port), id, :infinity, body)
    {id, %{traffic | outboxes: %{outboxes | port => outbox}, next_id: id + 1}}
  end

  @doc "From now on calls go to this peer; those that are held, too."
  @spec serve(InFlight.t(), port()) :: InFlight.t()
  def serve(%InFlight{} = traffic, port) do
    traffic = if traffic.to in [nil, port], do: traffic, else: take_back(traffic, traffic.to)
    suspects = Quarantine.stop(traffic.suspects)
    advance(%{traffic | to: port, hold_changes?: false, suspects: suspects})
  end

  # What still waits to be written to one peer is for the next.
  defp take_back(traffic, port) do
    {ids, outbox} = SendQueue.take_back(Map.fetch!(traffic.outboxes, port))
    traffic = %{traffic | outboxes: %{traffic.outboxes | port => outbox}}

    # Those of the bridge's own are nobody's calls, and were for that peer alone.
    for id <- ids, call = Calls.Table.get(traffic.calls, id), reduce: traffic do
      traffic ->
        call = %{call | at: nil}
        hold(%{traffic | calls: Calls.Table.replace(traffic.calls, id, call)}, id, call)
    end
  end

  @doc """
  Holds calls that change the programs, and all after the first of them, until `serve/2`: the
  programs are about to be given to another peer.
  """
  @spec hold_changes(InFlight.t()) :: InFlight.t()
  def hold_changes(%InFlight{} = traffic), do: %{traffic | hold_changes?: true}

  @doc "Whether a peer may still change its programs, by what it was given."
  @spec changing?(InFlight.t(), port()) :: boolean()
  def changing?(%InFlight{} = traffic, port),
    do: is_map_key(traffic.late, port) or Calls.Table.changing?(traffic.calls, port)

  @doc "Whether a peer has calls to answer."
  @spec busy?(InFlight.t(), port()) :: boolean()
  def busy?(%InFlight{} = traffic, port), do: Calls.Table.busy?(traffic.calls, port)

  @doc """
  A peer is gone. It `:died`: with each call in flight, or is `:replaced`, for which none is to blame.
  Each is sent again or fails, as it asked for; what was not written to the peer is not affected.
  """
  @spec lost(InFlight.t(), port(), :died | :replaced) :: InFlight.t()
  def lost(%InFlight{outboxes: outboxes} = traffic, port, _how)
      when not is_map_key(outboxes, port),
      do: traffic

  def lost(%InFlight{} = traffic, port, how) do
    {outbox, outboxes} = Map.pop!(traffic.outboxes, port)
    unwritten = MapSet.new(SendQueue.close(outbox))
    calls = Calls.Table.at(traffic.calls, port)
    traffic = %{traffic | outboxes: outboxes, late: Map.delete(traffic.late, port)}
    traffic = if traffic.to == port, do: none_serves(traffic), else: traffic
    traffic = if how == :died, do: learn(traffic, calls), else: traffic

    calls
    |> Enum.reduce(traffic, fn {id, call}, traffic ->
      sort_out(traffic, id, call, if(id in unwritten, do: :unsent, else: how))
    end)
    |> release_callers()
    |> advance()
  end

  defp none_serves(traffic),
    do: %{traffic | to: nil, suspects: Quarantine.stop(traffic.suspects)}

  # What has been begun was written.
  defp sort_out(traffic, id, %Call{begun?: true}, how),
    do: InFlight.fail(traffic, id, failure(how))

  defp sort_out(traffic, id, %Call{retry: :caller}, how),
    do: InFlight.fail(traffic, id, {:died, if(how == :died, do: :sent, else: :unsent)})

  defp sort_out(traffic, id, %Call{retry: :never}, how) when how in [:died, :replaced],
    do: InFlight.fail(traffic, id, failure(how))

  defp sort_out(%{max_retries: most} = traffic, id, %Call{deaths: deaths}, :died)
       when deaths >= most,
       do: InFlight.fail(traffic, id, :python_process_died)

  defp sort_out(traffic, id, call, how) do
    call = %{call | at: nil, deaths: if(how == :died, do: call.deaths + 1, else: call.deaths)}
    resent = if how == :unsent, do: traffic.resent, else: traffic.resent + 1

    hold(
      %{traffic | calls: Calls.Table.replace(traffic.calls, id, call), resent: resent},
      id,
      call
    )
  end

  defp failure(:died), do: :python_process_died
  defp failure(:replaced), do: :replaced

  # Who knows other peers need not wait for this one's successor.
  defp release_callers(%InFlight{to: nil} = traffic) do
    for {id, %Call{retry: :caller}} <- Calls.Table.at(traffic.calls, nil), reduce: traffic do
      traffic -> InFlight.fail(traffic, id, {:died, :unsent})
    end
  end

  defp release_callers(traffic), do: traffic

  defp learn(traffic, calls) do
    case for {_id, %Call{since: since}} <- calls, do: since do
      [] -> traffic
      sent -> %{traffic | suspects: Quarantine.learn(traffic.suspects, now() - Enum.min(sent))}
    end
  end

  @doc "To be told of every `:DOWN` of a process, which may be an outbox's helper."
  @spec written(InFlight.t(), reference()) :: InFlight.t()
  def written(%InFlight{outboxes: outboxes} = traffic, monitor) do
    outboxes =
      Map.new(outboxes, fn {port, outbox} -> {port, SendQueue.written(outbox, monitor)} end)

    %{traffic | outboxes: outboxes}
  end

  @doc "Whether nothing waits to be written, bar what the outboxes' helpers hold."
  @spec all_written?(InFlight.t()) :: boolean()
  def all_written?(%InFlight{} = traffic) do
    :gb_sets.is_empty(traffic.held) and not Quarantine.any?(traffic.suspects) and
      Enum.all?(traffic.outboxes, fn {_port, outbox} -> SendQueue.empty?(outbox) end)
  end

  ## What is held, and when it goes out

  defp hold(traffic, id, call) do
    if Quarantine.suspect?(traffic.suspects, call.deaths),
      do: %{traffic | suspects: Quarantine.add(traffic.suspects, id, call.deaths)},
      else: %{traffic | held: :gb_sets.add(id, traffic.held)}
  end

  defp give(traffic, id, call, now) do
    outboxes = traffic.outboxes
    outbox = Map.fetch!(outboxes, traffic.to)
    outbox = SendQueue.push_request(outbox, id, call.deadline, call.body)
    {%{call | at: traffic.to, since: now}, %{outboxes | traffic.to => outbox}}
  end

  defp give_all(traffic, ids) do
    Enum.reduce(ids, traffic, fn id, traffic ->
      {call, outboxes} = give(traffic, id, Calls.Table.fetch!(traffic.calls, id), now())
      %{traffic | calls: Calls.Table.replace(traffic.calls, id, call), outboxes: outboxes}
    end)
  end

  defp advance(%InFlight{to: nil} = traffic), do: traffic

  defp advance(%InFlight{suspects: suspects} = traffic) do
    cond do
      Quarantine.trying?(suspects) ->
        traffic

      not Quarantine.any?(suspects) ->
        give_held(%{traffic | suspects: Quarantine.stop(suspects)})

      # Any of these may kill the peer, and a suspect with it.
      not suspects.trial? and busy?(traffic, traffic.to) ->
        ids = for {id, _call} <- Calls.Table.at(traffic.calls, traffic.to), do: id
        %{traffic | suspects: Quarantine.try_out(suspects, ids)}

      # They may change the programs, which are being given to the next peer: it will have them.
      traffic.hold_changes? ->
        traffic

      true ->
        {ids, suspects} = Quarantine.take_group(suspects)
        give_all(%{traffic | suspects: Quarantine.try_out(suspects, ids)}, ids)
    end
  end

  defp give_held(%InFlight{held: held} = traffic) do
    with false <- :gb_sets.is_empty(held),
         {id, rest} = :gb_sets.take_smallest(held),
         false <- traffic.hold_changes? and Calls.Table.fetch!(traffic.calls, id).what != nil do
      give_held(give_all(%{traffic | held: rest}, [id]))
    else
      true -> traffic
    end
  end

  @doc "The timer `:acquit` has fired: those on trial have outlived their time."
  @spec acquit(InFlight.t(), reference()) :: InFlight.t()
  def acquit(%InFlight{} = traffic, timer),
    do: advance(%{traffic | suspects: Quarantine.acquit(traffic.suspects, timer)})

  defp now, do: System.monotonic_time(:millisecond)
end
