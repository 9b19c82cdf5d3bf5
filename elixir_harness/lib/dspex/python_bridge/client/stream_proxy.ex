defmodule DSPex.PythonBridge.Client.StreamProxy do
  @moduledoc false
  # The process between a bridge and a caller that takes chunks or has given tools: one for each such call, which makes it in the
  # caller's place, at one peer of a pool after the other.
  #
  # What comes before the reply waits here, and not in the caller's mailbox, until the caller asks for it: the caller
  # may have a full mailbox, be busy with something else, or never come back. Tools run
  # (`DSPex.PythonBridge.Tools.Runner`) whatever the caller does meanwhile, and also between two peers.
  #
  # It ends when the caller stops it, with the tools, or with the caller; the bridge, which monitors it as any caller, then
  # cancels the call. It uses no links, which a function may remove, or survive by trapping exits.

  alias DSPex.PythonBridge.Calls.{Journal, Request}
  alias DSPex.PythonBridge.OTP.{Ask, Deadline, ServerGuard}
  alias DSPex.PythonBridge.Tools.{Answer, Runner}

  # A queue as a default would be a literal, which Dialyzer does not take for a queue.
  @enforce_keys [:watch, :tools, :chunks, :keeper]
  defstruct @enforce_keys ++ [:journal, :dest, :ref, :timer, :asked, :reply, :ended]

  # watch: the monitor of the caller. journal: nil before the first peer, and without one. asked: the caller's alias, while it
  # waits. reply: for the caller, after the chunks. ended: why the run has ended without its peer, nil until then.
  @typep t :: %__MODULE__{
           watch: reference(),
           tools: Runner.t(),
           chunks: :queue.queue(binary()),
           keeper: keeper(),
           journal: Journal.t() | nil,
           dest: pid() | {atom(), node()} | nil,
           ref: reference() | nil,
           timer: reference() | nil,
           asked: reference() | nil,
           reply: Request.reply() | nil,
           ended: String.t() | nil
         }

  @typedoc """
  Of a run that is stored. Its functions are called in this process; if one raises, or returns `{:error, reason}`, the run ends.

    * `on_journal` – called with each entry of the run's journal, as the peer has written it, before anything is done that
      follows from it: a tool call, a chunk, the reply
    * `on_killed` – called when a tool's process has ended without an answer, with the error message that the peer gets next
    * `run_id` – what the call keys of its tools are made from
  """
  @type keeper :: %{
          optional(:on_journal) => (binary() -> term()),
          optional(:on_killed) => (pid(), String.t() -> term()),
          optional(:run_id) => binary()
        }

  ## In the caller's process

  @doc """
  Starts it for the calling process, with the functions of its call and what the events of these have.
  """
  @spec start(Runner.tools(), Runner.about(), keeper()) :: pid()
  def start(tools, about, keeper \\ %{}) do
    caller = self()
    # `$callers`, so that Mox and the Ecto sandbox find the test process.
    callers = [caller | Process.get(:"$callers", [])]

    spawn(fn ->
      ServerGuard.run(fn ->
        # Else a node that hangs would suspend this process.
        :erlang.process_flag(:async_dist, true)
        watch = Process.monitor(caller)
        run_id = keeper[:run_id] || :crypto.strong_rand_bytes(16)
        tools = Runner.new(tools, about, callers, run_id)
        loop(%__MODULE__{watch: watch, tools: tools, chunks: :queue.new(), keeper: keeper})
      end)
    end)
  end

  @doc "Makes the call at a bridge, the first or, after a reply of the one before, the next one."
  @spec make(pid(), pid() | {atom(), node()}, Deadline.t(), Request.t()) :: :ok
  def make(proxy, dest, deadline, request) do
    send(proxy, {:make, dest, deadline, request})
    :ok
  end

  @doc """
  Waits for the frame of the next chunk, or for the reply, which comes within the deadline. `bound?`: whether a tool has begun
  that must not be called again.
  """
  @spec next(pid()) :: {:chunk, binary()} | {:over, Request.reply(), bound? :: boolean()}
  def next(proxy) do
    case Ask.ask(proxy, :infinity, &{:next, &1}) do
      {:ok, element} -> element
      :down -> {:over, {:error, :proxy_died}, true}
    end
  end

  @doc "Ends it, and the tools before this returns: once the caller has the result, no tool starts anything."
  @spec stop(pid()) :: :ok
  def stop(proxy) do
    Ask.ask(proxy, :infinity, &{:stop, &1})
    :ok
  end

  ## The process

  @spec loop(t()) :: :ok
  defp loop(%__MODULE__{ref: ref, timer: timer, watch: watch, tools: tools} = state) do
    receive do
      {^ref, :chunk, frame} ->
        hand_out(%{state | chunks: :queue.in(frame, state.chunks)})

      {^ref, :journal, entry} ->
        journaled(state, entry)

      {^ref, :tool_call, invocation} ->
        loop(%{state | tools: Runner.run(tools, invocation)})

      {^ref, reply} ->
        over(state, reply)

      {:DOWN, ^ref, :process, _bridge, _reason} ->
        over(state, {:error, :bridge_not_running})

      # Chunks that wait only count with a reply behind them: the caller's time is over.
      {:timeout, ^timer, :deadline} ->
        Runner.stop(tools)
        if state.reply, do: loop(state), else: timed_out(state)

      {:next, asked} ->
        hand_out(%{state | asked: asked})

      {:fetch, pid, asked, name, digest} ->
        loop(%{state | tools: Runner.fetch(tools, pid, asked, name, digest)})

      {:answered, _pid, _call, {:end_run, text}} ->
        end_run(state, text)

      {:answered, pid, call, answer} ->
        loop(%{state | tools: Runner.answered(tools, pid, call, answer)})

      {claim, answer} when is_map_key(tools.claims, claim) ->
        loop(%{state | tools: Runner.confirmed(tools, claim, answer)})

      {:DOWN, ^watch, :process, _caller, _reason} ->
        Runner.stop(tools)

      {:DOWN, _monitor, :process, pid, reason} ->
        tool_ended(state, pid, reason)

      {:make, dest, deadline, request} ->
        made(state, dest, deadline, request)

      {:stop, asked} ->
        Runner.stop(tools)
        send(asked, {asked, :ok})
        :ok

      _too_late ->
        loop(state)
    end
  end

  # A tool has ended the run between two peers.
  defp made(%__MODULE__{ended: why} = state, _dest, _deadline, _request) when why != nil,
    do: hand_out(%{state | reply: {:error, {:ended, why}}})

  defp made(%__MODULE__{tools: tools} = state, dest, deadline, request) do
    if state.timer, do: :erlang.cancel_timer(state.timer)
    # One alias for all messages: :reply_demonitor would end with the first.
    ref = :erlang.monitor(:process, dest, alias: :demonitor)
    left = Deadline.left(deadline)
    timer = if left != :infinity, do: :erlang.start_timer(left, self(), :deadline)
    # What the peers before have sent.
    journal = request.journal && (state.journal || request.journal)
    request = %{request | ref: ref, pid: self(), timeout: left, journal: journal}
    send(dest, {:request, %{request | tools?: tools.tools != %{}}})
    state = %{state | dest: dest, ref: ref, timer: timer, reply: nil, journal: journal}
    # Also at the same peer the run begins anew.
    loop(%{state | tools: %{tools | dest: dest, port: nil}})
  end

  defp journaled(%__MODULE__{keeper: keeper, journal: journal} = state, entry) do
    case kept(keeper[:on_journal], [entry]) do
      {{:error, text}, _how} ->
        end_run(state, "an answer of the LM could not be kept: #{text}")

      _kept ->
        loop(%{state | journal: journal && Journal.add(journal, entry)})
    end
  end

  # Most have answered, and say so by their end alone.
  defp tool_ended(%__MODULE__{tools: tools, keeper: keeper} = state, pid, reason) do
    on_killed = if is_map_key(tools.users, pid), do: keeper[:on_killed]

    case kept(on_killed, [pid, Answer.ended(reason)]) do
      {{:error, text}, _how} -> end_run(state, text)
      _kept -> loop(%{state | tools: Runner.ended(tools, pid, reason)})
    end
  end

  defp kept(function, args), do: function && Answer.of(fn -> apply(function, args) end)

  defp end_run(state, why) do
    Runner.stop(state.tools)
    state = %{state | ended: why}

    if state.ref do
      send(state.dest, {:abandon, state.ref})
      over(state, {:error, {:ended, why}})
    else
      loop(state)
    end
  end

  defp timed_out(state) do
    send(state.dest, {:abandon, state.ref})
    over(%{state | chunks: :queue.new()}, {:error, :timeout})
  end

  defp over(state, reply) do
    Process.demonitor(state.ref, [:flush])
    # What else it has sent is not read any more.
    hand_out(%{state | reply: reply, ref: nil})
  end

  defp hand_out(%__MODULE__{asked: nil} = state), do: loop(state)

  defp hand_out(%__MODULE__{asked: asked, reply: reply} = state) do
    case :queue.out(state.chunks) do
      {{:value, frame}, chunks} ->
        send(asked, {asked, {:chunk, frame}})
        loop(%{state | asked: nil, chunks: chunks})

      {:empty, _chunks} when reply != nil ->
        send(asked, {asked, {:over, reply, state.tools.bound?}})
        loop(%{state | asked: nil})

      {:empty, _chunks} ->
        loop(state)
    end
  end
end
