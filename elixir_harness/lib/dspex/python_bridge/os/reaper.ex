defmodule DSPex.PythonBridge.OS.Reaper do
  @moduledoc false
  # Kills the Python processes that outlive their bridge, and notices those that die.
  #
  # Closing a port only closes pipes: a peer that ignores the end of its input, hangs, or has a full pipe stays. So each
  # bridge has a reaper: a process without links, which survives the bridge however that ends, and kills by OS pid what is
  # left after a grace period.
  #
  # A peer is the leader of its own process group (the runtime's forker makes it so). The whole group is killed, with what
  # the peer started, also when the peer itself is gone.
  #
  # The runtime reports a peer's death only when nobody has its standard output open any more, and a child that the peer
  # forked may. So the reaper looks whether the peer is there, and sends its owner `{:peer_gone, os_pid}` once if not.

  use GenServer

  alias DSPex.PythonBridge.OS
  alias DSPex.PythonBridge.OTP.{Ask, Deadline, Registry}

  # A peer usually ends a few milliseconds after the end of its input. The promise is 1 s; on a loaded machine the kill
  # itself takes a part of that.
  @grace_ms 700
  # The same for a bridge that ends in order and waits for it: less, since its supervisor waits, too.
  @finish_grace_ms 600
  @finish_poll_ms 5
  # Without /proc each look starts a process.
  @look_ms 100
  @costly_look_ms 1_000
  # The peer counts as gone after the second look: by then the runtime's own message, which has the exit status, has come,
  # if it comes at all.
  @looks 2

  # peers: the start time of each OS pid, and how many looks did not find it.
  @enforce_keys [:owner, :monitor, :look_ms]
  defstruct [:owner, :monitor, :look_ms, peers: %{}]

  @doc "Starts the reaper of the process `owner`. The caller gets a `:DOWN` of it, as `owner` needs another then."
  @spec start(pid()) :: pid()
  def start(owner) do
    {:ok, pid} = GenServer.start(__MODULE__, owner)
    Process.monitor(pid)
    pid
  end

  @doc "Adds a peer. A transport in the place of a port has no OS process."
  @spec watch(pid(), pos_integer() | nil) :: :ok
  def watch(_reaper, nil), do: :ok
  def watch(reaper, os_pid), do: tell(reaper, {:watch, os_pid})

  @doc "Kills a peer now, with all that it started."
  @spec kill(pid(), pos_integer() | nil) :: :ok
  def kill(reaper, os_pid), do: tell(reaper, {:kill, os_pid})

  @doc """
  Kills what is left of a peer and of what it started, 0.7 s from now: its input was closed, and it may end by itself.
  """
  @spec retire(pid(), pos_integer() | nil) :: :ok
  def retire(reaper, os_pid) do
    Process.send_after(reaper, {:kill, os_pid}, @grace_ms)
    :ok
  end

  defp tell(reaper, message) do
    send(reaper, message)
    :ok
  end

  @doc """
  Waits for the peers to end, at most 600 ms, then kills what is left of them and of what they started. A bridge that ends
  in order calls it after it has closed its port: when the BEAM stops, it is the last moment.
  """
  @spec finish(pid()) :: :ok
  def finish(reaper) do
    Ask.ask(reaper, @finish_grace_ms + 1_000, &{:end_all, &1})
    :ok
  end

  ## The process

  @impl GenServer
  def init(owner) do
    Process.set_label({__MODULE__, owner})
    # An application that stops kills all processes with its group leader.
    Process.group_leader(self(), Process.whereis(:init))
    look_ms = if OS.Process.cheap?(), do: @look_ms, else: @costly_look_ms
    {:ok, %__MODULE__{owner: owner, monitor: Process.monitor(owner), look_ms: look_ms}}
  end

  @impl GenServer
  def handle_info({:watch, os_pid}, state),
    do: noreply(put_in(state.peers[os_pid], {OS.Process.start_time(os_pid), 0}))

  # Only its own peers: any process can send a number.
  def handle_info({:kill, os_pid}, state) do
    {killed, left} = Map.split(state.peers, [os_pid])
    kill_groups(killed)
    noreply(%{state | peers: left})
  end

  def handle_info({:end_all, ref}, state) do
    state = end_peers(state, @finish_grace_ms)
    send(ref, {ref, :done})
    noreply(state)
  end

  def handle_info({:DOWN, monitor, :process, _pid, _reason}, %{monitor: monitor} = state) do
    # A bridge that was killed has not done so itself.
    Registry.delete(:bridge, state.owner)
    {:stop, :normal, end_peers(state, @grace_ms)}
  end

  def handle_info(:timeout, state),
    do: noreply(%{state | peers: Map.new(state.peers, &look(&1, state.owner))})

  def handle_info(_not_for_it, state), do: noreply(state)

  defp noreply(%{peers: peers} = state) when peers == %{}, do: {:noreply, state}
  defp noreply(state), do: {:noreply, state, state.look_ms}

  defp look({os_pid, {started, missed}}, owner) do
    missed = if OS.Process.gone?(os_pid, started), do: missed + 1, else: 0
    if missed == @looks, do: send(owner, {:peer_gone, os_pid})
    {os_pid, {started, missed}}
  end

  defp end_peers(state, grace) do
    wait_until_gone(state.peers, Deadline.new(grace))
    kill_groups(state.peers)
    %{state | peers: %{}}
  end

  defp wait_until_gone(peers, deadline) do
    gone? = Enum.all?(peers, fn {os_pid, {started, _}} -> OS.Process.gone?(os_pid, started) end)

    if not gone? and Deadline.left(deadline) > 0 do
      Process.sleep(@finish_poll_ms)
      wait_until_gone(peers, deadline)
    end
  end

  defp kill_groups(peers),
    do: Enum.each(peers, fn {os_pid, {started, _}} -> OS.Process.kill_group(os_pid, started) end)
end
