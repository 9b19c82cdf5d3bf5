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
    %{
      state: state.status,
      os_pid: state.peer && state.peer.os_pid,
      pending: Traffic.pending(state.traffic),
      restarts: max(state.opened - 1, 0),
      uptime_ms: if(state.peer, do: Peer.uptime_ms(state.peer), else: 0),
      late_replies: state.late_replies,
      unreadable_frames: state.unreadable_frames,
      last_error: state.last_error
    }
  end

  @doc "Logs the present peer's death (or that there is none), and what is done about it."
  @spec death(%Server{}, Logger.level(), String.t()) :: :ok
  def death(state, level, next),
    do: log(state, level, "#{what_happened(state)}: #{state.last_error}; #{next}")

  @doc "Logs a text, with the bridge's name and the peer's number before it."
  @spec log(%Server{}, Logger.level(), String.t()) :: :ok
  def log(state, level, text) do
    os_pid = if state.peer, do: state.peer.os_pid, else: "none"
    Logger.log(level, "bridge #{state.label}, Python process #{os_pid}: #{text}")
  end

  defp what_happened(%{peer: nil}), do: "not started"
  defp what_happened(%{peer: %{up_at: nil}}), do: "died before it was up"
  defp what_happened(_state), do: "died"
end
