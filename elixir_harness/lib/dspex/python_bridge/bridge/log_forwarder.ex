defmodule DSPex.PythonBridge.Bridge.LogForwarder do
  @moduledoc false
  # The process that logs the records of a bridge's peers with Logger.
  #
  # Records come as frames (`DSPY_BRIDGE_LOG_FRAMES`). Decoding takes time, and an overloaded Logger blocks any process that
  # logs, so the bridge only sends a frame here. While too many wait it drops frames, and the number of dropped ones is
  # logged.

  # A GenServer waits in OTP's code: a loop of its own would be killed when this module is loaded a second time.
  use GenServer

  require Logger

  alias DSPex.PythonBridge.Protocol

  # Of one message; a traceback has a few thousand.
  @max_bytes 65_536
  # The number that the peer keeps when nobody reads its standard error.
  @most_waiting 1_000

  @enforce_keys [:pid]
  defstruct [:pid, dropped: 0]

  @type t :: %__MODULE__{pid: pid(), dropped: non_neg_integer()}
  @typedoc "The bridge's name, or its pid if it has none."
  @type bridge :: GenServer.name() | pid()

  @doc "Starts it for the calling process, a bridge. It ends after the bridge, when all is logged."
  @spec start(bridge()) :: t()
  def start(bridge) do
    {:ok, pid} = GenServer.start(__MODULE__, {bridge, self()})
    %__MODULE__{pid: pid}
  end

  @doc "Forwards a frame of the peer with this OS pid. It never blocks."
  @spec take(t(), binary(), pos_integer() | nil) :: t()
  def take(%__MODULE__{pid: pid, dropped: dropped} = log, frame, os_pid) do
    case Process.info(pid, :message_queue_len) do
      {_length, waiting} when waiting < @most_waiting ->
        send(pid, {:record, os_pid, frame, dropped})
        %{log | dropped: 0}

      _many_or_gone ->
        %{log | dropped: dropped + 1}
    end
  end

  ## The process

  @impl GenServer
  def init({bridge, owner}) do
    Process.set_label({__MODULE__, bridge})
    {:ok, %{bridge: bridge, owner: Process.monitor(owner)}}
  end

  @impl GenServer
  def handle_info({:record, os_pid, frame, dropped}, state) do
    report(state.bridge, dropped)

    case Protocol.decode_log(frame) do
      {:ok, level, message, metadata} ->
        Logger.log(
          level,
          String.byte_slice(message, 0, @max_bytes),
          [bridge: state.bridge, os_pid: os_pid] ++ metadata
        )

      {:error, _reason} ->
        report(state.bridge, 1)
    end

    {:noreply, state}
  end

  # After all that the bridge has sent.
  def handle_info({:DOWN, owner, :process, _pid, _reason}, %{owner: owner} = state),
    do: {:stop, :normal, state}

  defp report(_bridge, 0), do: :ok

  defp report(bridge, dropped) do
    text = "log records of the Python process dropped: #{dropped}, too many or unreadable"
    Logger.warning("bridge #{inspect(bridge)}: #{text}", bridge: bridge)
  end
end
