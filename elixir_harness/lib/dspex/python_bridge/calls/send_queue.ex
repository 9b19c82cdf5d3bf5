defmodule DSPex.PythonBridge.Calls.SendQueue do
  @moduledoc false
  # The frames on their way to one peer. It never blocks the process that uses it: a frame for which the pipe has no
  # room is written by a writer process, which the runtime suspends until there is room, and all later frames queue
  # behind it.
  #
  # A frame in the queue has not been written, so it can be taken back (`drop/2`), and did not kill the peer
  # (`close/1`). The frame of the writer counts as written, since some of its bytes may be.
  #
  # Keys are the order in the queue: pings come first, then what is to come before all calls, then calls and control
  # frames by their ids.

  alias DSPex.PythonBridge.Protocol
  alias DSPex.PythonBridge.OTP.Deadline

  # A process that takes the place of a port takes the messages of one, and always has room.
  @typedoc "The port of a peer, or the process in its place."
  @type transport :: port() | pid()

  # Less than any number of definitions.
  @ping_offset 1_000_000_000_000_000_000

  @enforce_keys [:port]
  defstruct [:port, writer: nil, queue: :gb_trees.empty()]

  @typep item ::
           {:request, id :: non_neg_integer(), Deadline.t(), body :: iodata()}
           | {:control, iodata()}
  @opaque t :: %__MODULE__{
            port: transport(),
            writer: {pid(), reference()} | nil,
            queue: :gb_trees.tree(integer(), item())
          }

  @doc "An empty send queue for a port."
  @spec new(transport()) :: t()
  def new(port), do: %__MODULE__{port: port}

  @doc "Takes back the requests that were not written; returns their ids."
  @spec take_back(t()) :: {[pos_integer()], t()}
  def take_back(%__MODULE__{} = send_queue) do
    {controls, requests} =
      Enum.split_with(:gb_trees.to_list(send_queue.queue), &match?({_key, {:control, _}}, &1))

    ids = for {_key, {:request, id, _deadline, _body}} <- requests, do: id
    {ids, %{send_queue | queue: :gb_trees.from_orddict(controls)}}
  end

  @doc "Ends the writer; returns the ids of the requests that were not written."
  @spec close(t()) :: [pos_integer()]
  def close(%__MODULE__{} = send_queue) do
    with {pid, monitor} <- send_queue.writer do
      Process.demonitor(monitor, [:flush])
      Process.exit(pid, :kill)
    end

    send_queue |> take_back() |> elem(0)
  end

  @doc "Sends a request, or queues it. `deadline` is in monotonic ms, or `:infinity`; `now` is the present time."
  @spec push_request(t(), pos_integer(), Deadline.t(), iodata(), integer()) :: t()
  def push_request(%__MODULE__{} = send_queue, id, deadline, body, now \\ Deadline.now()),
    do: push(send_queue, key(id, body), {:request, id, deadline, body}, now)

  # A ping must not wait for the definitions of programs.
  defp key(id, body) when is_binary(body),
    do: if(Protocol.ping?(body), do: id - @ping_offset, else: id)

  # A run with a journal.
  defp key(id, _body), do: id

  @doc """
  Sends requests whose replies nobody needs, or queues them, before all calls that are sent later. Their id is 0.
  """
  @spec push_first(t(), [iodata()]) :: t()
  def push_first(%__MODULE__{} = send_queue, bodies) do
    now = Deadline.now()

    for {body, key} <- Enum.with_index(bodies, -length(bodies)), reduce: send_queue do
      send_queue -> push(send_queue, key, {:request, 0, :infinity, body}, now)
    end
  end

  @doc "Sends a control frame, or queues it."
  @spec push_control(t(), pos_integer(), iodata()) :: t()
  def push_control(%__MODULE__{} = send_queue, key, frame),
    do: push(send_queue, key, {:control, frame}, Deadline.now())

  @doc "Takes a request back that still waits to be written; nil if it does not."
  @spec drop(t(), pos_integer()) :: t() | nil
  def drop(%__MODULE__{queue: queue} = send_queue, id) do
    key = Enum.find([id, id - @ping_offset], &:gb_trees.is_defined(&1, queue))
    key && %{send_queue | queue: :gb_trees.delete(key, queue)}
  end

  @doc "To be called with each `:DOWN` of a process: after the writer's, the next frames are sent."
  @spec written(t(), reference()) :: t()
  def written(%__MODULE__{writer: {_pid, monitor}} = send_queue, monitor),
    do: drain(%{send_queue | writer: nil})

  def written(%__MODULE__{} = send_queue, _monitor), do: send_queue

  # Without a writer the queue is empty: see drain/1.
  defp push(%__MODULE__{writer: nil} = send_queue, key, item, now) do
    case write(send_queue, frame(item, now)) do
      %__MODULE__{} = send_queue -> send_queue
      :port_gone -> queue(send_queue, key, item)
    end
  end

  defp push(%__MODULE__{} = send_queue, key, item, _now), do: queue(send_queue, key, item)

  defp queue(send_queue, key, item),
    do: %{send_queue | queue: :gb_trees.insert(key, item, send_queue.queue)}

  defp drain(%__MODULE__{} = send_queue) do
    if send_queue.writer == nil and not :gb_trees.is_empty(send_queue.queue) do
      {_key, item, rest} = :gb_trees.take_smallest(send_queue.queue)

      case write(send_queue, frame(item, Deadline.now())) do
        %__MODULE__{} = written -> drain(%{written | queue: rest})
        :port_gone -> send_queue
      end
    else
      send_queue
    end
  end

  defp frame({:control, frame}, _now), do: frame

  defp frame({:request, id, deadline, body}, now),
    do: Protocol.request_frame(id, left(deadline, now), body)

  defp write(%__MODULE__{port: process} = send_queue, frame) when is_pid(process) do
    send(process, {self(), {:command, frame}})
    send_queue
  end

  # port_command without :nosuspend, Port.command and send/2 would suspend the bridge as long as the peer does not read.
  # A port that has just died raises, for this frame and all after it; the message about its death is on its way, and
  # they go to the next peer.
  defp write(%__MODULE__{port: port} = send_queue, frame) do
    if :erlang.port_command(port, frame, [:nosuspend]),
      do: send_queue,
      else: %{send_queue | writer: start_writer(port, frame)}
  rescue
    ArgumentError -> :port_gone
  end

  # Writing needs no ownership of the port.
  defp start_writer(port, frame), do: spawn_monitor(fn -> write_waiting(port, frame) end)

  defp write_waiting(port, frame) do
    Port.command(port, frame)
  rescue
    # The port died under the write.
    ArgumentError -> :ok
  end

  # The peer takes no timeout of 0. The caller of a request whose time is over cancels it at any moment.
  defp left(:infinity, _now), do: :infinity
  defp left(deadline, now), do: max(deadline - now, 1)
end
