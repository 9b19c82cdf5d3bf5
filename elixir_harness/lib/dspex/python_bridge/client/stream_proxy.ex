defmodule DSPex.PythonBridge.Client.StreamProxy do
  @moduledoc false
  # The process between a bridge and a caller that takes chunks, has given tools, or is on another node: one for each
  # such call, or for each peer that a pool tries with it, which makes the call in the caller's place.
  #
  # What comes before the reply waits here, and not in the caller's mailbox, until the caller asks for it: the caller
  # may have a full mailbox, be busy with something else, or never come back. Tools run
  # (`DSPex.PythonBridge.Tools.Runner`) whatever the caller does meanwhile.
  #
  # It ends with the reply, with the caller, or when the caller stops it; the bridge, which monitors it as any caller,
  # then cancels the call. It has no links.
  #
  # Tools end with the reply, before the caller gets it. After a reply to a pool's call with which that may try another
  # peer they go on, for the proxy of that one; or the caller closes the holder of the functions.

  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.OTP.{Ask, Deadline, ServerGuard}
  alias DSPex.PythonBridge.{Protocol, Tools}
  alias DSPex.PythonBridge.Tools.Invocation

  # The proxy times out first: it knows what has come.
  @grace_ms 50
  # The longest timeout of `receive`.
  @longest_ms 4_294_967_295

  # A queue as a default would be a literal, which Dialyzer does not take for a queue.
  @enforce_keys [:dest, :ref, :watch, :tools, :timer, :pool?, :chunks]
  defstruct [:dest, :ref, :watch, :tools, :timer, :pool?, :asked, :chunks] ++
              [again?: false, streamed?: false]

  @typedoc """
  The part of a prepared call that it needs to make it. `again?`: after an error the caller may make it again, whatever
  chunks it has been given.
  """
  @type call :: %{
          :dest => Invocation.bridge(),
          :deadline => Deadline.t(),
          :request => Request.t(),
          optional(:again?) => boolean(),
          optional(:args | :server) => term()
        }
  # watch: the monitor of the caller. pool?: whether the caller knows other peers. again?: as in the call. asked: the caller's alias, while it
  # waits.
  @typep t :: %__MODULE__{
           dest: Invocation.bridge(),
           ref: reference(),
           watch: reference(),
           tools: Tools.Runner.t(),
           timer: reference() | nil,
           pool?: boolean(),
           again?: boolean(),
           asked: reference() | nil,
           chunks: :queue.queue(binary()),
           streamed?: boolean()
         }

  ## In the caller's process

  @doc "Makes a call for the calling process. `holder`: of its functions (`DSPex.PythonBridge.Tools.FunctionHolder.open/1`)."
  @spec start(call(), holder :: pid() | nil) :: pid()
  def start(call, holder) do
    caller = self()
    # By these tests and repositories find the owner of a process.
    callers = [caller | Process.get(:"$callers", [])]
    tools = Tools.Runner.new(holder, call.dest, callers)
    # The arguments are in the body already: they would be copied for nothing.
    call = Map.drop(call, [:args, :server])
    spawn(fn -> ServerGuard.run(fn -> init(call, tools, caller) end) end)
  end

  @doc """
  Waits for the frame of the next chunk, or for the reply, after which nothing follows.

  The proxy keeps the time of the call. If it does not answer by the deadline, suspended by the connection to
  a node that hangs, for example, it is killed, and its tools with it.
  """
  @spec next(pid(), Deadline.t()) :: {:chunk, binary()} | {:over, Request.reply()}
  def next(proxy, deadline) do
    case Ask.ask(proxy, patience(Deadline.left(deadline)), &{:next, &1}) do
      {:ok, element} ->
        element

      :down ->
        {:over, {:error, :proxy_died}}

      {:timeout, _ref} ->
        stop(proxy)
        {:over, {:error, :timeout}}
    end
  end

  defp patience(:infinity), do: :infinity
  defp patience(left), do: min(left + @grace_ms, @longest_ms)

  @doc "Ends a proxy whose caller needs no more."
  @spec stop(pid()) :: :ok
  def stop(proxy) do
    # It may be suspended. The rest is done by the bridge and by the holder of the functions.
    Process.exit(proxy, :kill)
    :ok
  end

  ## The process

  defp init(%{dest: dest} = call, tools, caller) do
    # Its messages have the caller's contents.
    Process.flag(:sensitive, true)
    watch = Process.monitor(caller)
    # One alias for all messages: :reply_demonitor would end with the first.
    ref = :erlang.monitor(:process, dest, alias: :demonitor)
    left = Deadline.left(call.deadline)
    tools? = not Tools.Runner.none?(tools)
    request = %{call.request | ref: ref, pid: self(), timeout: left, tools?: tools?}
    timer = if left != :infinity, do: :erlang.start_timer(left, self(), :deadline)
    state = %{dest: dest, ref: ref, watch: watch, tools: tools, timer: timer}
    again? = Map.get(call, :again?, false)

    state =
      Map.merge(state, %{pool?: request.resend == :caller, again?: again?, chunks: :queue.new()})

    make(struct!(__MODULE__, state), request)
  end

  defp make(state, request) do
    case Tools.Runner.attend(state.tools) do
      :ok -> send_and_loop(state, request)
      :bound -> over(state, {:error, :tool_begun})
    end
  end

  defp send_and_loop(%__MODULE__{dest: dest} = state, request) do
    send(dest, {:request, request})
    loop(state)
  end

  @spec loop(t()) :: :ok
  defp loop(%__MODULE__{ref: ref, timer: timer, watch: watch} = state) do
    receive do
      {^ref, :chunk, frame} ->
        hand_out(keep_chunk(state, frame))

      {^ref, :tool_call, tool_call} ->
        loop(%{state | tools: Tools.Runner.run(state.tools, tool_call)})

      {^ref, reply} ->
        over(state, reply)

      {:DOWN, ^ref, :process, _bridge, _reason} ->
        over(state, {:error, :bridge_not_running})

      # Chunks that wait only count with a reply behind them: the caller's time is over.
      {:timeout, ^timer, :deadline} ->
        send(state.dest, {:abandon, ref})
        over(%{state | chunks: :queue.new()}, {:error, :timeout})

      {:next, asked} when is_reference(asked) ->
        hand_out(%{state | asked: asked})

      {:answered, pid, answer} ->
        loop(%{state | tools: Tools.Runner.answered(state.tools, pid, answer)})

      {:DOWN, ^watch, :process, _caller, _reason} ->
        Tools.Runner.stop(state.tools)

      {:DOWN, _monitor, :process, pid, reason} ->
        loop(%{state | tools: Tools.Runner.ended(state.tools, pid, reason)})

      # The timer was cancelled too late.
      {:timeout, _timer, :deadline} ->
        loop(state)

      _stray ->
        loop(state)
    end
  end

  # With the first one that cannot come again it is certain that the run is not sent again, unless its caller takes them
  # twice.
  defp keep_chunk(%__MODULE__{streamed?: streamed?, again?: again?} = state, frame) do
    first? = not streamed? and not again? and not Protocol.repeatable?(frame)
    if first?, do: Tools.Runner.bound(state.tools)
    %{state | streamed?: streamed? or first?, chunks: :queue.in(frame, state.chunks)}
  end

  defp hand_out(%__MODULE__{asked: nil} = state), do: loop(state)

  defp hand_out(%__MODULE__{asked: asked} = state) do
    case :queue.out(state.chunks) do
      {{:value, frame}, chunks} ->
        send(asked, {asked, {:chunk, frame}})
        loop(%{state | asked: nil, chunks: chunks})

      {:empty, _chunks} ->
        loop(state)
    end
  end

  # The tools end before the reply is sent: once the caller has it, no tool starts anything.
  defp over(state, reply) do
    Process.demonitor(state.ref, [:flush])
    chunks = :queue.to_list(state.chunks)

    if again?(state, reply) do
      hand_over(state, chunks, reply)
    else
      reply = with_tools_begun(Tools.Runner.stop(state.tools), reply)
      hand_over(%{state | timer: nil}, chunks, reply)
    end
  end

  # The errors with which a pool tries another peer, unless chunks were given.
  defp again?(%__MODULE__{again?: true}, reply), do: another_peer?(reply)
  defp again?(%__MODULE__{pool?: false}, _reply), do: false
  defp again?(%__MODULE__{streamed?: true}, _reply), do: false
  defp again?(%__MODULE__{}, reply), do: another_peer?(reply)

  defp another_peer?({:frame, frame}), do: not Protocol.success?(frame)
  defp another_peer?({:error, {:died, _sent}}), do: true

  defp another_peer?({:error, reason}),
    do: reason in [:bridge_not_running, :overloaded, :python_process_died, :replaced]

  # Else its caller might make the call again, and the tool's.
  defp with_tools_begun(:bound, {:error, :bridge_not_running}), do: {:error, :tool_begun}

  defp with_tools_begun(:bound, {:frame, frame} = reply),
    do: if(Protocol.success?(frame), do: reply, else: {:tools_begun, reply})

  defp with_tools_begun(_bound, reply), do: reply

  # Any other message is too late.
  defp hand_over(%__MODULE__{asked: nil, watch: watch, timer: timer} = state, chunks, reply) do
    receive do
      {:next, asked} when is_reference(asked) ->
        hand_over(%{state | asked: asked}, chunks, reply)

      {:DOWN, ^watch, :process, _caller, _reason} ->
        :ok

      # No other peer is tried any longer.
      {:timeout, ^timer, :deadline} ->
        Tools.Runner.stop(state.tools)
        hand_over(%{state | timer: nil}, chunks, reply)

      _stale ->
        hand_over(state, chunks, reply)
    end
  end

  defp hand_over(%__MODULE__{asked: asked} = state, [frame | chunks], reply) do
    send(asked, {asked, {:chunk, frame}})
    hand_over(%{state | asked: nil}, chunks, reply)
  end

  defp hand_over(%__MODULE__{asked: asked}, [], reply) do
    send(asked, {asked, {:over, reply}})
    :ok
  end
end
