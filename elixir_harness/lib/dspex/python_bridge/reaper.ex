defmodule DSPex.PythonBridge.Reaper do
  @moduledoc """
  Sees to it that no Python process outlives its bridge.

  Closing a port only closes pipes: a peer that ignores end of input, hangs, or has a full pipe
  stays. So each bridge has a reaper: a process without links, which therefore survives the
  bridge however that ends, and kills by OS pid what is left after a grace.

  A pid may have been given to another process meanwhile: the start time in `/proc/PID/stat` must
  still be the one that was seen at the beginning. A peer is the leader of its own process group
  (the runtime's forker makes it so), and the whole group is killed, with what the peer started;
  also when the peer itself is gone, since a group's number is not reused while it has members.
  Without `/proc` the pid alone has to do.
  """

  # A peer that behaves is gone in a few milliseconds after end of input. The promise is 1 s; on a
  # loaded machine the killing itself takes some of that.
  @grace_ms 700

  @doc "Starts the reaper of the process `owner`."
  @spec start(pid()) :: pid()
  def start(owner) do
    spawn(fn ->
      Process.set_label({__MODULE__, owner})
      loop(Process.monitor(owner), %{})
    end)
  end

  @doc "Tells of a peer to watch over."
  @spec watch(pid(), pos_integer() | nil) :: :ok
  def watch(_reaper, nil), do: :ok
  def watch(reaper, os_pid), do: tell(reaper, {:watch, os_pid})

  @doc "Ends a peer now, with all that it started."
  @spec kill(pid(), pos_integer() | nil) :: :ok
  def kill(_reaper, nil), do: :ok
  def kill(reaper, os_pid), do: tell(reaper, {:kill, os_pid})

  @doc """
  As `kill/2`, and waits until it is done: some milliseconds, at most a second.
  """
  @spec kill_and_wait(pid(), pos_integer() | nil) :: :ok
  def kill_and_wait(_reaper, nil), do: :ok

  def kill_and_wait(reaper, os_pid) do
    done = Process.monitor(reaper, alias: :reply_demonitor)
    send(reaper, {:kill, os_pid, done})

    receive do
      {^done, :killed} -> :ok
      {:DOWN, ^done, :process, _pid, _reason} -> :ok
    after
      1_000 -> :ok
    end
  end

  @doc """
  When the process started, in the kernel's ticks; nil if there is no such process, or no `/proc`.
  """
  @spec start_time(pos_integer()) :: String.t() | nil
  def start_time(os_pid) do
    with {:ok, stat} <- File.read("/proc/#{os_pid}/stat") do
      # The second field is the program's name in brackets and may hold anything; the start time
      # is field 22, the 20th after it.
      stat |> String.split(")") |> List.last() |> String.split() |> Enum.at(19)
    else
      {:error, _reason} -> nil
    end
  end

  @doc """
  Kills the process group of `os_pid`, or the process alone where it has none of its own, if it
  is still the process that started at `start_time`. Takes some milliseconds.
  """
  @spec kill_if(pos_integer(), String.t() | nil) :: :ok
  def kill_if(os_pid, start_time) do
    if start_time(os_pid) in [start_time, nil] do
      # The shell's own kill: a program of that name is not everywhere.
      script = "kill -9 -#{os_pid} 2>/dev/null || kill -9 #{os_pid} 2>/dev/null"
      System.cmd("/bin/sh", ["-c", script])
    end

    :ok
  end

  defp tell(reaper, message) do
    send(reaper, message)
    :ok
  end

  defp loop(owner, peers) do
    receive do
      {:watch, os_pid} ->
        loop(owner, Map.put(peers, os_pid, start_time(os_pid)))

      {:kill, os_pid} ->
        loop(owner, end_peer(peers, os_pid))

      {:kill, os_pid, done} ->
        peers = end_peer(peers, os_pid)
        send(done, {done, :killed})
        loop(owner, peers)

      {:DOWN, ^owner, :process, _pid, _reason} ->
        Process.sleep(@grace_ms)
        Enum.each(peers, fn {os_pid, started} -> kill_if(os_pid, started) end)

      _other ->
        loop(owner, peers)
    end
  end

  defp end_peer(peers, os_pid) do
    {started, peers} = Map.pop(peers, os_pid)
    kill_if(os_pid, started)
    peers
  end
end
