defmodule DSPex.PythonBridge.Calls.InFlight do
  @moduledoc false
  # The state of all calls of a bridge, and how a call ends. It sends messages, but does not depend on how peers
  # start and end.
  #
  # Ids grow as long as the bridge lives, over all its peers, so that no reply is taken for another's. They are
  # also the keys, and the order, of the send queues and of the calls that are held; a control frame takes one, too.

  alias DSPex.PythonBridge.{Calls, Options, Programs, Protocol}
  alias DSPex.PythonBridge.Calls.{LoadCounters, Request, SendQueue, Suspects}

  # The longest head that request_frame/3 puts before a body.
  @head_bytes 64

  @enforce_keys [:max_retries, :programs, :slot]
  defstruct [:max_retries, :programs, :slot, :to] ++
              [calls: Calls.Table.new(), held: :gb_sets.empty(), send_queues: %{}] ++
              [suspects: %Suspects{}, silent?: false, resent: 0, next_id: 1]

  @typedoc """
  `to`: the port of the peer that serves. `held`: the ids of the calls that no peer has, but for suspects that wait.
  `silent?`: in a pool, whether the peer has sent nothing since a call to it was given up. `resent`: how many times a
  call was sent again, or will be.
  """
  @type t :: %__MODULE__{
          max_retries: non_neg_integer(),
          programs: Programs.Store.table(),
          slot: LoadCounters.slot() | nil,
          to: port() | nil,
          calls: Calls.Table.t(),
          held: :gb_sets.set(pos_integer()),
          suspects: Suspects.t(),
          send_queues: %{port() => SendQueue.t()},
          silent?: boolean(),
          resent: non_neg_integer(),
          next_id: pos_integer()
        }

  @doc "The state without calls."
  @spec new(Options.t(), Programs.Store.table()) :: t()
  def new(options, programs) do
    %__MODULE__{
      max_retries: options.max_retries,
      programs: programs,
      slot: options.slot
    }
  end

  @doc "The number of calls that wait for a reply."
  @spec pending(t()) :: non_neg_integer()
  def pending(%__MODULE__{calls: calls}), do: Calls.Table.size(calls)

  @doc """
  Whether a request fits into a frame of at most `max` bytes. This is exact; the head is only written out
  for sizes near the limit.
  """
  @spec fits?(t(), Request.t(), pos_integer()) :: boolean()
  def fits?(%__MODULE__{}, %Request{body: body}, max) when byte_size(body) + @head_bytes <= max,
    do: true

  def fits?(%__MODULE__{next_id: id}, %Request{timeout: timeout, body: body}, max),
    do: IO.iodata_length(Protocol.request_frame(id, timeout, body)) <= max

  @doc "Refuses a request that was not accepted."
  @spec refuse(t(), Request.t(), Request.failure()) :: t()
  def refuse(%__MODULE__{} = in_flight, %Request{} = request, failure) do
    answer(request, {:error, failure})
    in_flight
  end

  @doc "Fails all calls, or only those that no peer has."
  @spec fail_all(t(), Request.failure(), :all | :held) :: t()
  def fail_all(%__MODULE__{} = in_flight, failure, which) do
    for {id, %Request{at: at}} <- in_flight.calls.by_id,
        which == :all or at == nil,
        reduce: in_flight do
      in_flight -> fail(in_flight, id, failure)
    end
  end

  @doc "Fails a call, held or not."
  @spec fail(t(), pos_integer(), Request.failure()) :: t()
  def fail(%__MODULE__{} = in_flight, id, failure) do
    {request, in_flight} = take_out(in_flight, id)
    answer(request, {:error, failure})
    release(in_flight, id, request)
  end

  @doc "Removes a call from the held ones, if it is one of them."
  @spec release(t(), pos_integer(), Request.t()) :: t()
  def release(%__MODULE__{} = in_flight, id, %Request{at: nil}),
    do: %{in_flight | held: :gb_sets.delete_any(id, in_flight.held)}

  def release(in_flight, _id, _request), do: in_flight

  @doc "Takes a call out of the table, the first step of each end; nil if another end has taken it."
  @spec take_out(t(), pos_integer()) :: {Request.t() | nil, t()}
  def take_out(%__MODULE__{calls: calls} = in_flight, id) do
    case Calls.Table.pop(calls, id) do
      {nil, _calls} ->
        {nil, in_flight}

      {request, calls} ->
        unwatch(request.watch)
        in_flight = forget(%{in_flight | calls: calls}, id, request)
        show_load(in_flight)
        {request, drop_results(in_flight, id, request)}
    end
  end

  # For each reply.
  @compile {:inline, unwatch: 1, show_load: 1, arrived: 2, forget: 3, drop_results: 3}

  # No flush: a message that either has already sent will find no call.
  defp unwatch({:monitor, ref}), do: Process.demonitor(ref)
  defp unwatch({:timer, ref}), do: :erlang.cancel_timer(ref, async: true, info: false)
  defp unwatch(nil), do: true

  @doc "In a pool: a request has come, whether it is accepted or not."
  @spec arrived(t(), Request.t()) :: :ok
  def arrived(%__MODULE__{slot: {counters, index, _, _}}, %Request{ticket: ticket})
      when ticket != nil,
      do: LoadCounters.arrived(counters, index, ticket)

  def arrived(_in_flight, _request), do: :ok

  @doc "In a pool: shows the callers how many calls the bridge has."
  @spec show_load(t()) :: :ok
  def show_load(%__MODULE__{slot: nil}), do: :ok

  def show_load(%__MODULE__{slot: {counters, index, _, _}, calls: calls, silent?: silent?}),
    do: LoadCounters.put_calls(counters, index, Calls.Table.size(calls), silent?)

  defp forget(in_flight, _id, %Request{deaths: 0}), do: in_flight

  defp forget(%__MODULE__{suspects: suspects} = in_flight, id, request),
    do: %{in_flight | suspects: Suspects.drop(suspects, id, request)}

  # Results of its tools that still wait to be written. The bridge is sent `{:dropped, bytes}`, to collect garbage.
  defp drop_results(
         %__MODULE__{send_queues: send_queues} = in_flight,
         id,
         %Request{tools?: true, at: port}
       )
       when is_map_key(send_queues, port) do
    {bytes, send_queue} = SendQueue.drop_about(Map.fetch!(send_queues, port), id)
    if bytes > 0, do: send(self(), {:dropped, bytes})
    %{in_flight | send_queues: %{send_queues | port => send_queue}}
  end

  defp drop_results(in_flight, _id, _request), do: in_flight

  @doc "Sends the caller its reply; DSPex.PythonBridge.Client.Caller waits for it."
  @spec answer(Request.t(), Request.reply()) :: :ok
  def answer(%Request{ref: nil}, _reply), do: :ok

  def answer(%Request{ref: ref}, reply) do
    send(ref, {ref, reply})
    :ok
  end
end
