defmodule DSPex.PythonBridge.Bridge.Status do
  @moduledoc false
  # What a bridge reports of its state, to callers, in the log and by telemetry. It never has contents of requests or
  # replies.

  require Logger

  alias DSPex.PythonBridge.{Bridge, Programs, Telemetry}
  alias DSPex.PythonBridge.Bridge.{Peer, State}
  alias DSPex.PythonBridge.Calls.InFlight

  @typedoc """
  Why a peer has ended: `:died`, by itself; `:start_timeout`, it did not answer its first ping; `:unresponsive`, replaced by the monitor; `:replaced` by a restart;
  `:stopped` with the bridge; `:not_started`, it could not be started.
  """
  @type end_reason ::
          :died | :start_timeout | :unresponsive | :replaced | :stopped | :not_started

  @doc "The result of `DSPex.PythonBridge.Bridge.get_status/1`."
  @spec status(State.t()) :: Bridge.status()
  def status(state) do
    peer = state.peer || state.next

    %{
      # While a bridge ends, its peer still answers.
      state: if(state.status == :stopping, do: :running, else: state.status),
      os_pid: peer && peer.os_pid,
      pending: InFlight.pending(state.in_flight),
      restarts: max(state.opened - 1, 0),
      uptime_ms: if(peer, do: Peer.uptime_ms(peer), else: 0),
      late_replies: state.late_replies,
      unreadable_frames: state.unreadable_frames,
      last_error: state.last_error,
      programs: %{failed: failed(state.in_flight.programs, state.failed)}
    }
  end

  defp failed(programs, failures) do
    # They are few, and the programs may be many.
    definitions = if failures == %{}, do: [], else: Programs.Store.definitions(programs)
    errors = for {id, stamp, _body} <- definitions, error = failures[stamp], do: {id, error}

    for {id, error} <- Enum.concat(Programs.Store.undeclared(programs), errors),
        into: %{},
        do: {id, error.message}
  end

  @doc "Logs a peer's death, or that none could be started, and what the bridge does about it."
  @spec death(State.t(), Peer.t() | nil, Logger.level(), String.t(), String.t()) :: :ok
  def death(state, peer, level, why, next),
    do: log(state, peer, level, "#{what_happened(peer)}: #{why}; #{next}")

  @doc "Logs a line that starts with the bridge's name and the peer's OS pid."
  @spec log(State.t(), Peer.t() | nil, Logger.level(), String.t()) :: :ok
  def log(state, peer, level, text) do
    os_pid = peer && peer.os_pid
    bridge = State.name(state.options)
    text = "bridge #{inspect(bridge)}, Python process #{os_pid || "none"}: #{text}"
    Logger.log(level, text, bridge: bridge, os_pid: os_pid)
  end

  @doc "Emits the event of a peer that has answered its first ping."
  @spec up(State.t(), Peer.t()) :: :ok
  def up(state, peer) do
    # The first peer, or one that follows another.
    reason = if state.opened == 1, do: :start, else: :restart
    metadata = %{bridge: State.name(state.options), os_pid: peer.os_pid, reason: reason}
    Telemetry.execute([:bridge, :peer, :up], %{duration: uptime(peer)}, metadata)
  end

  @doc "Emits the event of a peer that has ended, or (nil) could not be started."
  @spec down(State.t(), Peer.t() | nil, end_reason(), detail :: String.t() | nil) :: :ok
  def down(state, peer, reason, detail \\ nil) do
    metadata = %{
      bridge: State.name(state.options),
      os_pid: peer && peer.os_pid,
      reason: reason,
      detail: detail,
      was_up: peer != nil and peer.up?
    }

    Telemetry.execute([:bridge, :peer, :down], %{uptime: uptime(peer)}, metadata)
  end

  @doc "Emits the event of calls that are sent again after a peer's end, if there are any."
  @spec resent(State.t(), non_neg_integer(), end_reason()) :: :ok
  def resent(_state, 0, _reason), do: :ok

  def resent(state, count, reason) do
    metadata = %{bridge: State.name(state.options), pool: nil, reason: reason}
    Telemetry.execute([:bridge, :resend], %{count: count}, metadata)
  end

  defp uptime(nil), do: 0
  defp uptime(peer), do: System.convert_time_unit(Peer.uptime_ms(peer), :millisecond, :native)

  defp what_happened(nil), do: "not started"
  defp what_happened(%Peer{up?: false}), do: "died before it was up"
  defp what_happened(_peer), do: "died"
end
