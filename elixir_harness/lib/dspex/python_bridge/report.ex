defmodule DSPex.PythonBridge.Report do
  @moduledoc """
  What a bridge tells of itself, to those who ask and to the log: how it is, never what passes
  through it.
  """

  require Logger

  alias DSPex.PythonBridge.{Bridge, Peer, Server, Traffic}

  @doc "For `DSPex.PythonBridge.Bridge.get_status/1`."
  @spec status(%Server{}) :: Bridge.status()
  def status(state) do
    peer = state.peer || state.next

    %{
      # One that ends still has its peer, until it is answered.
      state: if(state.status == :stopping, do: :running, else: state.status),
      os_pid: peer && peer.os_pid,
      pending: Traffic.pending(state.traffic),
      restarts: max(state.opened - 1, 0),
      uptime_ms: if(peer, do: Peer.uptime_ms(peer), else: 0),
      late_replies: state.late_replies,
      unreadable_frames: state.unreadable_frames,
      last_error: state.last_error
    }
  end

  @doc "Logs a peer's death, or that there is none, and what is done about it."
  @spec death(%Server{}, Peer.t() | nil, Logger.level(), String.t(), String.t()) :: :ok
  def death(state, peer, level, why, next),
    do: log(state, peer, level, "#{what_happened(peer)}: #{why}; #{next}")

  @doc "Logs a text, with the bridge's name and the peer's number before it."
  @spec log(%Server{}, Peer.t() | nil, Logger.level(), String.t()) :: :ok
  def log(state, peer, level, text) do
    os_pid = if peer, do: peer.os_pid, else: "none"
    Logger.log(level, "bridge #{state.label}, Python process #{os_pid}: #{text}")
  end

  defp what_happened(nil), do: "not started"
  defp what_happened(%Peer{up_at: nil}), do: "died before it was up"
  defp what_happened(_peer), do: "died"
end
