defmodule DSPex.PythonBridge.Client.StreamProxy do
  @moduledoc """
  The process between a bridge and a caller that takes chunks, or has given tools, or is not on the
  bridge's node: one for each such call, which it makes in the caller's place.

  What comes before the reply waits here until the caller asks for it, one at a time, and not in the
  caller's mailbox: the caller may have a full one, may be at work with something else, or never come
  back. Tools run (`DSPex.PythonBridge.Tools.Runner`) whatever the caller does meanwhile.

  It ends with the call's last word, or with the caller, or when the caller has enough; the bridge, which
  watches it as it does any caller, then cancels what is still under way. It is linked to nobody.
  """

  alias DSPex.PythonBridge.Tools
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Tools.Invocation

  # The proxy itself is to be late first: it knows what has come.
  @grace_ms 50
  # `receive` takes no longer timeout.
  @longest_ms 4_294_967_295

  # A queue as a default would be a literal, which Dialyzer takes for no queue.
  @enforce_keys [:dest, :ref, :watch, :tools, :timer, :chunks]
  defstruct [:dest, :ref, :watch, :tools, :timer, :asked, :chunks]

  @typedoc "What of a request it takes to make the call."
  @type call :: %{
          :dest => Caller.dest(),
          :deadline => Caller.deadline(),
          :body => binary(),
          :terms => DSPex.PythonBridge.Calls.InFlight.terms(),
          optional(:args) => map()
        }
  # watch: the monitor of the caller. asked: the caller's alias, while it waits.
  @typep t :: %__MODULE__{
           dest: Caller.dest(),
           ref: reference(),
           watch: reference(),
           tools: Tools.Runner.t(),
           timer: reference() | nil,
           asked: reference() | nil,
           chunks: :queue.queue(binary())
         }

  ## The caller's side

  @doc "Makes a call for the calling process."
  @spec start(call(), stream?: boolean(), tools: Tools.Runner.functions()) :: pid()
  def start(call, stream?: stream?, tools: functions) do
    caller = self()
    # What tests and repositories find a process's owner by.
    callers = [caller | Process.get(:"$callers", [])]
    tools = Tools.Runner.new(functions, call.dest, callers)
    # A copy of the arguments would be one too many: they are in the body.
    call = Map.delete(call, :args)
    spawn(fn -> ServerGuard.run(fn -> init(call, stream?, tools, caller) end) end)
  end

  @doc """
  Waits for the next chunk's frame, or else for what has come of the call: then nothing follows.

  The proxy keeps the time of the call. If it does not speak by the deadline, held up by the connection to
  a node that hangs, say, it is ended, and its tools with it.
  """
  @spec next(pid(), Caller.deadline()) :: {:chunk, binary()} | {:over, Caller.reply()}
  def next(proxy, deadline) do
    ref = :erlang.monitor(:process, proxy, alias: :reply_demonitor)
    send(proxy, {:next, ref})

    receive do
      {^ref, element} -> element
      {:DOWN, ^ref, :process, _proxy, _reason} -> {:over, {:error, :proxy_died}}
    after
      patience(Caller.left(deadline)) -> give_up(proxy, ref)
    end
  end

  defp patience(:infinity), do: :infinity
  defp patience(left), do: min(left + @grace_ms, @longest_ms)

  defp give_up(proxy, ref) do
    Process.demonitor(ref, [:flush])

    # It may have come between the two.
    receive do
      {^ref, element} -> element
    after
      0 ->
        stop(proxy)
        {:over, {:error, :timeout}}
    end
  end

  @doc "The caller has enough."
  @spec stop(pid()) :: :ok
  def stop(proxy) do
    # It may be held up. What is to follow is others' work: the bridge's, and the function holder's.
    Process.exit(proxy, :kill)
    :ok
  end

  ## The process

  defp init(%{dest: dest} = call, stream?, tools, caller) do
    # Its messages are the caller's contents.
    Process.flag(:sensitive, true)
    watch = Process.monitor(caller)
    Tools.Runner.attend(tools)
    # An alias for all that comes: :reply_demonitor would end with the first message.
    ref = :erlang.monitor(:process, dest, alias: :demonitor)
    left = Caller.left(call.deadline)
    beside = %{stream?: stream?, tools?: not Tools.Runner.none?(tools)}
    timeout = Caller.at_least_one(left)
    send(dest, {:request, ref, self(), timeout, call.body, call.terms, beside})
    timer = if left != :infinity, do: :erlang.start_timer(left, self(), :deadline)
    chunks = :queue.new()

    loop(%__MODULE__{
      dest: dest,
      ref: ref,
      watch: watch,
      tools: tools,
      timer: timer,
      chunks: chunks
    })
  end

  @spec loop(t()) :: :ok
  defp loop(%__MODULE__{ref: ref, timer: timer, watch: watch} = state) do
    receive do
      {^ref, :chunk, frame} ->
        hand_out(%{state | chunks: :queue.in(frame, state.chunks)})

      {^ref, :tool_call, %Invocation{} = tool_call} ->
        loop(%{state | tools: Tools.Runner.run(state.tools, tool_call)})

      {^ref, reply} ->
        over(state, reply)

      {:DOWN, ^ref, :process, _bridge, _reason} ->
        over(state, {:error, :bridge_not_running})

      # What has come until then counts only if the reply is among it: the caller is to wait no longer.
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

      # Of a timer that was cancelled too late.
      {:timeout, _timer, :deadline} ->
        loop(state)

      other ->
        ServerGuard.drop(other, __MODULE__)
        loop(state)
    end
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

  # The tools before the answer: who has that need not fear that one still begins something.
  defp over(state, reply) do
    Process.demonitor(state.ref, [:flush])
    Tools.Runner.stop(state.tools)
    hand_over(state.asked, state.watch, :queue.to_list(state.chunks), reply)
  end

  # Whatever else comes, or has come, is too late.
  defp hand_over(nil, watch, chunks, reply) do
    receive do
      {:next, asked} when is_reference(asked) -> hand_over(asked, watch, chunks, reply)
      {:DOWN, ^watch, :process, _caller, _reason} -> :ok
      _stale -> hand_over(nil, watch, chunks, reply)
    end
  end

  defp hand_over(asked, watch, [frame | chunks], reply) do
    send(asked, {asked, {:chunk, frame}})
    hand_over(nil, watch, chunks, reply)
  end

  defp hand_over(asked, _watch, [], reply) do
    send(asked, {asked, {:over, reply}})
    :ok
  end
end
