defmodule DSPex.PythonBridge.Calls.Dispatcher do
  @moduledoc false
  # Which call goes to which peer, and when. At most one peer serves; calls are held while none does. A peer that
  # serves is given the programs and the held calls, and when it dies its calls are held for the next one, `max_retries`
  # times at most. Calls that may have killed a peer wait for each other (`DSPex.PythonBridge.Calls.Suspects`).

  alias DSPex.PythonBridge.{Programs, Protocol}
  alias DSPex.PythonBridge.Calls.{InFlight, Journal, Request, SendQueue, Suspects}

  ## Calls

  @doc "Sends a new call to the peer that serves, or holds it. Its id is the next one."
  @spec offer(InFlight.t(), pos_integer(), Request.t()) :: InFlight.t()
  def offer(%InFlight{to: port} = in_flight, id, request) do
    in_flight = %{in_flight | next_id: id + 1}

    if port == nil or Suspects.suspect?(request, in_flight.max_retries),
      do: in_flight |> hold(id, request) |> advance(),
      else: push(in_flight, id, request)
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
  def withdraw(in_flight, _id, %Request{at: nil}), do: in_flight

  def withdraw(%InFlight{send_queues: queues} = in_flight, id, %Request{at: port} = request) do
    in_flight =
      case SendQueue.drop(Map.fetch!(queues, port), id) do
        nil ->
          in_flight |> control(port, Protocol.cancel_frame(id)) |> keep_change(id, request)

        queue ->
          not_given(%{in_flight | send_queues: %{queues | port => queue}}, request.change)
      end

    answered(in_flight, request)
  end

  # The peer may have made the change before it reads the cancel.
  defp keep_change(in_flight, _id, %Request{change: nil}), do: in_flight

  defp keep_change(in_flight, id, request),
    do: InFlight.put(in_flight, id, %{request | ref: nil, pid: nil, watch: nil})

  @doc "Sends a control frame to a peer, unless that is gone."
  @spec control(InFlight.t(), SendQueue.transport(), iodata()) :: InFlight.t()
  def control(%InFlight{send_queues: queues, next_id: key} = in_flight, port, frame) do
    case queues do
      %{^port => queue} ->
        queues = %{queues | port => SendQueue.push_control(queue, key, frame)}
        %{in_flight | send_queues: queues, next_id: key + 1}

      _gone ->
        in_flight
    end
  end

  @doc "Sends a peer a request of the bridge itself; returns its id, which the reply will have."
  @spec own_request(InFlight.t(), SendQueue.transport(), binary()) ::
          {pos_integer(), InFlight.t()}
  def own_request(%InFlight{next_id: id, send_queues: queues} = in_flight, port, body) do
    queue = SendQueue.push_request(Map.fetch!(queues, port), id, :infinity, body)
    {id, %{in_flight | send_queues: %{queues | port => queue}, next_id: id + 1}}
  end

  @doc "Sends the peer that serves, if any, a request whose reply nobody needs, behind all that was sent before."
  @spec tell(InFlight.t(), iodata()) :: InFlight.t()
  def tell(%InFlight{to: nil} = in_flight, _body), do: in_flight

  def tell(%InFlight{to: port} = in_flight, body),
    do: control(in_flight, port, Protocol.request_frame(0, :infinity, body))

  @doc "Whether a peer has calls to answer."
  @spec busy?(InFlight.t(), SendQueue.transport()) :: boolean()
  def busy?(%InFlight{calls: calls}, port), do: at?(:maps.next(:maps.iterator(calls)), port)

  # It is asked after each reply to an old peer, so it does not look at all of thousands of calls.
  defp at?({_id, %Request{at: port}, _rest}, port), do: true
  defp at?({_id, _request, rest}, port), do: at?(:maps.next(rest), port)
  defp at?(:none, _port), do: false

  @doc "To be called with each `:DOWN` of a process, which may be the writer of a send queue."
  @spec written(InFlight.t(), reference()) :: InFlight.t()
  def written(%InFlight{send_queues: queues} = in_flight, monitor) do
    written = fn {port, queue} -> {port, SendQueue.written(queue, monitor)} end
    %{in_flight | send_queues: Map.new(queues, written)}
  end

  ## Held calls, and when they are sent

  @doc "To be called when the timer `:trial` has fired: the next suspects are sent."
  @spec trial_over(InFlight.t(), reference()) :: InFlight.t()
  def trial_over(%InFlight{suspects: suspects} = in_flight, timer) do
    in_flight = advance(%{in_flight | suspects: Suspects.timeout(suspects, timer)})
    tap(in_flight, &InFlight.show_load/1)
  end

  # As a suspect if it is one.
  defp hold(in_flight, id, request) do
    request = %{request | at: nil}
    in_flight = InFlight.put(in_flight, id, request)

    if Suspects.suspect?(request, in_flight.max_retries),
      do: %{in_flight | suspects: Suspects.add(in_flight.suspects, id, request)},
      else: %{in_flight | held: :gb_sets.add(id, in_flight.held)}
  end

  # Sends the held calls that may be sent now.
  defp advance(%InFlight{to: nil} = in_flight), do: in_flight

  defp advance(%InFlight{held: held} = in_flight) do
    {ids, suspects} = Suspects.next(in_flight.suspects, in_flight.max_retries)

    Enum.reduce(
      :gb_sets.to_list(held) ++ ids,
      %{in_flight | held: :gb_sets.empty(), suspects: suspects},
      &push(&2, &1, Map.fetch!(&2.calls, &1))
    )
  end

  defp push(%InFlight{to: port, send_queues: queues} = in_flight, id, request) do
    %Request{deadline: deadline} = request
    body = Journal.body(request.journal, request.body)
    queue = SendQueue.push_request(Map.fetch!(queues, port), id, deadline, body)
    in_flight = given(%{in_flight | send_queues: %{queues | port => queue}}, request.change)
    InFlight.put(in_flight, id, %{request | at: port})
  end

  ## Programs

  @doc "Sends the peer that serves what the store has of these programs, after a change by any bridge with this store."
  @spec follow(InFlight.t(), :all | [Programs.Store.id()]) :: InFlight.t()
  def follow(%InFlight{to: nil} = in_flight, _ids), do: in_flight

  def follow(%InFlight{programs: programs, given: given} = in_flight, :all) do
    present = for {id, _stamp, _body} <- Programs.Store.definitions(programs), do: id
    follow(in_flight, Enum.uniq(Map.keys(given) ++ present))
  end

  def follow(%InFlight{programs: programs, given: given} = in_flight, ids) do
    now = for id <- ids, do: {id, Programs.Store.get(programs, id)}
    removed = for {id, nil} <- now, is_map_key(given, id), do: id
    in_flight = if removed == [], do: in_flight, else: remove(in_flight, removed)

    for {id, {stamp, body}} <- now, given[id] != stamp, reduce: in_flight do
      in_flight ->
        in_flight |> tell(Programs.Body.lazy(body)) |> given({:create, id, stamp})
    end
  end

  defp remove(in_flight, ids) do
    {:ok, body} = Protocol.encode_body(:cleanup, %{program_ids: ids})
    in_flight |> tell(body) |> given({:cleanup, ids, nil})
  end

  defp given(in_flight, nil), do: in_flight

  defp given(%InFlight{given: given} = in_flight, {:create, id, stamp}),
    do: %{in_flight | given: Map.put(given, id, stamp)}

  defp given(in_flight, {:cleanup, :all, _stamp}), do: %{in_flight | given: %{}}

  defp given(%InFlight{given: given} = in_flight, {:cleanup, ids, _stamp}),
    do: %{in_flight | given: Map.drop(given, ids)}

  # The peer keeps these programs, and has to hear of later removals. What it is sent a second time does no harm.
  defp not_given(%InFlight{programs: programs, given: given} = in_flight, {:cleanup, _, _}) do
    kept =
      for {id, stamp, _body} <- Programs.Store.definitions(programs), into: %{}, do: {id, stamp}

    %{in_flight | given: Map.merge(given, kept)}
  end

  defp not_given(in_flight, _change), do: in_flight

  ## A peer starts

  @doc "Adds a peer that was started. Until `serve/2` only `own_request/3` sends to it."
  @spec attach(InFlight.t(), SendQueue.transport()) :: InFlight.t()
  def attach(%InFlight{} = in_flight, port),
    do: %{in_flight | send_queues: Map.put(in_flight.send_queues, port, SendQueue.new(port))}

  @doc """
  Sends calls to this peer from now on, the held ones first, behind the definitions of all programs. Changes of the
  programs that the peer before has not answered are made here: it may have made them, too, but nobody uses it any more.
  """
  @spec serve(InFlight.t(), SendQueue.transport()) :: InFlight.t()
  def serve(%InFlight{} = in_flight, port) do
    in_flight = if in_flight.to, do: take_back(in_flight, in_flight.to), else: in_flight
    # Another peer was silent.
    in_flight = if in_flight.silent?, do: InFlight.silent(in_flight, false), else: in_flight
    suspects = Suspects.start(in_flight.suspects, not :gb_sets.is_empty(in_flight.held))
    in_flight = give_programs(%{in_flight | suspects: suspects}, port)
    in_flight = if suspects.cold?, do: ask_for_dspy(in_flight, port), else: in_flight
    tap(advance(%{in_flight | to: port}), &InFlight.show_load/1)
  end

  # A list with states is answered when DSPy is imported, even that of no program.
  defp ask_for_dspy(in_flight, port) do
    {:ok, body} = Protocol.encode_body(:list_programs, %{program_ids: [], state: true})
    {id, in_flight} = own_request(in_flight, port, body)
    %{in_flight | asked: Map.put(in_flight.asked, port, id)}
  end

  @doc "To be called with a peer's reply to the request `asked`: it has imported DSPy."
  @spec warm(InFlight.t(), SendQueue.transport()) :: InFlight.t()
  def warm(%InFlight{to: port, suspects: suspects} = in_flight, port),
    do: tap(%{in_flight | suspects: Suspects.warm(suspects)}, &InFlight.show_load/1)

  def warm(in_flight, _old), do: in_flight

  # The peer loads a program with the first run that needs it.
  defp give_programs(%InFlight{send_queues: queues} = in_flight, port) do
    definitions = Programs.Store.definitions(in_flight.programs)
    bodies = for {_id, _stamp, body} <- definitions, do: Programs.Body.lazy(body)
    queue = SendQueue.push_first(Map.fetch!(queues, port), bodies)
    given = for {id, stamp, _body} <- definitions, into: %{}, do: {id, stamp}
    %{in_flight | send_queues: %{queues | port => queue}, given: given}
  end

  # What still waits to be written to one peer goes to the next.
  defp take_back(%InFlight{send_queues: queues} = in_flight, port) do
    {ids, queue} = SendQueue.take_back(Map.fetch!(queues, port))
    unwritten = MapSet.new(ids)
    suspects = Suspects.stop(in_flight.suspects, :replaced)
    in_flight = %{in_flight | send_queues: %{queues | port => queue}, suspects: suspects}

    for {id, request} <- InFlight.at(in_flight, port), reduce: in_flight do
      in_flight ->
        cond do
          request.change && request.watch == nil -> InFlight.fail(in_flight, id, :replaced)
          request.change || id in unwritten -> hold(in_flight, id, request)
          true -> in_flight
        end
    end
  end

  ## A peer ends

  @doc """
  Removes a peer. It `:died`, which any call in flight may have caused; or none has: something else did (`:spared`), or
  it was `:replaced`. Each of its calls is resent or fails, as its caller asked for; what was not written to it is
  held.
  """
  @spec lost(InFlight.t(), SendQueue.transport(), :died | :spared | :replaced) :: InFlight.t()
  def lost(%InFlight{send_queues: queues} = in_flight, port, _how)
      when not is_map_key(queues, port),
      do: in_flight

  def lost(%InFlight{} = in_flight, port, how) do
    {queue, queues} = Map.pop!(in_flight.send_queues, port)
    unwritten = MapSet.new(SendQueue.close(queue))
    calls = InFlight.at(in_flight, port)
    # Suspects are tried with the peer that serves.
    serves? = in_flight.to == port
    suspects = if serves?, do: in_flight.suspects, else: %Suspects{}
    in_flight = %{in_flight | send_queues: queues, asked: Map.delete(in_flight.asked, port)}
    in_flight = if serves?, do: none_serves(in_flight, how), else: in_flight

    in_flight =
      for {id, request} <- calls, reduce: in_flight do
        in_flight ->
          how =
            cond do
              id in unwritten -> :unsent
              how == :died -> Suspects.blame(suspects, id, request, in_flight.max_retries)
              true -> how
            end

          lost_call(in_flight, id, request, how)
      end

    in_flight |> release_callers() |> advance()
  end

  defp none_serves(in_flight, how),
    do: %{in_flight | to: nil, suspects: Suspects.stop(in_flight.suspects, how)}

  defp lost_call(in_flight, id, %Request{resend: :tool_begun}, _how),
    do: InFlight.fail(in_flight, id, :tool_begun)

  defp lost_call(in_flight, id, %Request{resend: :caller}, how),
    do: InFlight.fail(in_flight, id, {:died, callers_failure(how)})

  # Or it is a change that nobody waits for.
  defp lost_call(in_flight, id, %Request{resend: resend, watch: watch}, how)
       when (resend == :never and how != :unsent) or watch == nil do
    failure = if how == :replaced, do: :replaced, else: :python_process_died
    InFlight.fail(in_flight, id, failure)
  end

  defp lost_call(%{max_retries: most} = in_flight, id, %{deaths: deaths}, :died)
       when deaths >= most,
       do: InFlight.fail(in_flight, id, :python_process_died)

  defp lost_call(in_flight, id, request, how) do
    InFlight.restarted(request)
    resent = if how == :unsent, do: in_flight.resent, else: in_flight.resent + 1
    hold(%{in_flight | resent: resent}, id, counted(request, how))
  end

  defp counted(request, how) when how in [:died, :in_group],
    do: %{request | deaths: request.deaths + 1}

  defp counted(request, :spared), do: %{request | spared: request.spared + 1}
  defp counted(request, _unsent_or_replaced), do: request

  defp callers_failure(:died), do: :sent
  defp callers_failure(:unsent), do: :unsent
  # It may be resent, and is not blamed.
  defp callers_failure(_none_of_its_own), do: :spared

  # A caller that knows other peers need not wait for the next one.
  defp release_callers(%InFlight{to: nil} = in_flight) do
    for {id, %Request{resend: :caller}} <- InFlight.at(in_flight, nil), reduce: in_flight do
      in_flight -> InFlight.fail(in_flight, id, {:died, :unsent})
    end
  end

  defp release_callers(in_flight), do: in_flight
end
