defmodule DSPex.PythonBridge.Client.StreamReducer do
  @moduledoc false
  # One call with chunks, or tools, in the caller's process: between its beginning and its conclusion, which are
  # `DSPex.PythonBridge.Client.Caller`'s, or a pool's. What happens meanwhile is the work of
  # `DSPex.PythonBridge.Client.StreamProxy`.
  #
  # With chunks it is a reduction as `Enumerable` defines it: a function gets one element after the other and says
  # after each whether to go on. Whatever ends it early, an exception of that function included, cancels the call.

  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.Client.{Caller, StreamProxy}
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Programs.Change
  alias DSPex.PythonBridge.Protocol
  alias DSPex.PythonBridge.Telemetry.CallSpan
  alias DSPex.PythonBridge.Tools.FunctionHolder

  @typedoc """
  A call to a bridge or a pool, which `open` makes: it gets the options, with chunks if `:stream` is true.
  """
  @type request ::
          {:bridge | :pool, server :: term(), Protocol.command(), args :: map(), keyword(),
           open()}
  @type open :: (keyword() -> {:open, call()} | Caller.result())
  @typedoc """
  A call under way. `holder`: of its functions. `conclude` makes the reply the result, or says how the call is made again: not
  if the reply is `:final`, since chunks were given that cannot come again. `dest` is sent `:unreadable_frame`.
  """
  @type call :: %{
          :proxy => pid(),
          :holder => pid() | nil,
          :dest => Caller.dest(),
          :deadline => Deadline.t(),
          :conclude => (Request.reply(), :final | :repeatable ->
                          Caller.result()
                          | {:again, (-> {:open, call()} | Caller.result())})
        }
  @typedoc "A chunk as the peer wrote it, with string keys; the last element is the result."
  @type element :: {:chunk, map()} | {:over, Caller.result()}

  @doc "A call to a bridge. The arguments are those of `DSPex.PythonBridge.Client.Caller.exchange/5`, with `:tools` in `opts`."
  @spec to_bridge(GenServer.server(), Protocol.command(), map(), timeout() | :default, keyword()) ::
          request()
  def to_bridge(server, command, args, timeout, opts) do
    open = fn opts ->
      with {:ok, call} <- Caller.prepare(server, command, args, timeout, opts),
           do: start(call, opts, Change.program_id(command, args))
    end

    {:bridge, server, command, args, opts, open}
  end

  defp start(call, opts, program_id) do
    holder = FunctionHolder.open(opts, nil, program_id)
    proxy = StreamProxy.start(call, holder)
    # The body is large, and the call may take long.
    call = %{call | request: nil}
    under_way = %{proxy: proxy, holder: holder, dest: call.dest, deadline: call.deadline}
    conclude = fn reply, _chunks -> Caller.conclude(call, reply) end
    {:open, Map.put(under_way, :conclude, conclude)}
  end

  @doc "Makes the call, calls `on_chunk` with each chunk, and returns the result."
  @spec run(request(), (map() -> term()) | nil) :: Caller.result()
  def run(request, on_chunk) do
    {:done, result} =
      begin(request, on_chunk != nil, nil, nil, fn
        {:chunk, chunk}, nil ->
          on_chunk.(chunk)
          {:cont, nil}

        {:over, result}, nil ->
          {:cont, result}
      end)

    result
  end

  @doc "Reduces the call over its elements. Nothing is sent before the first is asked for."
  @spec reduce(request(), Enumerable.acc(), (element(), term() -> Enumerable.acc())) ::
          Enumerable.result()
  def reduce(_request, {:halt, acc}, _fun), do: {:halted, acc}
  def reduce(request, {:suspend, acc}, fun), do: {:suspended, acc, &reduce(request, &1, fun)}

  def reduce({kind, server, command, args, opts, open}, {:cont, acc}, fun) do
    {span, opts} = CallSpan.begin(kind, server, command, args, opts)
    begin({kind, server, command, args, opts, open}, true, span, acc, fun)
  end

  # Without a span, the events of the call are its caller's to emit.
  defp begin({_kind, _server, _command, _args, opts, open}, stream?, span, acc, fun) do
    state = %{call: nil, again: nil, span: span, chunks: :repeatable, told?: false}
    state = Map.merge(state, %{items: MapSet.new(), earlier: MapSet.new()})
    opened(state, open.([stream: stream?] ++ opts), {:cont, acc}, fun)
  end

  # Its chunks, which the proxy keeps, come when the caller asks for them.
  defp opened(state, {:open, call}, step, fun),
    do: go_on(%{state | call: call, again: nil}, step, fun)

  defp opened(state, result, {:cont, acc}, fun), do: over(result, state.span, acc, fun)

  # It is made again: the peer is gone.
  defp go_on(%{again: open} = state, {:cont, _acc} = step, fun) when open != nil,
    do: opened(state, open.(), step, fun)

  defp go_on(%{call: call} = state, {:cont, acc}, fun) do
    case StreamProxy.next(call.proxy, call.deadline) do
      {:chunk, frame} -> chunk(state, frame, acc, fun)
      {:over, reply} -> concluded(state, conclude(call, reply, state.chunks), acc, fun)
    end
  end

  defp go_on(state, {:suspend, acc}, fun), do: {:suspended, acc, &go_on(state, &1, fun)}

  defp go_on(state, {:halt, acc}, _fun) do
    stop(state)
    CallSpan.over(state.span, :cancelled)
    {:halted, acc}
  end

  defp stop(%{call: call, again: nil}), do: StreamProxy.stop(call.proxy)
  defp stop(%{call: call}), do: FunctionHolder.close(call.holder)

  defp conclude(call, {:tools_begun, reply}, _chunks),
    do: Caller.once(call.conclude.(reply, :final))

  defp conclude(call, reply, chunks), do: call.conclude.(reply, chunks)

  defp concluded(state, {:again, open}, acc, fun) do
    state = %{state | again: open}

    if state.told?,
      do: give(state, %{"status" => "restarted"}, acc, fun),
      else: go_on(state, {:cont, acc}, fun)
  end

  defp concluded(%{call: call, span: span}, result, acc, fun) do
    # A pool's proxy leaves it open after an error.
    FunctionHolder.close(call.holder)
    over(result, span, acc, fun)
  end

  defp over(result, span, acc, fun) do
    last(fun.({:over, CallSpan.over(span, result)}, acc))
  end

  defp last({:cont, acc}), do: {:done, acc}
  defp last({:halt, acc}), do: {:halted, acc}
  defp last({:suspend, acc}), do: {:suspended, acc, &last/1}

  defp chunk(state, frame, acc, fun) do
    state = if Protocol.repeatable?(frame), do: state, else: %{state | chunks: :final}

    case Protocol.decode_chunk(frame) do
      {:ok, _id, %{"index" => index} = item} ->
        if index in state.earlier,
          do: go_on(state, {:cont, acc}, fun),
          else: give(%{state | items: MapSet.put(state.items, index)}, item, acc, fun)

      {:ok, _id, chunk} ->
        give(state, chunk, acc, fun)

      {:error, _reason} ->
        send(state.call.dest, :unreadable_frame)
        go_on(state, {:cont, acc}, fun)
    end
  end

  # The items of earlier peers have been given.
  defp give(state, %{"status" => "restarted"} = chunk, acc, fun) do
    state = %{state | told?: false, earlier: state.items}
    go_on(state, call_back(state, {:chunk, chunk}, acc, fun), fun)
  end

  defp give(state, chunk, acc, fun) do
    state = %{state | told?: true}
    go_on(state, call_back(state, {:chunk, chunk}, acc, fun), fun)
  end

  defp call_back(state, element, acc, fun) do
    fun.(element, acc)
  catch
    kind, reason ->
      stop(state)
      CallSpan.failed(state.span, kind, reason, __STACKTRACE__)
      :erlang.raise(kind, reason, __STACKTRACE__)
  end
end
