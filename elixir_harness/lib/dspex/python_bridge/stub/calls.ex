defmodule DSPex.PythonBridge.Stub.Calls do
  @moduledoc false
  # The runs of a stub that are under way: part of its process. Each has the process that makes it
  # (`DSPex.PythonBridge.Stub.Run`) and a caller, and is here until exactly one of these takes it out: its answer, or the
  # end of its caller or of its caller's patience.

  alias DSPex.PythonBridge.Calls.{LoadCounters, Request}
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Tools.Invocation

  # The slot of the only bridge.
  @slot 1
  # Results of tools are not written to a port.
  @max_frame_bytes 4_294_967_295

  defstruct by_id: %{}, tool_calls: %{}

  @typep call :: %{request: Request.t(), run: pid(), watch: reference()}
  @typedoc "`tool_calls`: who waits for the result of each."
  @type t :: %__MODULE__{
          by_id: %{pos_integer() => call()},
          tool_calls: %{pos_integer() => pid()}
        }

  @doc "No calls, with counters that show the stub as a peer that is ready."
  @spec new(LoadCounters.t()) :: t()
  def new(counters) do
    LoadCounters.reset(counters, @slot)
    LoadCounters.put_state(counters, @slot, :ready)
    %__MODULE__{}
  end

  @doc "The number of calls."
  @spec count(t()) :: non_neg_integer()
  def count(%__MODULE__{by_id: by_id}), do: map_size(by_id)

  @doc "Whether a call has not ended."
  @spec there?(t(), pos_integer()) :: boolean()
  def there?(%__MODULE__{by_id: by_id}, id), do: is_map_key(by_id, id)

  @doc "Adds a call, which a process runs."
  @spec open(t(), pos_integer(), Request.t(), pid()) :: t()
  def open(%__MODULE__{} = calls, id, request, run) do
    call = %{request: request, run: run, watch: watch(request, id)}
    %{calls | by_id: Map.put(calls.by_id, id, call)}
  end

  # A caller keeps its own time; a cast has no caller that could.
  defp watch(%Request{pid: nil, timeout: timeout}, id),
    do: :erlang.start_timer(timeout, self(), {:cast, id})

  defp watch(%Request{pid: pid}, id), do: :erlang.monitor(:process, pid, tag: {:caller_down, id})

  ## Ends

  @doc "Ends a call, by its id or the alias of its caller, that nobody waits for any longer."
  @spec abandon(t(), pos_integer() | reference()) :: t()
  def abandon(%__MODULE__{by_id: by_id} = calls, ref) when is_reference(ref) do
    case Enum.find(by_id, fn {_id, call} -> call.request.ref == ref end) do
      {id, _call} -> abandon(calls, id)
      # The reply was sent first.
      nil -> calls
    end
  end

  def abandon(calls, id) do
    case pop(calls, id) do
      {nil, calls} ->
        calls

      {call, calls} ->
        Process.exit(call.run, :kill)
        calls
    end
  end

  @doc "Ends a call with its reply; false if it has ended."
  @spec answer(t(), pos_integer(), Request.reply()) :: {boolean(), t()}
  def answer(%__MODULE__{} = calls, id, reply) do
    case pop(calls, id) do
      {nil, calls} ->
        {false, calls}

      {call, calls} ->
        reply(call.request, reply)
        {true, calls}
    end
  end

  @doc "Ends all."
  @spec stop(t()) :: :ok
  def stop(%__MODULE__{by_id: by_id}),
    do: Enum.each(by_id, fn {_id, call} -> Process.exit(call.run, :kill) end)

  @doc "The id of the call that a process runs; nil if it has ended."
  @spec of_run(t(), pid()) :: pos_integer() | nil
  def of_run(%__MODULE__{by_id: by_id}, pid),
    do: Enum.find_value(by_id, fn {id, call} -> if call.run == pid, do: id end)

  # No flush: what the monitor or the timer has already sent will find no call.
  defp pop(%__MODULE__{} = calls, id) do
    case Map.pop(calls.by_id, id) do
      {nil, _by_id} ->
        {nil, calls}

      {%{request: request, run: run, watch: watch} = call, by_id} ->
        if request.pid, do: Process.demonitor(watch), else: :erlang.cancel_timer(watch)
        tool_calls = Map.reject(calls.tool_calls, fn {_id, pid} -> pid == run end)
        {call, %{calls | by_id: by_id, tool_calls: tool_calls}}
    end
  end

  @doc "Sends the reply of a request that is not, or no longer, a call."
  @spec reply(Request.t(), Request.reply()) :: :ok
  def reply(request, reply) do
    if request.ref, do: send(request.ref, {request.ref, reply})
    :ok
  end

  ## What comes before the reply

  @doc "Sends a chunk to the caller."
  @spec chunk(t(), pos_integer(), binary()) :: :ok
  def chunk(%__MODULE__{by_id: by_id}, id, frame) do
    with %{^id => %{request: %Request{ref: ref}}} when ref != nil <- by_id,
         do: send(ref, {ref, :chunk, frame})

    :ok
  end

  @doc "Passes a tool call of a process to the caller, if that has tools."
  @spec tool_call(t(), pos_integer(), {pid(), pos_integer()}, binary()) :: t()
  def tool_call(%__MODULE__{by_id: by_id} = calls, id, {pid, call_id}, frame) do
    invocation = %Invocation{
      port: self(),
      id: id,
      frame: frame,
      max_frame_bytes: @max_frame_bytes
    }

    case by_id do
      %{^id => %{request: %Request{tools?: true, ref: ref}}} ->
        send(ref, {ref, :tool_call, invocation})

      _without_tools ->
        Invocation.refuse(invocation, :not_given)
    end

    %{calls | tool_calls: Map.put(calls.tool_calls, call_id, pid)}
  end

  @doc "Gives the result of a tool to the process that has called it."
  @spec tool_result(t(), binary()) :: t()
  def tool_result(%__MODULE__{tool_calls: tool_calls} = calls, frame) do
    with {:ok, %{"tool_result" => %{"call_id" => id} = result}} <- Payload.decode(frame),
         {pid, tool_calls} when pid != nil <- Map.pop(tool_calls, id) do
      result = if result["success"], do: {:ok, result["result"]}, else: {:error, result["error"]}
      send(pid, {id, result})
      %{calls | tool_calls: tool_calls}
    else
      _too_late -> calls
    end
  end
end
