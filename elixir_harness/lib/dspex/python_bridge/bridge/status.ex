defmodule DSPex.PythonBridge.Bridge.Status do
  @moduledoc """
  What a bridge tells of itself, to those who ask, to the log and by telemetry: how it is, never what
  passes through it.
  """

  require Logger

  alias DSPex.PythonBridge.{Bridge, Telemetry}
  alias DSPex.PythonBridge.Bridge.{Peer, State}
  alias DSPex.PythonBridge.Calls.InFlight

  @typedoc """
  Why a peer is no more: `:died` by itself; `:start_timeout`, no answer to its first ping, or, beside one that
  serves, to a program that it was given; `:unresponsive`, replaced by the monitor; `:replaced` by a restart;
  `:stopped` with the bridge; `:not_started`, it never was.
  """
  @type end_reason ::
          :died | :start_timeout | :unresponsive | :replaced | :stopped | :not_started

  @doc "For `DSPex.PythonBridge.Bridge.get_status/1`."
  @spec status(State.t()) :: Bridge.status()
  def status(state) do
    peer = state.peer || state.next

    %{
      # One that ends still has its peer, until it is answered.
      state: if(state.status == :stopping, do: :running, else: state.status),
      os_pid: peer && peer.os_pid,
      pending: InFlight.pending(state.in_flight),
      restarts: max(state.opened - 1, 0),
      uptime_ms: if(peer, do: Peer.uptime_ms(peer), else: 0),
      late_replies: state.late_replies,
      unreadable_frames: state.unreadable_frames,
      last_error: state.last_error
    }
  end

  @doc "Logs a peer's death, or that there is none, and what is done about it."
  @spec death(State.t(), Peer.t() | nil, Logger.level(), String.t(), String.t()) :: :ok
  def death(state, peer, level, why, next),
    do: log(state, peer, level, "#{what_happened(peer)}: #{why}; #{next}")

  @doc "Logs a text, with the bridge's name and the peer's number before it."
  @spec log(State.t(), Peer.t() | nil, Logger.level(), String.t()) :: :ok
  def log(state, peer, level, text) do
    os_pid = peer && peer.os_pid
    text = "bridge #{state.label}, Python process #{os_pid || "none"}: #{text}"
    Logger.log(level, text, bridge: State.name(state.options), os_pid: os_pid)
  end

  @doc "Tells that a peer has answered its first ping."
  @spec up(State.t(), Peer.t()) :: :ok
  def up(state, peer) do
    duration = System.convert_time_unit(Peer.uptime_ms(peer), :millisecond, :native)
    metadata = %{bridge: State.name(state.options), os_pid: peer.os_pid, reason: reason(state)}
    Telemetry.execute([:bridge, :peer, :up], %{duration: duration}, metadata)
  end

  # The first, or one that follows another.
  defp reason(%{opened: 1}), do: :start
  defp reason(_state), do: :restart

  @doc "Tells that a peer is no more, or (nil) that none could be started; `why`: more of the reason."
  @spec down(State.t(), Peer.t() | nil, end_reason(), String.t() | nil) :: :ok
  def down(state, peer, reason, why \\ nil) do
    uptime_ms = if peer, do: Peer.uptime_ms(peer), else: 0
    uptime = System.convert_time_unit(uptime_ms, :millisecond, :native)

    metadata = %{
      bridge: State.name(state.options),
      os_pid: peer && peer.os_pid,
      reason: reason,
      detail: why,
      was_up: peer != nil and peer.up_at != nil
    }

    Telemetry.execute([:bridge, :peer, :down], %{uptime: uptime}, metadata)
  end

  @doc "Tells of calls that are sent again, if there are any, after a peer's end."
  @spec resent(State.t(), non_neg_integer(), end_reason()) :: :ok
  def resent(_state, 0, _reason), do: :ok

  def resent(state, count, reason) do
    metadata = %{bridge: State.name(state.options), pool: nil, reason: reason}
    Telemetry.execute([:bridge, :resend], %{count: count}, metadata)
  end

  defp what_happened(nil), do: "not started"
  defp what_happened(%Peer{up_at: nil}), do: "died before it was up"
  defp what_happened(_peer), do: "died"
end
