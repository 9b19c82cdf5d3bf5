defmodule DSPex.PythonBridge.Reaper do
  @moduledoc """
  Sees to it that no Python process outlives its bridge, and that none dies unnoticed.

  Closing a port only closes pipes: a peer that ignores end of input, hangs, or has a full pipe
  stays. So each bridge has a reaper: a process without links, which therefore survives the
  bridge however that ends, and kills by OS pid what is left after a grace.

  A peer is the leader of its own process group (the runtime's forker makes it so), and the whole
  group is killed, with what the peer started; also when the peer itself is gone.

  The runtime tells of a peer's death only when nobody holds its standard output any more, and a
  child that the peer forked may. So the reaper also looks whether the peer is there (where there
  is a `/proc`) and sends its owner `{:peer_gone, os_pid}` once if not.
  """

  alias DSPex.PythonBridge.OsProcess

  # A peer that behaves is gone in a few milliseconds after end of input. The promise is 1 s; on a
  # loaded machine the killing itself takes some of that.
  @grace_ms 700
  # The same for a bridge that ends in order and waits for it: less, for its supervisor waits, too.
  @finish_grace_ms 600
  @finish_poll_ms 5
  # A look takes 20 µs. Only the second that finds the peer gone counts: the runtime's own message,
  # which says more, is then long there, if it comes at all.
  @look_ms 100

  # peers: OS pid => start time. missing: the peers found gone by the last look; told: the owner
  # knows.
  @enforce_keys [:owner, :monitor]
  defstruct [:owner, :monitor, peers: %{}, missing: [], told: []]

  @doc "Starts the reaper of the process `owner`."
  @spec start(pid()) :: pid()
  def start(owner) do
    spawn(fn ->
      Process.set_label({__MODULE__, owner})
      # An application that stops takes all processes along whose group leader is its own.
      Process.group_leader(self(), Process.whereis(:init))
      loop(%__MODULE__{owner: owner, monitor: Process.monitor(owner)})
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
  Ends a peer that was shown the end of its input and may leave by itself: what is left of it and of what
  it started 0.7 s later.
  """
  @spec retire(pid(), pos_integer() | nil) :: :ok
  def retire(_reaper, nil), do: :ok

  def retire(reaper, os_pid) do
    Process.send_after(reaper, {:kill, os_pid}, @grace_ms)
    :ok
  end

  @doc """
  Ends all peers now, with all that they started, and waits until it is done: some milliseconds, at
  most a second.
  """
  @spec kill_all(pid()) :: :ok
  def kill_all(reaper), do: ask(reaper, {:finish, 0}, 1_000)

  @doc """
  Waits for the peers to leave, at most 600 ms, then ends what is left of them and of what they
  started. To be called when a bridge ends in order and has closed its port: when the whole BEAM
  stops, there is no later moment.
  """
  @spec finish(pid()) :: :ok
  def finish(reaper), do: ask(reaper, {:finish, @finish_grace_ms}, @finish_grace_ms + 1_000)

  defp tell(reaper, message) do
    send(reaper, message)
    :ok
  end

  defp ask(reaper, question, timeout) do
    done = Process.monitor(reaper, alias: :reply_demonitor)
    send(reaper, {question, done})

    receive do
      {^done, :done} -> :ok
      {:DOWN, ^done, :process, _pid, _reason} -> :ok
    after
      timeout -> :ok
    end
  end

  ## The process

  defp loop(%{monitor: monitor} = state) do
    receive do
      {:watch, os_pid} ->
        loop(put_in(state.peers[os_pid], OsProcess.start_time(os_pid)))

      {:kill, os_pid} ->
        {started, peers} = Map.pop(state.peers, os_pid)
        OsProcess.kill_group(os_pid, started)
        loop(%{state | peers: peers})

      {{:finish, grace}, done} ->
        wait_until_gone(state.peers, now() + grace)
        kill_groups(state.peers)
        send(done, {done, :done})
        loop(%{state | peers: %{}})

      {:DOWN, ^monitor, :process, _pid, _reason} ->
        wait_until_gone(state.peers, now() + @grace_ms)
        kill_groups(state.peers)

      _other ->
        loop(state)
    after
      if(state.peers == %{}, do: :infinity, else: @look_ms) -> loop(look(state))
    end
  end

  defp look(state) do
    gone = for {os_pid, started} <- state.peers, OsProcess.gone?(os_pid, started), do: os_pid
    news = for os_pid <- gone, os_pid in state.missing, os_pid not in state.told, do: os_pid
    Enum.each(news, &send(state.owner, {:peer_gone, &1}))
    %{state | missing: gone, told: Enum.filter(state.told ++ news, &(&1 in gone))}
  end

  # Without /proc nothing is ever known to be gone, and the grace passes.
  defp wait_until_gone(peers, deadline) do
    unless Enum.all?(peers, fn {os_pid, started} -> OsProcess.gone?(os_pid, started) end) or
             now() >= deadline do
      Process.sleep(@finish_poll_ms)
      wait_until_gone(peers, deadline)
    end
  end

  defp kill_groups(peers),
    do: Enum.each(peers, fn {os_pid, started} -> OsProcess.kill_group(os_pid, started) end)

  defp now, do: System.monotonic_time(:millisecond)
end
