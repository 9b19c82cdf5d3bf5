defmodule DSPex.PythonBridge.Traffic do
  @moduledoc """
  What goes between callers and peers: ids are given here, calls wait here, and each is answered
  here, once. Part of the bridge's process; it sends messages, but knows nothing of how peers come
  and go.

  At most one peer serves; others may start, or finish what they were given. A call is held while
  none serves, is given to the one that does, and is held again when that dies, `max_retries` times
  at most.

  While calls are tried that a peer may have died of (`DSPex.PythonBridge.Suspects`), all others
  are held, too.

  Ids grow for as long as the bridge lives, over all its peers, so that no reply can be taken for
  another's. They are also the keys of the outboxes and of what is held, whose order they are; a
  cancel takes one, too.
  """

  alias DSPex.PythonBridge.{Calls, Options, Outbox, Programs, Protocol, Suspects}
  alias DSPex.PythonBridge.Calls.Call
  alias DSPex.PythonBridge.Pool.Slots

  # What request_frame/3 puts before a body, at most.
  @head_bytes 64

  @enforce_keys [:max_retries, :programs, :slot, :suspects]
  defstruct [
    :max_retries,
    :programs,
    :slot,
    :suspects,
    :to,
    calls: Calls.new(),
    held: :gb_sets.empty(),
    hold_changes?: false,
    outboxes: %{},
    late: %{},
    next_id: 1
  ]

  @typedoc """
  `to`: the port of the peer that serves. `held`: ids of calls that are no suspects. `late`: changes to
  the programs that nobody waits for any more, by id, with their peer's port.
  """
  @type t :: %__MODULE__{
          max_retries: non_neg_integer(),
          programs: Programs.table(),
          slot: Options.slot() | nil,
          suspects: Suspects.t(),
          to: port() | nil,
          calls: Calls.t(),
          held: :gb_sets.set(pos_integer()),
          hold_changes?: boolean(),
          outboxes: %{port() => Outbox.t()},
          late: %{pos_integer() => {port(), Programs.change(), binary()}},
          next_id: pos_integer()
        }
  @type failure ::
          :python_process_died
          | :bridge_not_running
          | :overloaded
          | {:died, :sent | :unsent}
          | {:too_large, pos_integer(), pos_integer()}
  @typedoc "What is done about a death; how many there were already; the change that is asked for."
  @type terms :: {:here | :never | :caller, non_neg_integer(), Programs.change() | nil}

  @doc "Nothing is under way."
  @spec new(Options.t(), Programs.table()) :: t()
  def new(options, programs) do
    %__MODULE__{
      max_retries: options.max_retries,
      programs: programs,
      slot: options.slot,
      suspects: Suspects.new(options.max_retries)
    }
  end

  ## Callers

  @doc """
  Takes a request on. `ref` is the caller's alias; both it and `pid` are nil for a cast. `timeout`
  is what is left to the caller, in ms.
  """
  @spec accept(t(), reference() | nil, pid() | nil, timeout(), binary(), terms()) :: t()
  def accept(%__MODULE__{to: nil} = traffic, ref, _pid, _timeout, _body, {:caller, _, _}),
    do: refuse(traffic, ref, {:died, :unsent}, :caller)

  def accept(%__MODULE__{next_id: id} = traffic, ref, pid, timeout, body, {retry, deaths, what}) do
    now = now()

    call = %Call{
      ref: ref,
      watch: watch(pid, id, timeout),
      deadline: if(timeout == :infinity, do: :infinity, else: now + timeout),
      body: body,
      retry: retry,
      what: stamped(what),
      deaths: deaths
    }

    traffic = %{traffic | next_id: id + 1}

    if at_once?(traffic, call) do
      {call, outboxes} = give(traffic, id, call, now)
      %{traffic | calls: Calls.put(traffic.calls, id, call), outboxes: outboxes}
    else
      advance(hold(%{traffic | calls: Calls.put(traffic.calls, id, call)}, id, call))
    end
  end

  @doc "Tells a caller at once that its request was not taken on."
  @spec refuse(t(), reference() | nil, failure(), :here | :never | :caller) :: t()
  def refuse(%__MODULE__{} = traffic, ref, failure, retry) do
    done(traffic, retry)
    answer(ref, {:error, failure})
    traffic
  end

  @doc """
  Whether a request fits into a frame of at most `max` bytes: exactly, but only near the limit is
  the head counted out.
  """
  @spec fits?(t(), timeout(), binary(), pos_integer()) :: boolean()
  def fits?(%__MODULE__{}, _timeout, body, max) when byte_size(body) + @head_bytes <= max,
    do: true

  def fits?(%__MODULE__{next_id: id}, timeout, body, max),
    do: IO.iodata_length(Protocol.request_frame(id, timeout, body)) <= max

  @doc "How many calls wait for a reply."
  @spec pending(t()) :: non_neg_integer()
  def pending(%__MODULE__{calls: calls}), do: Calls.size(calls)

  @doc """
  Nobody waits for this call any more: by id, or by the caller's alias. Its request is taken back
  if it still waits to be written, else cancelled in the peer, whose answer will find nobody.
  """
  @spec abandon(t(), pos_integer() | reference()) :: t()
  def abandon(%__MODULE__{} = traffic, ref) when is_reference(ref) do
    case Calls.id_of(traffic.calls, ref) do
      # The reply went out first; it was sent to an alias that is no more.
      nil -> traffic
      id -> abandon(traffic, id)
    end
  end

  def abandon(%__MODULE__{} = traffic, id) do
    case Calls.pop(traffic.calls, id) do
      {nil, _calls} ->
        traffic

      {call, calls} ->
        unwatch(call.watch)
        done(traffic, call.retry)
        %{traffic | calls: calls} |> cancel(id, call) |> leave_trial(id)
    end
  end

  defp cancel(traffic, id, %Call{at: nil} = call) do
    held = :gb_sets.delete_any(id, traffic.held)
    %{traffic | held: held, suspects: Suspects.drop(traffic.suspects, id, call.deaths)}
  end

  defp cancel(%__MODULE__{outboxes: outboxes, next_id: key} = traffic, id, %Call{at: port} = call) do
    outbox = Map.fetch!(outboxes, port)

    if Outbox.member?(outbox, id) do
      %{traffic | outboxes: %{outboxes | port => Outbox.drop(outbox, id)}}
    else
      outbox = Outbox.push_control(outbox, key, Protocol.cancel_frame(id))
      # The peer may have made the change by then.
      late = if call.what, do: %{id => {port, call.what, call.body}}, else: %{}
      late = Map.merge(traffic.late, late)
      %{traffic | outboxes: %{outboxes | port => outbox}, next_id: key + 1, late: late}
    end
  end

  # A caller keeps its own time and is watched for its death; a cast has nobody who would.
  defp watch(nil, id, timeout), do: {:timer, :erlang.start_timer(timeout, self(), {:cast, id})}

  defp watch(pid, id, _timeout),
    do: {:monitor, :erlang.monitor(:process, pid, tag: {:caller_down, id})}

  # No flush: a message that either has sent already will find its call gone.
  defp unwatch({:monitor, ref}), do: Process.demonitor(ref)
  defp unwatch({:timer, ref}), do: :erlang.cancel_timer(ref, async: true, info: false)

  # In the order in which this bridge got them, unless a pool has given them one.
  defp stamped(nil), do: nil
  defp stamped({kind, ids, nil}), do: {kind, ids, Programs.stamp()}
  defp stamped(change), do: change

  ## Peers

  @doc "A peer was started: only what `own_request/3` sends goes to it, until `serve/2`."
  @spec attach(t(), port()) :: t()
  def attach(%__MODULE__{} = traffic, port),
    do: %{traffic | outboxes: Map.put(traffic.outboxes, port, Outbox.new(port))}

  @doc "Sends a request of the bridge's own to a peer; gives its id, to know the reply by."
  @spec own_request(t(), port(), binary()) :: {pos_integer(), t()}
  def own_request(%__MODULE__{next_id: id, outboxes: outboxes} = traffic, port, body) do
    outbox = Outbox.push_request(Map.fetch!(outboxes, port), id, :infinity, body)
    {id, %{traffic | outboxes: %{outboxes | port => outbox}, next_id: id + 1}}
  end

  @doc "From now on calls go to this peer; those that are held, too."
  @spec serve(t(), port()) :: t()
  def serve(%__MODULE__{} = traffic, port) do
    traffic = if traffic.to in [nil, port], do: traffic, else: take_back(traffic, traffic.to)
    suspects = Suspects.stop(traffic.suspects)
    advance(%{traffic | to: port, hold_changes?: false, suspects: suspects})
  end

  # What still waits to be written to one peer is for the next.
  defp take_back(traffic, port) do
    {ids, outbox} = Outbox.take_back(Map.fetch!(traffic.outboxes, port))
    traffic = %{traffic | outboxes: %{traffic.outboxes | port => outbox}}

    Enum.reduce(ids, traffic, fn id, traffic ->
      call = %{Calls.fetch!(traffic.calls, id) | at: nil}
      hold(%{traffic | calls: Calls.replace(traffic.calls, id, call)}, id, call)
    end)
  end

  @doc """
  Holds calls that change the programs, and all after the first of them, until `serve/2`: the
  programs are about to be given to another peer.
  """
  @spec hold_changes(t()) :: t()
  def hold_changes(%__MODULE__{} = traffic), do: %{traffic | hold_changes?: true}

  @doc "Whether a peer may still change its programs, by what it was given."
  @spec changing?(t(), port()) :: boolean()
  def changing?(%__MODULE__{} = traffic, port) do
    Enum.any?(traffic.late, fn {_id, {at, _what, _body}} -> at == port end) or
      Enum.any?(Calls.at(traffic.calls, port), fn {_id, call} -> call.what != nil end)
  end

  @doc "Whether a peer has calls to answer."
  @spec busy?(t(), port()) :: boolean()
  def busy?(%__MODULE__{} = traffic, port), do: Calls.at(traffic.calls, port) != []

  @doc "Hands a reply to its caller; `:nobody` if there is none (any more)."
  @spec deliver(t(), pos_integer(), binary()) :: {:ok, t()} | :nobody
  def deliver(%__MODULE__{} = traffic, id, frame) do
    case Calls.pop(traffic.calls, id) do
      {nil, _calls} ->
        deliver_late(traffic, id, frame)

      {call, calls} ->
        if call.what, do: note_change(traffic, call.what, call.body, frame)
        unwatch(call.watch)
        done(traffic, call.retry)
        answer(call.ref, {:frame, frame})
        {:ok, leave_trial(%{traffic | calls: calls}, id)}
    end
  end

  defp deliver_late(%__MODULE__{late: late} = traffic, id, frame) when is_map_key(late, id) do
    {{_port, what, body}, late} = Map.pop!(late, id)
    note_change(traffic, what, body, frame)
    {:ok, %{traffic | late: late}}
  end

  defp deliver_late(_traffic, _id, _frame), do: :nobody

  defp note_change(traffic, what, body, frame) do
    if Protocol.success?(frame), do: Programs.apply_change(traffic.programs, what, body)
  end

  @doc """
  A peer is gone. It `:died`: with each call in flight, or is `:replaced`, for which none is to blame.
  Each is sent again or fails, as it asked for; what was not written to the peer is not affected.
  """
  @spec lost(t(), port(), :died | :replaced) :: t()
  def lost(%__MODULE__{} = traffic, port, how) do
    {outbox, outboxes} = Map.pop!(traffic.outboxes, port)
    unwritten = MapSet.new(Outbox.close(outbox))
    calls = Calls.at(traffic.calls, port)
    late = Map.reject(traffic.late, fn {_id, {at, _what, _body}} -> at == port end)
    traffic = %{traffic | outboxes: outboxes, late: late}
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
    do: %{traffic | to: nil, suspects: Suspects.stop(traffic.suspects)}

  defp sort_out(traffic, id, %Call{retry: :caller}, how),
    do: fail(traffic, id, {:died, if(how == :died, do: :sent, else: :unsent)})

  defp sort_out(traffic, id, %Call{retry: :never}, how) when how in [:died, :replaced],
    do: fail(traffic, id, :python_process_died)

  defp sort_out(%{max_retries: most} = traffic, id, %Call{deaths: deaths}, :died)
       when deaths >= most,
       do: fail(traffic, id, :python_process_died)

  defp sort_out(traffic, id, call, how) do
    call = %{call | at: nil, deaths: if(how == :died, do: call.deaths + 1, else: call.deaths)}
    hold(%{traffic | calls: Calls.replace(traffic.calls, id, call)}, id, call)
  end

  # Who knows other peers need not wait for this one's successor.
  defp release_callers(%__MODULE__{to: nil} = traffic) do
    for {id, %Call{retry: :caller}} <- Calls.at(traffic.calls, nil), reduce: traffic do
      traffic -> fail(traffic, id, {:died, :unsent})
    end
  end

  defp release_callers(traffic), do: traffic

  defp learn(traffic, calls) do
    case for {_id, %Call{since: since}} <- calls, do: since do
      [] -> traffic
      sent -> %{traffic | suspects: Suspects.learn(traffic.suspects, now() - Enum.min(sent))}
    end
  end

  @doc "Calls fail: all, or those that no peer has been given."
  @spec fail_all(t(), failure(), :all | :held) :: t()
  def fail_all(%__MODULE__{} = traffic, failure, which) do
    for {id, %Call{at: at}} <- traffic.calls.by_id, which == :all or at == nil, reduce: traffic do
      traffic -> fail(traffic, id, failure)
    end
  end

  defp fail(traffic, id, failure) do
    {call, calls} = Calls.pop(traffic.calls, id)
    unwatch(call.watch)
    done(traffic, call.retry)
    answer(call.ref, {:error, failure})
    traffic = %{traffic | calls: calls}
    if call.at == nil, do: cancel(traffic, id, call), else: traffic
  end

  @doc "To be told of every `:DOWN` of a process, which may be an outbox's helper."
  @spec written(t(), reference()) :: t()
  def written(%__MODULE__{outboxes: outboxes} = traffic, monitor) do
    outboxes = Map.new(outboxes, fn {port, outbox} -> {port, Outbox.written(outbox, monitor)} end)
    %{traffic | outboxes: outboxes}
  end

  @doc "Whether nothing waits to be written, bar what the outboxes' helpers hold."
  @spec all_written?(t()) :: boolean()
  def all_written?(%__MODULE__{} = traffic) do
    :gb_sets.is_empty(traffic.held) and not Suspects.any?(traffic.suspects) and
      Enum.all?(traffic.outboxes, fn {_port, outbox} -> Outbox.empty?(outbox) end)
  end

  ## What is held, and when it goes out

  # The first is the usual way. A ping can harm nobody, and those who watch over the peer by it must
  # not take a trial for a peer that hangs.
  defp at_once?(%__MODULE__{to: nil}, _call), do: false

  defp at_once?(%__MODULE__{} = traffic, %Call{} = call) do
    (not traffic.suspects.trial? and :gb_sets.is_empty(traffic.held) and
       not Suspects.suspect?(traffic.suspects, call.deaths) and
       (call.what == nil or not traffic.hold_changes?)) or Protocol.ping?(call.body)
  end

  defp hold(traffic, id, call) do
    if Suspects.suspect?(traffic.suspects, call.deaths),
      do: %{traffic | suspects: Suspects.add(traffic.suspects, id, call.deaths)},
      else: %{traffic | held: :gb_sets.add(id, traffic.held)}
  end

  defp give(traffic, id, call, now) do
    outboxes = traffic.outboxes
    outbox = Map.fetch!(outboxes, traffic.to)
    outbox = Outbox.push_request(outbox, id, call.deadline, call.body)
    {%{call | at: traffic.to, since: now}, %{outboxes | traffic.to => outbox}}
  end

  defp give_all(traffic, ids) do
    Enum.reduce(ids, traffic, fn id, traffic ->
      {call, outboxes} = give(traffic, id, Calls.fetch!(traffic.calls, id), now())
      %{traffic | calls: Calls.replace(traffic.calls, id, call), outboxes: outboxes}
    end)
  end

  defp advance(%__MODULE__{to: nil} = traffic), do: traffic

  defp advance(%__MODULE__{suspects: suspects} = traffic) do
    cond do
      Suspects.trying?(suspects) ->
        traffic

      not Suspects.any?(suspects) ->
        give_held(%{traffic | suspects: Suspects.stop(suspects)})

      # Any of these may kill the peer, and a suspect with it.
      not suspects.trial? and busy?(traffic, traffic.to) ->
        ids = for {id, _call} <- Calls.at(traffic.calls, traffic.to), do: id
        %{traffic | suspects: Suspects.try_out(suspects, ids)}

      true ->
        {ids, suspects} = Suspects.take_group(suspects)
        give_all(%{traffic | suspects: Suspects.try_out(suspects, ids)}, ids)
    end
  end

  defp give_held(%__MODULE__{held: held} = traffic) do
    with false <- :gb_sets.is_empty(held),
         {id, rest} = :gb_sets.take_smallest(held),
         false <- traffic.hold_changes? and Calls.fetch!(traffic.calls, id).what != nil do
      give_held(give_all(%{traffic | held: rest}, [id]))
    else
      true -> traffic
    end
  end

  defp leave_trial(%__MODULE__{suspects: %Suspects{trial?: false}} = traffic, _id), do: traffic

  defp leave_trial(%__MODULE__{} = traffic, id),
    do: advance(%{traffic | suspects: Suspects.leave(traffic.suspects, id)})

  @doc "The timer `:acquit` has fired: those on trial have outlived their time."
  @spec acquit(t(), reference()) :: t()
  def acquit(%__MODULE__{} = traffic, timer),
    do: advance(%{traffic | suspects: Suspects.acquit(traffic.suspects, timer)})

  ## Answers

  # What the caller's receive in DSPex.PythonBridge.Caller waits for.
  defp answer(nil, _reply), do: :ok

  defp answer(ref, reply) do
    send(ref, {ref, reply})
    :ok
  end

  # The pool's caller has counted it in.
  defp done(%__MODULE__{slot: {slots, index, _keeper}}, :caller), do: Slots.done(slots, index)
  defp done(_traffic, _retry), do: :ok

  defp now, do: System.monotonic_time(:millisecond)
end
