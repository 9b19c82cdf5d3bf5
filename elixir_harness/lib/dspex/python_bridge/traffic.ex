defmodule DSPex.PythonBridge.Traffic do
  @moduledoc """
  What goes between callers and peer: ids are given here, calls wait here, and each is answered
  here, once. Part of the bridge's process; it sends messages, but knows nothing of how peers come
  and go.

  Ids grow for as long as the bridge lives, over all its peers, so that no reply can be taken for
  another's. They are also the keys of the outbox, whose order they are; a cancel takes one, too.
  """

  alias DSPex.PythonBridge.{Calls, Outbox, Protocol}

  # What request_frame/3 puts before a body, at most.
  @head_bytes 64

  # answered: the calls that the present peer has replied to.
  defstruct outbox: Outbox.new(), calls: Calls.new(), next_id: 1, answered: 0

  @type t :: %__MODULE__{
          outbox: Outbox.t(),
          calls: Calls.t(),
          next_id: pos_integer(),
          answered: non_neg_integer()
        }
  @type failure ::
          :python_process_died
          | :bridge_not_running
          | :overloaded
          | {:too_large, pos_integer(), pos_integer()}

  ## Callers

  @doc """
  Takes a request on. `ref` is the caller's alias; both it and `pid` are nil for a cast. `timeout`
  is what is left to the caller, in ms.
  """
  @spec accept(t(), reference() | nil, pid() | nil, timeout(), binary()) :: t()
  def accept(%__MODULE__{next_id: id} = traffic, ref, pid, timeout, body) do
    %{
      traffic
      | next_id: id + 1,
        calls: Calls.put(traffic.calls, id, {ref, watch(pid, id, timeout)}),
        outbox: Outbox.push_request(traffic.outbox, id, timeout, body)
    }
  end

  @doc "Tells a caller at once that its request was not taken on."
  @spec refuse(reference() | nil, failure()) :: :ok
  def refuse(ref, failure), do: answer(ref, {:error, failure})

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

      {{_ref, watch}, calls} ->
        unwatch(watch)
        cancel(%{traffic | calls: calls}, id)
    end
  end

  defp cancel(%__MODULE__{outbox: outbox, next_id: key} = traffic, id) do
    if Outbox.member?(outbox, id) do
      %{traffic | outbox: Outbox.drop(outbox, id)}
    else
      outbox = Outbox.push_control(outbox, key, Protocol.cancel_frame(id))
      %{traffic | outbox: outbox, next_id: key + 1}
    end
  end

  # A caller keeps its own time and is watched for its death; a cast has nobody who would.
  defp watch(nil, id, timeout), do: {:timer, :erlang.start_timer(timeout, self(), {:cast, id})}

  defp watch(pid, id, _timeout),
    do: {:monitor, :erlang.monitor(:process, pid, tag: {:caller_down, id})}

  # No flush: a message that either has sent already will find its call gone.
  defp unwatch({:monitor, ref}), do: Process.demonitor(ref)
  defp unwatch({:timer, ref}), do: :erlang.cancel_timer(ref, async: true, info: false)

  ## Peer

  @doc "A new peer: only a ping goes out, under the id that is given back, until `release/1`."
  @spec attach(t(), port()) :: {pos_integer(), t()}
  def attach(%__MODULE__{next_id: id} = traffic, port) do
    ping = Protocol.encode_request(id, :ping, %{})
    outbox = traffic.outbox |> Outbox.attach(port) |> Outbox.push_now(ping)
    {id, %{traffic | outbox: outbox, next_id: id + 1, answered: 0}}
  end

  @doc "The peer is up: what has queued goes out."
  @spec release(t()) :: t()
  def release(%__MODULE__{} = traffic), do: %{traffic | outbox: Outbox.release(traffic.outbox)}

  @doc "Hands a reply to its caller; `:nobody` if there is none (any more)."
  @spec deliver(t(), pos_integer(), binary()) :: {:ok, t()} | :nobody
  def deliver(%__MODULE__{} = traffic, id, frame) do
    case Calls.pop(traffic.calls, id) do
      {nil, _calls} ->
        :nobody

      {{ref, watch}, calls} ->
        unwatch(watch)
        answer(ref, {:frame, frame})
        {:ok, %{traffic | calls: calls, answered: traffic.answered + 1}}
    end
  end

  @doc "The peer is gone. Calls that it had fail; those not yet written wait for the next."
  @spec detach(t()) :: t()
  def detach(%__MODULE__{} = traffic) do
    outbox = Outbox.detach(traffic.outbox)
    {in_flight, calls} = Calls.pop_unless(traffic.calls, &Outbox.member?(outbox, &1))
    fail(in_flight, :python_process_died)
    %{traffic | outbox: outbox, calls: calls}
  end

  @doc "There will be no next peer: all calls that still wait fail."
  @spec fail_all(t(), failure()) :: t()
  def fail_all(%__MODULE__{} = traffic, failure) do
    {calls, none} = Calls.pop_unless(traffic.calls, fn _id -> false end)
    fail(calls, failure)
    %{traffic | outbox: Outbox.clear(traffic.outbox), calls: none}
  end

  @doc "To be told of every `:DOWN` of a process, which may be the outbox's helper."
  @spec written(t(), reference()) :: t()
  def written(%__MODULE__{} = traffic, monitor),
    do: %{traffic | outbox: Outbox.written(traffic.outbox, monitor)}

  @doc "Whether nothing waits to be written, bar what the outbox's helper holds."
  @spec all_written?(t()) :: boolean()
  def all_written?(%__MODULE__{outbox: outbox}), do: Outbox.empty?(outbox)

  defp fail(calls, failure) do
    Enum.each(calls, fn {ref, watch} ->
      unwatch(watch)
      answer(ref, {:error, failure})
    end)
  end

  # What the caller's receive in DSPex.PythonBridge.Caller waits for.
  defp answer(nil, _reply), do: :ok

  defp answer(ref, reply) do
    send(ref, {ref, reply})
    :ok
  end
end
