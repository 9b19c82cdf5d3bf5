defmodule DSPex.PythonBridge.Client.StreamReducer do
  @moduledoc false
  # One call with chunks, or tools, in the caller's process: between its preparation and its conclusion, which are
  # `DSPex.PythonBridge.Client.Caller`'s. What happens meanwhile is the work of `DSPex.PythonBridge.Client.StreamProxy`.
  #
  # With chunks it is a reduction as `Enumerable` defines it: a function gets one element after the other and says
  # after each whether to go on. Whatever ends it early, an exception of that function included, cancels the call.

  alias DSPex.PythonBridge.{Protocol, Telemetry}
  alias DSPex.PythonBridge.Client.{Caller, StreamProxy}
  alias DSPex.PythonBridge.Tools.FunctionHolder

  @typedoc "The arguments of `DSPex.PythonBridge.Client.Caller.exchange/5`, with `:tools` among the last."
  @type request ::
          {GenServer.server(), Protocol.command(), map(), timeout() | :default, keyword()}
  @typedoc "A chunk as the peer wrote it, with string keys; the last element is the result."
  @type element :: {:chunk, map()} | {:over, Caller.result()}

  @doc "Makes the call, calls `on_chunk` with each chunk, and returns the result."
  @spec run(request(), (map() -> term()) | nil) :: Caller.result()
  def run(request, on_chunk) do
    {:done, result} =
      begin(request, {on_chunk != nil, nil}, nil, fn
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

  def reduce({server, command, args, _timeout, _opts} = request, {:cont, acc}, fun),
    do: begin(request, {true, Telemetry.begin(:bridge, server, command, args)}, acc, fun)

  # Without a span, the events of the call are its caller's to emit.
  defp begin({server, command, args, timeout, opts}, {stream?, span}, acc, fun) do
    case Caller.prepare(server, command, args, timeout, [stream: stream?] ++ opts) do
      {:ok, call} ->
        holder = FunctionHolder.open(Keyword.get(opts, :tools, %{}))
        proxy = StreamProxy.start(call, holder)
        # The body is large, and the call may take long.
        go_on({%{call | request: nil}, proxy, span}, {:cont, acc}, fun)

      {:error, _error} = result ->
        over(result, span, acc, fun)
    end
  end

  defp go_on({call, proxy, span} = under_way, {:cont, acc}, fun) do
    case StreamProxy.next(proxy, call.deadline) do
      {:chunk, frame} -> go_on(under_way, chunk(under_way, frame, acc, fun), fun)
      {:over, reply} -> over(Caller.conclude(call, reply), span, acc, fun)
    end
  end

  defp go_on(under_way, {:suspend, acc}, fun),
    do: {:suspended, acc, &go_on(under_way, &1, fun)}

  defp go_on({_call, proxy, span}, {:halt, acc}, _fun) do
    StreamProxy.stop(proxy)
    Telemetry.over(span, :cancelled)
    {:halted, acc}
  end

  defp over(result, span, acc, fun) do
    Telemetry.over(span, result)
    last(fun.({:over, result}, acc))
  end

  defp last({:cont, acc}), do: {:done, acc}
  defp last({:halt, acc}), do: {:halted, acc}
  defp last({:suspend, acc}), do: {:suspended, acc, &last/1}

  defp chunk({call, _proxy, _span} = under_way, frame, acc, fun) do
    case Protocol.decode_chunk(frame) do
      {:ok, _id, chunk} ->
        give(under_way, {:chunk, chunk}, acc, fun)

      {:error, _reason} ->
        send(call.dest, :unreadable_frame)
        {:cont, acc}
    end
  end

  defp give({_call, proxy, span}, element, acc, fun) do
    fun.(element, acc)
  catch
    kind, reason ->
      StreamProxy.stop(proxy)
      Telemetry.failed(span, kind, reason, __STACKTRACE__)
      :erlang.raise(kind, reason, __STACKTRACE__)
  end
end
