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
  #
  # The bridge inherits the table of peers if the reaper is killed, and starts another one with it: `replace/2`. The reaper
  # is a `GenServer`, which waits in OTP's code: a process that waits in a loop of its own would be killed when this module
  # is loaded for the second time.

  use GenServer

  alias DSPex.PythonBridge.OS
  alias DSPex.PythonBridge.OTP.{Ask, Deadline, Registry}

  # A peer usually ends a few milliseconds after the end of its input. The promise is 1 s; on a loaded machine the kill
  # itself takes a part of that.
  @grace_ms 700
  # The same for a bridge that ends in order and waits for it: less, since its supervisor waits, too.
  @finish_grace_ms 600
  @finish_poll_ms 5
  # A look takes 20 µs. The peer counts as gone after the second one: by then the runtime's own message, which has the
  # exit status, has come, if it comes at all.
  @look_ms 100
  # Without /proc each look starts a process.
  @costly_look_ms 1_000

  # peers: a table of OS pids with start times. missing: the peers that the last look did not find; reported: those of them
  # that the owner knows of.
  @enforce_keys [:owner, :monitor, :peers, :look_ms]
  defstruct [:owner, :monitor, :peers, :look_ms, missing: [], reported: []]

  @doc "Starts the reaper of the process `owner`."
  @spec start(pid()) :: pid()
  def start(owner), do: start(owner, [], [])

  @doc """
  Starts a reaper in place of one that was killed. The calling process is its owner, which got the table by
  `{:"ETS-TRANSFER", table, reaper, Reaper}`. `os_pids`: the peers that the owner has; all others in the table are ended.
  """
  @spec replace(:ets.tid(), [pos_integer() | nil]) :: pid()
  def replace(table, os_pids) do
    peers = :ets.tab2list(table)
    :ets.delete(table)
    start(self(), peers, os_pids)
  end

  defp start(owner, peers, os_pids) do
    {:ok, pid} = GenServer.start(__MODULE__, {owner, peers, os_pids})
    pid
  end

  @doc "Adds a peer."
  @spec watch(pid(), pos_integer() | nil) :: :ok
  def watch(_reaper, nil), do: :ok
  def watch(reaper, os_pid), do: cast(reaper, {:watch, os_pid})

  @doc "Kills a peer now, with all that it started."
  @spec kill(pid(), pos_integer() | nil) :: :ok
  def kill(_reaper, nil), do: :ok
  def kill(reaper, os_pid), do: cast(reaper, {:kill, os_pid})

  @doc """
  Kills what is left of a peer and of what it started, 0.7 s from now: its input was closed, and it may end by itself.
  """
  @spec retire(pid(), pos_integer() | nil) :: :ok
  def retire(_reaper, nil), do: :ok

  def retire(reaper, os_pid) do
    Process.send_after(reaper, {:kill, os_pid}, @grace_ms)
    :ok
  end

  @doc """
  Kills all peers now, with all that they started, and waits for that: some milliseconds, at most a second.
  """
  @spec kill_all(pid()) :: :ok
  def kill_all(reaper), do: ask(reaper, {:finish, 0}, 1_000)

  @doc """
  Waits for the peers to end, at most 600 ms, then kills what is left of them and of what they started. A bridge that ends
  in order calls it after it has closed its port: when the BEAM stops, it is the last moment.
  """
  @spec finish(pid()) :: :ok
  def finish(reaper), do: ask(reaper, {:finish, @finish_grace_ms}, @finish_grace_ms + 1_000)

  defp cast(reaper, message) do
    send(reaper, message)
    :ok
  end

  defp ask(reaper, question, timeout) do
    with :down <- Ask.ask(reaper, timeout, &{question, &1}) do
      # The table has come before the :DOWN message.
      receive do
        {:"ETS-TRANSFER", table, ^reaper, __MODULE__} ->
          table |> replace([]) |> ask(question, timeout)
      after
        0 -> :ok
      end
    end

    :ok
  end

  ## The process

  @impl GenServer
  def init({owner, peers, os_pids}) do
    Process.set_label({__MODULE__, owner})
    # An application that stops kills all processes with its group leader.
    Process.group_leader(self(), Process.whereis(:init))
    table = :ets.new(__MODULE__, [:private, {:heir, owner, __MODULE__}])
    :ets.insert(table, peers)
    for {os_pid, _started} <- peers, os_pid not in os_pids, do: retire(self(), os_pid)
    for os_pid <- os_pids, not :ets.member(table, os_pid), do: watch(self(), os_pid)
    look_ms = if OS.Process.cheap?(), do: @look_ms, else: @costly_look_ms
    monitor = Process.monitor(owner)
    noreply(%__MODULE__{owner: owner, monitor: monitor, peers: table, look_ms: look_ms}, :ok)
  end

  @impl GenServer
  def handle_info({:watch, os_pid}, state) when is_integer(os_pid) and os_pid > 0 do
    :ets.insert(state.peers, {os_pid, OS.Process.start_time(os_pid)})
    noreply(state)
  end

  # Only its own peers: any process can send a number.
  def handle_info({:kill, os_pid}, state) do
    kill_groups(:ets.take(state.peers, os_pid))
    noreply(state)
  end

  def handle_info({{:finish, grace}, done}, state)
      when grace in [0, @finish_grace_ms] and is_reference(done) do
    finish_all(state, grace)
    send(done, {done, :done})
    noreply(state)
  end

  def handle_info({:DOWN, monitor, :process, _pid, _reason}, %{monitor: monitor} = state) do
    # A bridge that was killed has not done so itself.
    Registry.delete(:bridge, state.owner)
    finish_all(state, @grace_ms)
    {:stop, :normal, state}
  end

  def handle_info(:timeout, state), do: noreply(look(state))

  def handle_info(_stray, state), do: noreply(state)

  defp noreply(state, how \\ :noreply) do
    if :ets.info(state.peers, :size) == 0,
      do: {how, state},
      else: {how, state, state.look_ms}
  end

  defp finish_all(state, grace) do
    peers = :ets.tab2list(state.peers)
    wait_until_gone(peers, Deadline.new(grace))
    kill_groups(peers)
    :ets.delete_all_objects(state.peers)
  end

  defp look(state) do
    peers = :ets.tab2list(state.peers)
    gone = for {os_pid, started} <- peers, OS.Process.gone?(os_pid, started), do: os_pid
    news = for os_pid <- gone, os_pid in state.missing, os_pid not in state.reported, do: os_pid
    Enum.each(news, &send(state.owner, {:peer_gone, &1}))
    %{state | missing: gone, reported: Enum.filter(state.reported ++ news, &(&1 in gone))}
  end

  defp wait_until_gone(peers, deadline) do
    unless Enum.all?(peers, fn {os_pid, started} -> OS.Process.gone?(os_pid, started) end) or
             Deadline.left(deadline) == 0 do
      Process.sleep(@finish_poll_ms)
      wait_until_gone(peers, deadline)
    end
  end

  defp kill_groups(peers),
    do: Enum.each(peers, fn {os_pid, started} -> OS.Process.kill_group(os_pid, started) end)
end
