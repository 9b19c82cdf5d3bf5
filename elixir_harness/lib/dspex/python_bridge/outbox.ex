defmodule DSPex.PythonBridge.Outbox do
  @moduledoc """
  What is on its way to the peer. It never blocks the process that uses it: a frame that the pipe
  has no room for is written by a helper process, which the runtime suspends until there is room,
  and all later frames queue behind it.

  While the peer is not up, the outbox is held: everything queues. What is in the queue has not
  been written, so it can still be taken back (`drop/2`) and outlives the peer (`detach/1`). What
  the helper holds counts as written, since some of its bytes may be.

  Keys must grow: they are the order.
  """

  alias DSPex.PythonBridge.Protocol

  defstruct port: nil, held?: true, writer: nil, queue: :gb_trees.empty()

  @typep item ::
           {:request, deadline :: integer() | :infinity, body :: binary()} | {:control, iodata()}
  @opaque t :: %__MODULE__{
            port: port() | nil,
            held?: boolean(),
            writer: {pid(), reference()} | nil,
            queue: :gb_trees.tree(pos_integer(), item())
          }

  @doc "An empty outbox without a port, held."
  @spec new() :: t()
  def new, do: %__MODULE__{}

  @doc "Takes a port; stays held."
  @spec attach(t(), port()) :: t()
  def attach(%__MODULE__{} = outbox, port),
    do: %{outbox | port: port, held?: true, writer: nil}

  @doc "Starts to write: first what has queued up."
  @spec release(t()) :: t()
  def release(%__MODULE__{} = outbox), do: drain(%{outbox | held?: false})

  @doc """
  Lets the port go. Requests that were not written stay; control frames were meant for the peer
  that is gone.
  """
  @spec detach(t()) :: t()
  def detach(%__MODULE__{} = outbox) do
    with {pid, monitor} <- outbox.writer do
      Process.demonitor(monitor, [:flush])
      Process.exit(pid, :kill)
    end

    requests = for {_key, {:request, _, _}} = entry <- :gb_trees.to_list(outbox.queue), do: entry
    %__MODULE__{queue: :gb_trees.from_orddict(requests)}
  end

  @doc "Sends a request, or queues it. `timeout` is what is left of the caller's, in ms."
  @spec push_request(t(), pos_integer(), timeout(), binary()) :: t()
  def push_request(%__MODULE__{} = outbox, id, timeout, body) do
    with true <- idle?(outbox),
         %__MODULE__{} = outbox <- write(outbox, Protocol.request_frame(id, timeout, body)) do
      outbox
    else
      _not_now -> queue(outbox, id, {:request, deadline(timeout), body})
    end
  end

  @doc "Sends a control frame, or queues it in its place."
  @spec push_control(t(), pos_integer(), iodata()) :: t()
  def push_control(%__MODULE__{} = outbox, key, frame) do
    with true <- idle?(outbox),
         %__MODULE__{} = outbox <- write(outbox, frame) do
      outbox
    else
      _not_now -> queue(outbox, key, {:control, frame})
    end
  end

  @doc "Sends a frame past the hold: the first ping of a peer, into an empty pipe."
  @spec push_now(t(), iodata()) :: t()
  def push_now(%__MODULE__{held?: true} = outbox, frame) do
    with :port_gone <- write(outbox, frame), do: outbox
  end

  @doc "Whether the frame of this key still waits to be written."
  @spec member?(t(), pos_integer()) :: boolean()
  def member?(%__MODULE__{queue: queue}, key), do: :gb_trees.is_defined(key, queue)

  @doc "Whether no frame waits to be written, bar what the helper holds."
  @spec empty?(t()) :: boolean()
  def empty?(%__MODULE__{queue: queue}), do: :gb_trees.is_empty(queue)

  @doc "Takes a frame back that still waits to be written."
  @spec drop(t(), pos_integer()) :: t()
  def drop(%__MODULE__{} = outbox, key),
    do: %{outbox | queue: :gb_trees.delete_any(key, outbox.queue)}

  @doc "Drops everything that waits."
  @spec clear(t()) :: t()
  def clear(%__MODULE__{} = outbox), do: %{outbox | queue: :gb_trees.empty()}

  @doc "To be told of every `:DOWN` of a process: after the helper's, the next frames are sent."
  @spec written(t(), reference()) :: t()
  def written(%__MODULE__{writer: {_pid, monitor}} = outbox, monitor),
    do: drain(%{outbox | writer: nil})

  def written(%__MODULE__{} = outbox, _monitor), do: outbox

  # The queue is empty whenever nobody holds it up: see drain/1.
  defp idle?(%__MODULE__{held?: held?, writer: writer}), do: not held? and writer == nil

  defp queue(outbox, key, item), do: %{outbox | queue: :gb_trees.insert(key, item, outbox.queue)}

  defp drain(%__MODULE__{} = outbox) do
    if idle?(outbox) and not :gb_trees.is_empty(outbox.queue) do
      {key, item, rest} = :gb_trees.take_smallest(outbox.queue)

      case write(outbox, frame(key, item)) do
        %__MODULE__{} = written -> drain(%{written | queue: rest})
        :port_gone -> outbox
      end
    else
      outbox
    end
  end

  defp frame(_key, {:control, frame}), do: frame
  defp frame(id, {:request, deadline, body}), do: Protocol.request_frame(id, left(deadline), body)

  # port_command without :nosuspend, Port.command and send/2 would suspend the bridge itself for as
  # long as the peer does not read. A port that has just died raises, for this frame and all after it;
  # the message about its death is on its way, and they are for the next peer.
  defp write(%__MODULE__{port: port} = outbox, frame) do
    if :erlang.port_command(port, frame, [:nosuspend]),
      do: outbox,
      else: %{outbox | writer: start_writer(port, frame)}
  rescue
    ArgumentError -> :port_gone
  end

  # Writing needs no ownership of the port.
  defp start_writer(port, frame) do
    spawn_monitor(fn ->
      try do
        Port.command(port, frame)
      rescue
        # The port died under the write.
        ArgumentError -> :ok
      end
    end)
  end

  defp deadline(:infinity), do: :infinity
  defp deadline(timeout), do: System.monotonic_time(:millisecond) + timeout

  # The peer takes no deadline of 0; one that has passed is cancelled by its caller at any moment.
  defp left(:infinity), do: :infinity
  defp left(deadline), do: max(deadline - System.monotonic_time(:millisecond), 1)
end
