defmodule DSPex.PythonBridge.Calls.InFlight do
  @moduledoc false
  # The calls of a bridge that wait for a reply, and how each ends. A call is in the table until exactly one of these
  # takes it out: its reply, its caller's timeout, its caller's death, the death of a peer. Whichever comes later finds
  # nothing: all races between them end like that.
  #
  # Ids grow as long as the bridge lives, over all its peers, so that no reply is taken for another's. They are
  # also the keys, and the order, of the send queues and of the calls that are held; a control frame takes one, too.

  alias DSPex.PythonBridge.{Options, Programs, Protocol}
  alias DSPex.PythonBridge.Calls.{Request, SendQueue, Suspects}

  @enforce_keys [:max_retries, :programs, :observer]
  defstruct [:max_retries, :programs, :observer, :to, :ids] ++
              [asked: %{}, calls: %{}, held: :gb_sets.empty(), send_queues: %{}, given: %{}] ++
              [suspects: %Suspects{}, silent?: false, resent: 0, next_id: 1]

  @typedoc """
  `to`: the port of the peer that serves. `ids`: those of the calls by their callers' references, only for callers whose
  time is over: it is made when one of many calls is abandoned, and kept until all are answered. (Kept for each call, it
  costs 7 % more CPU with 256 at once.) `held`: the ids of the calls that no peer has, but for suspects that
  wait. `given`: the stamps of the definitions that the peer was sent last, by the programs' ids. `asked`: the id of the request that
  a cold peer answers when it has imported DSPy, by its port. `observer`: a module whose `notify/2` is called with the term and each
  `t:event/0`. `silent?`: with an observer, whether the peer has sent nothing since a call to it was given up. `resent`:
  how many times a call was resent, or will be.
  """
  @type t :: %__MODULE__{
          max_retries: non_neg_integer(),
          programs: Programs.Store.table(),
          observer: observer(),
          to: SendQueue.transport() | nil,
          ids: %{reference() => pos_integer()} | nil,
          calls: %{pos_integer() => Request.t()},
          held: :gb_sets.set(pos_integer()),
          suspects: Suspects.t(),
          asked: %{SendQueue.transport() => pos_integer()},
          send_queues: %{SendQueue.transport() => SendQueue.t()},
          given: %{Programs.Store.id() => Programs.Store.stamp()},
          silent?: boolean(),
          resent: non_neg_integer(),
          next_id: pos_integer()
        }
  @type observer :: {module(), term()} | nil
  @typedoc """
  The bridge starts; a peer serves; none does; none starts; how many calls there are, and whether others are to be
  preferred to this bridge; a call was given up whose peer may hang; that has sent something; a peer has made a change.
  """
  @type event ::
          :start
          | :ready
          | :down
          | {:failed, String.t()}
          | {:load, non_neg_integer(), last? :: boolean()}
          | :silent
          | :heard
          | {:changed, Programs.Store.change(), binary()}

  @doc "The state without calls."
  @spec new(Options.t(), Programs.Store.table()) :: t()
  def new(%{max_retries: most, observer: observer}, programs),
    do: %__MODULE__{max_retries: most, programs: programs, observer: observer}

  # For each call.
  @compile {:inline, show_load: 1, notify: 2, unwatch: 1, forget: 3}

  @doc "Tells the observer, if there is one."
  @spec notify(t(), event()) :: :ok
  def notify(%__MODULE__{observer: nil}, _event), do: :ok
  def notify(%__MODULE__{observer: {module, term}}, event), do: module.notify(term, event)

  @doc "Tells the observer how many calls the bridge has."
  @spec show_load(t()) :: :ok
  def show_load(%__MODULE__{observer: nil}), do: :ok

  def show_load(%__MODULE__{calls: calls, silent?: silent?, suspects: %{cold?: cold?}} = state),
    do: notify(state, {:load, map_size(calls), silent? or cold?})

  @doc "Notes whether the peer that serves may hang."
  @spec silent(t(), boolean()) :: t()
  def silent(%__MODULE__{} = state, silent?) do
    notify(state, if(silent?, do: :silent, else: :heard))
    tap(%{state | silent?: silent?}, &show_load/1)
  end

  ## The table

  @doc "The number of calls that wait for a reply."
  @spec pending(t()) :: non_neg_integer()
  def pending(%__MODULE__{calls: calls}), do: map_size(calls)

  @doc "Adds a call, or replaces it."
  @spec put(t(), pos_integer(), Request.t()) :: t()
  def put(%__MODULE__{calls: calls, ids: nil} = state, id, request),
    do: %{state | calls: Map.put(calls, id, request)}

  def put(%__MODULE__{calls: calls, ids: ids} = state, id, %Request{ref: ref} = request) do
    ids = if ref, do: Map.put(ids, ref, id), else: ids
    %{state | calls: Map.put(calls, id, request), ids: ids}
  end

  @doc "The id of the call of a caller's reference; nil if it has ended."
  @spec id_of(t(), reference()) :: {pos_integer() | nil, t()}
  def id_of(%__MODULE__{ids: nil, calls: calls} = state, ref) do
    ids = for {id, %Request{ref: ref}} when ref != nil <- calls, into: %{}, do: {ref, id}
    id_of(%{state | ids: ids}, ref)
  end

  def id_of(%__MODULE__{ids: ids} = state, ref), do: {Map.get(ids, ref), state}

  @doc "The calls of a peer, oldest first; with nil, those that no peer has."
  @spec at(t(), SendQueue.transport() | nil) :: [{pos_integer(), Request.t()}]
  def at(%__MODULE__{calls: calls}, port),
    do: Enum.sort(for {id, %Request{at: ^port} = request} <- calls, do: {id, request})

  ## Ends

  @doc "Takes a call out of the table, the first step of each end; nil if another end has taken it."
  @spec take_out(t(), pos_integer()) :: {Request.t() | nil, t()}
  def take_out(%__MODULE__{calls: calls, ids: ids} = state, id) do
    case calls do
      %{^id => request} ->
        unwatch(request.watch)
        calls = Map.delete(calls, id)
        ids = if ids && calls != %{}, do: Map.delete(ids, request.ref)
        state = forget(%{state | calls: calls, ids: ids}, id, request)
        show_load(state)
        {request, state}

      _gone ->
        {nil, state}
    end
  end

  # No flush: a message that either has already sent will find no call.
  defp unwatch({:monitor, ref}), do: Process.demonitor(ref)
  defp unwatch({:timer, ref}), do: :erlang.cancel_timer(ref, async: true, info: false)
  defp unwatch(nil), do: true

  # A call that is held may end, too, by the reply of a peer that was replaced.
  defp forget(%__MODULE__{held: held} = state, id, %Request{at: nil, deaths: 0}),
    do: %{state | held: :gb_sets.delete_any(id, held)}

  defp forget(state, _id, %Request{deaths: 0}), do: state

  defp forget(%__MODULE__{suspects: suspects, held: held} = state, id, request) do
    suspects = Suspects.drop(suspects, id, request)
    %{state | suspects: suspects, held: :gb_sets.delete_any(id, held)}
  end

  @doc "Fails a call, held or not."
  @spec fail(t(), pos_integer(), Request.failure()) :: t()
  def fail(%__MODULE__{} = state, id, failure) do
    {request, state} = take_out(state, id)
    answer(request, {:error, failure})
    state
  end

  @doc "Fails all calls, or only those that no peer has."
  @spec fail_all(t(), Request.failure(), :all | :held) :: t()
  def fail_all(%__MODULE__{} = state, failure, which) do
    for {id, %Request{at: at}} <- state.calls, which == :all or at == nil, reduce: state do
      state -> fail(state, id, failure)
    end
  end

  @doc "Refuses a request that was not accepted."
  @spec refuse(t(), Request.t(), Request.failure()) :: :ok
  def refuse(%__MODULE__{} = state, request, failure) do
    # It counts as one on its way.
    show_load(state)
    answer(request, {:error, failure})
  end

  @doc "Sends the caller its reply; DSPex.PythonBridge.Client.Caller waits for it."
  @spec answer(Request.t(), Request.reply()) :: :ok
  def answer(%Request{ref: nil}, _reply), do: :ok

  def answer(%Request{ref: ref}, reply) do
    send(ref, {ref, reply})
    :ok
  end

  @doc "Tells a caller that takes chunks that its call is resent."
  @spec restarted(Request.t()) :: :ok
  def restarted(%Request{stream?: false}), do: :ok

  def restarted(%Request{ref: ref}) do
    send(ref, {ref, :chunk, Protocol.restarted_chunk()})
    :ok
  end
end
