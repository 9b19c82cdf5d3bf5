defmodule DSPex.PythonBridge.Calls.InFlight do
  @moduledoc """
  What goes between callers and peers: ids are given here, calls wait here, and each is answered
  here, once. Part of the bridge's process; it sends messages, but knows nothing of how peers come
  and go. Which call is sent to which peer, and when, is in `DSPex.PythonBridge.Calls.Dispatcher`; what is said
  between a request and its reply, in `DSPex.PythonBridge.Calls.Events`.

  Ids grow for as long as the bridge lives, over all its peers, so that no reply can be taken for
  another's. They are also the keys of the send queues and of what is held, whose order they are; a
  cancel takes one, too.
  """

  alias DSPex.PythonBridge.{Calls, Options, Programs, Protocol}
  alias DSPex.PythonBridge.Calls.{Dispatcher, LoadCounters, Quarantine, SendQueue}
  alias DSPex.PythonBridge.Calls.Table.Call

  # What request_frame/3 puts before a body, at most.
  @head_bytes 64

  @enforce_keys [:max_retries, :programs, :slot, :quarantine]
  defstruct [
    :max_retries,
    :programs,
    :slot,
    :quarantine,
    :to,
    calls: Calls.Table.new(),
    held: :gb_sets.empty(),
    silent?: false,
    hold_changes?: false,
    send_queues: %{},
    late: %{},
    resent: 0,
    next_id: 1
  ]

  @typedoc """
  `to`: the port of the peer that serves. `silent?`: of a pool's bridge, whether that peer has sent nothing
  since a call of its was given up. `held`: ids of calls that are no suspects. `late`: changes to
  the programs that nobody waits for any more, by their peer's port and by id; no port has none.
  `resent`: how often a call was, or is to be, sent again.
  """
  @type t :: %__MODULE__{
          max_retries: non_neg_integer(),
          programs: Programs.Store.table(),
          slot: Options.slot() | nil,
          quarantine: Quarantine.t(),
          to: port() | nil,
          calls: Calls.Table.t(),
          held: :gb_sets.set(pos_integer()),
          silent?: boolean(),
          hold_changes?: boolean(),
          send_queues: %{port() => SendQueue.t()},
          late: %{port() => %{pos_integer() => {Programs.Store.change(), binary()}}},
          resent: non_neg_integer(),
          next_id: pos_integer()
        }
  @type failure ::
          :python_process_died
          | :replaced
          | :bridge_not_running
          | :overloaded
          | {:died, :sent | :unsent}
          | {:too_large, pos_integer(), pos_integer()}
  @typedoc "What is done about a death; how many there were already; the change that is asked for."
  @type terms ::
          {:here | :never | :caller, non_neg_integer(), Programs.Store.change() | repair() | nil}
  @typedoc "Asked of a pool's coordinator alone: see `DSPex.PythonBridge.Pool.ProgramChanges.ask/5`."
  @type repair :: {:repair, pos_integer(), Programs.Store.id()}
  @typedoc "What goes between a caller and the peer beside request and reply."
  @type beside :: %{stream?: boolean(), tools?: boolean()}

  @doc "Nothing is under way."
  @spec new(Options.t(), Programs.Store.table()) :: t()
  def new(options, programs) do
    %__MODULE__{
      max_retries: options.max_retries,
      programs: programs,
      slot: options.slot,
      quarantine: Quarantine.new(options.max_retries)
    }
  end

  ## Callers

  @doc "Of a caller that wants only the reply."
  @spec nothing_beside() :: beside()
  def nothing_beside, do: %{stream?: false, tools?: false}

  @doc """
  Takes a request on. `ref` is the caller's alias; both it and `pid` are nil for a cast. `timeout`
  is what is left to the caller, in ms.
  """
  @spec accept(t(), reference() | nil, pid() | nil, timeout(), binary(), terms(), beside()) :: t()
  def accept(%__MODULE__{to: nil} = in_flight, ref, _pid, _, _, {:caller, _, _}, _beside),
    do: refuse(in_flight, ref, {:died, :unsent}, :caller)

  def accept(%__MODULE__{next_id: id} = in_flight, ref, pid, timeout, body, terms, beside) do
    {retry, deaths, what} = terms
    now = now()

    call = %Call{
      ref: ref,
      watch: watch(pid, id, timeout),
      deadline: if(timeout == :infinity, do: :infinity, else: now + timeout),
      body: body,
      retry: retry,
      what: stamped(what),
      deaths: deaths,
      stream?: beside.stream?,
      tools?: beside.tools?
    }

    Dispatcher.offer(%{in_flight | next_id: id + 1}, id, call, now)
  end

  @doc "Tells a caller at once that its request was not taken on."
  @spec refuse(t(), reference() | nil, failure(), :here | :never | :caller) :: t()
  def refuse(%__MODULE__{} = in_flight, ref, failure, retry) do
    done(in_flight, retry)
    answer(ref, {:error, failure})
    in_flight
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
  def pending(%__MODULE__{calls: calls}), do: Calls.Table.size(calls)

  @doc """
  Nobody waits for this call any more: by id, or by the caller's alias. Its request is taken back
  if it still waits to be written, else cancelled in the peer, whose answer will find nobody.
  """
  @spec abandon(t(), pos_integer() | reference()) :: t()
  def abandon(%__MODULE__{} = in_flight, ref) when is_reference(ref) do
    case Calls.Table.id_of(in_flight.calls, ref) do
      # The reply went out first; it was sent to an alias that is no more.
      nil -> in_flight
      id -> abandon(in_flight, id)
    end
  end

  def abandon(%__MODULE__{} = in_flight, id) do
    case Calls.Table.pop(in_flight.calls, id) do
      {nil, _calls} ->
        in_flight

      {call, calls} ->
        unwatch(call.watch)
        done(in_flight, call.retry)
        in_flight = suspect_silence(%{in_flight | calls: calls}, call)
        in_flight |> Calls.Events.over(id, call) |> Dispatcher.withdraw(id, call)
    end
  end

  # A peer that hangs would look idle: each call that is given up is counted out. One that does not will say
  # something soon, be it that the call was cancelled.
  defp suspect_silence(
         %__MODULE__{slot: {counters, index, _coordinator, monitor}, to: port} = in_flight,
         %Call{at: port}
       )
       when port != nil do
    LoadCounters.silent(counters, index)
    GenServer.cast(monitor, :unanswered)
    %{in_flight | silent?: true}
  end

  defp suspect_silence(in_flight, _call), do: in_flight

  @doc "The peer that serves has sent something, for the first time since it was suspected of silence."
  @spec heard(t()) :: t()
  def heard(%__MODULE__{slot: {counters, index, _coordinator, monitor}} = in_flight) do
    LoadCounters.heard(counters, index)
    GenServer.cast(monitor, :heard)
    %{in_flight | silent?: false}
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
  defp stamped({kind, ids, nil}), do: {kind, ids, Programs.Store.stamp()}
  defp stamped(change), do: change

  ## Replies

  @doc "Hands a reply to its caller; `:nobody` if there is none (any more)."
  @spec deliver(t(), pos_integer(), binary()) :: {:ok, t()} | :nobody
  def deliver(%__MODULE__{} = in_flight, id, frame) do
    case Calls.Table.pop(in_flight.calls, id) do
      {nil, _calls} ->
        deliver_late(in_flight, id, frame)

      {call, calls} ->
        if call.what, do: note_change(in_flight, call.what, call.body, frame)
        unwatch(call.watch)
        done(in_flight, call.retry)
        answer(call.ref, {:frame, frame})
        in_flight = Calls.Events.over(%{in_flight | calls: calls}, id, call)
        {:ok, Dispatcher.answered(in_flight, id)}
    end
  end

  defp deliver_late(%__MODULE__{late: late} = in_flight, id, frame) do
    case Enum.find(late, fn {_port, changes} -> is_map_key(changes, id) end) do
      {port, changes} ->
        {{what, body}, rest} = Map.pop!(changes, id)
        note_change(in_flight, what, body, frame)
        late = if rest == %{}, do: Map.delete(late, port), else: %{late | port => rest}
        {:ok, %{in_flight | late: late}}

      nil ->
        :nobody
    end
  end

  defp note_change(in_flight, what, body, frame) do
    if Protocol.success?(frame), do: Programs.Store.apply_change(in_flight.programs, what, body)
  end

  @doc "Calls fail: all, or those that no peer has been given."
  @spec fail_all(t(), failure(), :all | :held) :: t()
  def fail_all(%__MODULE__{} = in_flight, failure, which) do
    for {id, %Call{at: at}} <- in_flight.calls.by_id,
        which == :all or at == nil,
        reduce: in_flight do
      in_flight -> fail(in_flight, id, failure)
    end
  end

  @doc "A call fails."
  @spec fail(t(), pos_integer(), failure()) :: t()
  def fail(%__MODULE__{} = in_flight, id, failure) do
    {call, calls} = Calls.Table.pop(in_flight.calls, id)
    unwatch(call.watch)
    done(in_flight, call.retry)
    answer(call.ref, {:error, failure})
    %{in_flight | calls: calls} |> Calls.Events.over(id, call) |> Dispatcher.forget(id, call)
  end

  ## Answers

  # What the caller's receive in DSPex.PythonBridge.Client.Caller waits for.
  defp answer(nil, _reply), do: :ok

  defp answer(ref, reply) do
    send(ref, {ref, reply})
    :ok
  end

  # The pool's caller has counted it in.
  defp done(%__MODULE__{slot: {counters, index, _, _}}, :caller),
    do: LoadCounters.done(counters, index)

  defp done(_in_flight, _retry), do: :ok

  defp now, do: System.monotonic_time(:millisecond)
end
