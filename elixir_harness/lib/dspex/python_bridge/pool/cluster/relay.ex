defmodule DSPex.PythonBridge.Pool.Cluster.Relay do
  @moduledoc false
  # The process on the serving node of a call from another node that has chunks or tools, or must not be made twice. To
  # the caller's `DSPex.PythonBridge.Client.StreamProxy` it is a bridge: it takes the messages of one. The bridges here are called by `DSPex.PythonBridge.Pool.LocalCall`, which
  # counts the call and tries one after the other, as for a caller of this node.
  #
  # It ends with the call, with the proxy, or when the proxy gives up; the bridge, which monitors it as any caller, then
  # cancels the call.

  alias DSPex.PythonBridge.{Calls, Error, Protocol}
  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.OTP.{Deadline, ServerGuard}
  alias DSPex.PythonBridge.Pool.{Attempt, LocalCall, Request}

  # The caller starts its proxy as soon as it knows of this process.
  @request_ms 10_000

  @enforce_keys [:ref, :proxy, :request, :retry]
  defstruct [:ref, :proxy, :request, :retry, told?: false, streamed?: false, bound?: false]

  @typedoc """
  `ref`: the alias of the caller's proxy; `proxy`: the monitor of its process. `retry`: whether the call may be sent again
  after a peer has died with it. `streamed?`, `bound?`: whether a chunk was given that cannot come again, or a tool may have
  begun, after which it must not be. `told?`: whether any other chunk was given.
  """
  @type t :: %__MODULE__{
          ref: reference(),
          proxy: reference(),
          request: Calls.Request.t(),
          retry: boolean(),
          told?: boolean(),
          streamed?: boolean(),
          bound?: boolean()
        }
  @typedoc "What the caller gets: as of `DSPex.PythonBridge.Pool.Remote.proxy/4`."
  @type served ::
          {:done, LocalCall.reply()} | {:nobody, deaths :: non_neg_integer(), Error.t() | nil}

  @doc "Starts it for a caller; `serve` makes the call with its body and its attempts."
  @spec start(pid(), retry :: boolean(), (binary(), LocalCall.attempt() -> served())) :: pid()
  def start(caller, retry, serve) do
    spawn(fn -> ServerGuard.run(fn -> init(caller, retry, serve) end) end)
  end

  defp init(caller, retry, serve) do
    # Its messages have the caller's contents.
    Process.flag(:sensitive, true)
    watch = Process.monitor(caller)

    receive do
      {:request, request} ->
        Process.demonitor(watch, [:flush])
        if Calls.Request.valid?(request) and request.ref != nil, do: run(request, retry, serve)

      {:DOWN, ^watch, :process, _caller, _reason} ->
        :ok
    after
      @request_ms -> :ok
    end
  end

  defp run(%Calls.Request{ref: ref, pid: proxy, body: body} = request, retry, serve) do
    relay = %{ref: ref, proxy: Process.monitor(proxy), request: %{request | body: ""}}
    relay = struct!(__MODULE__, Map.put(relay, :retry, retry))
    send(ref, {ref, {:served, serve.(body, &attempt(relay, &1, &2, &3))}})
    :ok
  end

  # As `DSPex.PythonBridge.Pool.Attempt.make/4`, for the caller's proxy.
  @spec attempt(t(), pid(), Attempt.slot(), Request.t()) :: Calls.Request.reply()
  defp attempt(
         %__MODULE__{request: request} = relay,
         bridge,
         {counters, index},
         %Request{} = call
       ) do
    ref = :erlang.monitor(:process, bridge, alias: :demonitor)
    left = Request.left(call)
    request = %{request | body: call.body, retry: :pool, deaths: call.deaths}
    request = %{request | ticket: LoadCounters.ticket(counters, index)}
    send(bridge, {:request, %{request | ref: ref, pid: self(), timeout: left}})
    {relay, reply} = pass_on(relay, bridge, ref, call.deadline)
    Process.demonitor(ref, [:flush])

    reply =
      case reply do
        {:error, :bridge_not_running} -> bridge_gone(relay)
        reply -> Attempt.last(relay.retry, reply)
      end

    if relay.told? and LocalCall.again?(reply),
      do: send(relay.ref, {relay.ref, :chunk, Protocol.restarted_chunk()})

    reply
  end

  # A bridge itself says so when only its peer ends.
  defp bridge_gone(%__MODULE__{bound?: true}), do: {:error, :tool_begun}
  defp bridge_gone(%__MODULE__{streamed?: true}), do: {:error, :python_process_died}
  defp bridge_gone(relay), do: Attempt.last(relay.retry, {:error, :bridge_not_running})

  defp pass_on(%__MODULE__{ref: near, proxy: proxy} = relay, bridge, ref, deadline) do
    receive do
      {^ref, :chunk, frame} ->
        send(near, {near, :chunk, frame})
        pass_on(note_chunk(relay, frame), bridge, ref, deadline)

      {^ref, :tool_call, tool_call} ->
        send(near, {near, :tool_call, tool_call})
        pass_on(relay, bridge, ref, deadline)

      {^ref, reply} ->
        {relay, reply}

      {:DOWN, ^ref, :process, _bridge, _reason} ->
        {relay, {:error, :bridge_not_running}}

      # What a caller sends its bridge during a call.
      message when message == :unreadable_frame when elem(message, 0) in [:tool_result, :bind] ->
        send(bridge, message)
        bound? = relay.bound? or (is_tuple(message) and elem(message, 0) == :bind)
        pass_on(%{relay | bound?: bound?}, bridge, ref, deadline)

      {:abandon, ^near} ->
        {relay, give_up(bridge, ref)}

      {:DOWN, ^proxy, :process, _proxy, _reason} ->
        {relay, give_up(bridge, ref)}

      other ->
        ServerGuard.drop(other, __MODULE__)
        pass_on(relay, bridge, ref, deadline)
    after
      Deadline.left(deadline) -> {relay, give_up(bridge, ref)}
    end
  end

  defp note_chunk(relay, frame) do
    if Protocol.repeatable?(frame),
      do: %{relay | told?: true},
      else: %{relay | streamed?: true}
  end

  # Nobody waits any longer, or not for long: no other bridge is tried.
  defp give_up(bridge, ref) do
    send(bridge, {:abandon, ref})
    {:error, :timeout}
  end
end
