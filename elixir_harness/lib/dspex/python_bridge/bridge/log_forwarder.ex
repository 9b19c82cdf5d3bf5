defmodule DSPex.PythonBridge.Bridge.LogForwarder do
  @moduledoc false
  # The process that logs the records of a bridge's peers with Logger. If it is killed, the bridge starts another
  # (`replace/1`).
  #
  # Records come as frames (`DSPY_BRIDGE_LOG_FRAMES`). Decoding takes time, and an overloaded Logger blocks any process that
  # logs, so the bridge only counts a frame and sends it here. Past a limit it drops frames, and the number of dropped
  # ones is logged.

  # A GenServer waits in OTP's code: a loop of its own would be killed when this module is loaded a second time.
  use GenServer
  use DSPex.PythonBridge.OTP.ServerGuard

  require Logger

  alias DSPex.PythonBridge.Protocol
  alias DSPex.PythonBridge.OTP.{Deadline, ServerGuard}

  # The number that the peer keeps when nobody reads its standard error.
  @max_waiting 1_000
  @max_waiting_bytes 8_000_000
  # Of one message; a traceback has a few thousand.
  @max_bytes 65_536
  # A frame of this size is collected at once.
  @big_bytes 1_000_000
  # Between two reports of dropped records.
  @report_ms 1_000

  # Indexes of the counters.
  @records 1
  @bytes 2
  @dropped 3

  @enforce_keys [:pid, :monitor, :counters, :bridge]
  defstruct @enforce_keys

  @type t :: %__MODULE__{
          pid: pid(),
          monitor: reference(),
          counters: :atomics.atomics_ref(),
          bridge: bridge()
        }
  @typedoc "The bridge's name, or its pid if it has none."
  @type bridge :: GenServer.name() | pid()

  @doc "Starts it for the calling process, a bridge. It ends after the bridge, when all is logged."
  @spec start(bridge()) :: t()
  def start(bridge) do
    counters = :atomics.new(3, [])
    {:ok, pid} = GenServer.start(__MODULE__, {bridge, self(), counters})
    monitor = Process.monitor(pid)
    %__MODULE__{pid: pid, monitor: monitor, counters: counters, bridge: bridge}
  end

  @doc "Starts another after one has ended; what that one had not logged counts as dropped."
  @spec replace(t()) :: t()
  def replace(%__MODULE__{counters: counters, bridge: bridge}) do
    log = start(bridge)
    lost = :atomics.get(counters, @records) + :atomics.get(counters, @dropped)
    :atomics.add(log.counters, @dropped, lost)
    if lost > 0, do: send(log.pid, :report)
    log
  end

  @doc "Forwards a frame of the peer with this OS pid. It never blocks."
  @spec take(t(), binary(), pos_integer() | nil) :: :ok
  def take(%__MODULE__{pid: pid, counters: counters}, frame, os_pid) do
    size = byte_size(frame)

    if room?(:atomics.get(counters, @records), :atomics.get(counters, @bytes), size) do
      :atomics.add(counters, @records, 1)
      :atomics.add(counters, @bytes, size)
      send(pid, {:record, os_pid, frame})
    else
      :atomics.add(counters, @dropped, 1)
    end

    :ok
  end

  # A single record may be as large as a frame.
  defp room?(0, _bytes, _size), do: true

  defp room?(records, bytes, size),
    do: records < @max_waiting and bytes + size <= @max_waiting_bytes

  ## The process

  # Records that are dropped while others wait are reported after the last of those.
  @impl GenServer
  def init({bridge, owner, counters}) do
    Process.set_label({__MODULE__, bridge})
    state = %{bridge: bridge, owner: Process.monitor(owner), counters: counters}
    {:ok, Map.put(state, :reported, Deadline.now() - @report_ms)}
  end

  @impl GenServer
  def handle_info({:record, os_pid, frame}, %{counters: counters} = state)
      when is_binary(frame) do
    size = byte_size(frame)
    log(Protocol.decode_log(frame), state.bridge, os_pid, counters)
    :atomics.sub(counters, @bytes, size)
    :atomics.sub(counters, @records, 1)
    if size >= @big_bytes, do: {:noreply, state, {:continue, :collect}}, else: noreply(state)
  end

  # After all that the bridge has sent.
  def handle_info({:DOWN, owner, :process, _pid, _reason}, %{owner: owner} = state) do
    report(state.bridge, state.counters)
    {:stop, :normal, state}
  end

  def handle_info(what, state) when what in [:timeout, :report], do: noreply(state)

  def handle_info(message, state) do
    ServerGuard.drop(message, __MODULE__)
    noreply(state)
  end

  # A callback of its own, in which the frame is garbage already.
  @impl GenServer
  def handle_continue(:collect, state) do
    :erlang.garbage_collect()
    noreply(state)
  end

  defp noreply(%{counters: counters} = state) do
    case patience(counters, state.reported) do
      0 ->
        report(state.bridge, counters)
        {:noreply, %{state | reported: Deadline.now()}}

      patience ->
        {:noreply, state, patience}
    end
  end

  defp patience(counters, reported) do
    if :atomics.get(counters, @dropped) == 0,
      do: :infinity,
      else: max(reported + @report_ms - Deadline.now(), 0)
  end

  defp log({:ok, level, message, metadata}, bridge, os_pid, _counters),
    do: Logger.log(level, cut(message), [bridge: bridge, os_pid: os_pid] ++ metadata)

  defp log({:error, _reason}, _bridge, _os_pid, counters),
    do: :atomics.add(counters, @dropped, 1)

  # A copy: a part would keep the whole message alive as long as a handler keeps it.
  defp cut(message) when byte_size(message) <= @max_bytes, do: message

  defp cut(message) do
    # Without the bytes of a character that is cut.
    part = message |> binary_part(0, @max_bytes) |> String.replace_invalid("")
    "#{part} … (cut: #{byte_size(message)} bytes)"
  end

  defp report(bridge, counters) do
    case :atomics.exchange(counters, @dropped, 0) do
      0 ->
        :ok

      dropped ->
        text = "log records of the Python process dropped: #{dropped}, too many or unreadable"
        Logger.warning("bridge #{inspect(bridge)}: #{text}", bridge: bridge)
    end
  end
end
