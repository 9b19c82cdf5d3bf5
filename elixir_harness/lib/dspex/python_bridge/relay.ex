defmodule DSPex.PythonBridge.Relay do
  @moduledoc """
  The process between a bridge and a caller that takes chunks, or has given tools: one for each such
  call, which it makes in the caller's place.

  What comes before the reply waits here until the caller asks for it, one at a time, and not in the
  caller's mailbox: the caller may have a full one, may be at work with something else, or never come
  back. Tools run (`DSPex.PythonBridge.Tools`) whatever the caller does meanwhile.

  It ends with the call's last word, or with the caller, or when the caller has enough; the bridge, which
  watches it as it does any caller, then cancels what is still under way. It is linked to neither.
  """

  alias DSPex.PythonBridge.{Caller, ToolCall, Tools}

  @enforce_keys [:call, :ref, :tools, :timer]
  defstruct [:call, :ref, :tools, :timer, :asked, :reply, chunks: :queue.new()]

  # asked: the caller's alias, while it waits. reply: what has come of the call, while chunks are left.
  @typep t :: %__MODULE__{
           call: Caller.request(),
           ref: reference(),
           tools: Tools.t(),
           timer: reference() | nil,
           asked: reference() | nil,
           reply: Caller.reply() | nil,
           chunks: :queue.queue(binary())
         }

  ## The caller's side

  @doc "Makes a call for the calling process."
  @spec start(Caller.request(), stream?: boolean(), tools: Tools.functions()) :: pid()
  def start(call, stream?: stream?, tools: functions) do
    caller = self()
    # What tests and repositories find a process's owner by.
    callers = [caller | Process.get(:"$callers", [])]
    tools = Tools.new(functions, call.dest, callers)
    # A copy of the arguments would be one too many: they are in the body.
    call = %{call | args: %{}}
    spawn(fn -> init(call, stream?, tools, caller) end)
  end

  @doc "Waits for the next chunk's frame, or else for what has come of the call: then nothing follows."
  @spec next(pid()) :: {:chunk, binary()} | {:over, Caller.reply()}
  def next(relay) do
    ref = :erlang.monitor(:process, relay, alias: :reply_demonitor)
    send(relay, {:next, ref})

    # It keeps the time of the call.
    receive do
      {^ref, element} -> element
      {:DOWN, ^ref, :process, _relay, _reason} -> {:over, {:error, :bridge_not_running}}
    end
  end

  @doc "The caller has enough."
  @spec stop(pid()) :: :ok
  def stop(relay) do
    send(relay, :stop)
    :ok
  end

  ## The process

  defp init(%{dest: dest} = call, stream?, tools, caller) do
    # A tool that is ended from outside is to be answered, too.
    Process.flag(:trap_exit, true)
    # Its messages are the caller's contents.
    Process.flag(:sensitive, true)
    Process.monitor(caller)
    # An alias for all that comes: :reply_demonitor would end with the first message.
    ref = :erlang.monitor(:process, dest, alias: :demonitor)
    left = Caller.left(call.deadline)
    beside = %{stream?: stream?, tools?: not Tools.none?(tools)}
    timeout = Caller.at_least_one(left)
    send(dest, {:request, ref, self(), timeout, call.body, call.terms, beside})
    timer = if left != :infinity, do: :erlang.start_timer(left, self(), :deadline)
    # It is as large as the request, which may take long.
    loop(%__MODULE__{call: %{call | body: ""}, ref: ref, tools: tools, timer: timer})
  end

  @spec loop(t()) :: :ok
  defp loop(%__MODULE__{ref: ref, timer: timer} = state) do
    receive do
      {^ref, :chunk, frame} ->
        answer(%{state | chunks: :queue.in(frame, state.chunks)})

      {^ref, :tool_call, %ToolCall{} = tool_call} ->
        loop(%{state | tools: Tools.run(state.tools, tool_call)})

      {^ref, reply} ->
        over(state, reply)

      {:DOWN, ^ref, :process, _bridge, _reason} ->
        over(state, {:error, :bridge_not_running})

      # What has come until then counts only if the reply is among it: the caller is to wait no longer.
      {:timeout, ^timer, :deadline} when state.reply == nil ->
        send(state.call.dest, {:abandon, ref})
        over(%{state | chunks: :queue.new()}, {:error, :timeout})

      {:next, asked} ->
        answer(%{state | asked: asked})

      {:answered, pid} ->
        loop(%{state | tools: Tools.answered(state.tools, pid)})

      {:EXIT, pid, reason} ->
        loop(%{state | tools: Tools.exited(state.tools, pid, reason)})

      {:DOWN, _monitor, :process, _caller, _reason} ->
        stopped(state)

      :stop ->
        stopped(state)

      _stale ->
        loop(state)
    end
  end

  # The tools before the answer: who has that need not fear that one still begins something.
  defp over(state, reply) do
    Process.demonitor(state.ref, [:flush])
    answer(%{state | reply: reply, tools: Tools.stop(state.tools)})
  end

  defp stopped(state) do
    Tools.stop(state.tools)
    :ok
  end

  defp answer(%__MODULE__{asked: nil} = state), do: loop(state)

  defp answer(%__MODULE__{asked: asked, reply: reply} = state) do
    case :queue.out(state.chunks) do
      {{:value, frame}, chunks} ->
        send(asked, {asked, {:chunk, frame}})
        loop(%{state | asked: nil, chunks: chunks})

      {:empty, _chunks} when reply == nil ->
        loop(state)

      {:empty, _chunks} ->
        send(asked, {asked, {:over, reply}})
        :ok
    end
  end
end
