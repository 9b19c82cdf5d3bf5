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
  A call to a bridge or a pool, which `open` makes: it gets the options, with chunks if `:stream` is true. It gives the
  call and the frame of its first chunk, if it has waited for that; or the result.
  """
  @type request ::
          {:bridge | :pool, server :: term(), Protocol.command(), args :: map(), keyword(),
           open()}
  @type open :: (keyword() -> {:open, call(), binary() | nil} | Caller.result())
  @typedoc """
  A call under way. `holder`: of its functions. `conclude` makes the reply the result; `dest` is sent
  `:unreadable_frame`.
  """
  @type call :: %{
          proxy: pid(),
          holder: pid() | nil,
          dest: Caller.dest(),
          deadline: Deadline.t(),
          conclude: (Request.reply() -> Caller.result())
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
    {:open, Map.put(under_way, :conclude, &Caller.conclude(call, &1)), nil}
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
    case open.([stream: stream?] ++ opts) do
      {:open, call, nil} -> go_on({call, span}, {:cont, acc}, fun)
      {:open, call, frame} -> go_on({call, span}, chunk({call, span}, frame, acc, fun), fun)
      result -> over(result, span, acc, fun)
    end
  end

  defp go_on({call, span} = under_way, {:cont, acc}, fun) do
    case StreamProxy.next(call.proxy, call.deadline) do
      {:chunk, frame} ->
        go_on(under_way, chunk(under_way, frame, acc, fun), fun)

      {:over, reply} ->
        # A pool's proxy leaves it open after an error.
        FunctionHolder.close(call.holder)
        over(conclude(call, reply), span, acc, fun)
    end
  end

  defp go_on(under_way, {:suspend, acc}, fun),
    do: {:suspended, acc, &go_on(under_way, &1, fun)}

  defp go_on({call, span}, {:halt, acc}, _fun) do
    StreamProxy.stop(call.proxy)
    CallSpan.over(span, :cancelled)
    {:halted, acc}
  end

  defp conclude(call, {:tools_begun, reply}), do: Caller.once(call.conclude.(reply))
  defp conclude(call, reply), do: call.conclude.(reply)

  defp over(result, span, acc, fun) do
    last(fun.({:over, CallSpan.over(span, result)}, acc))
  end

  defp last({:cont, acc}), do: {:done, acc}
  defp last({:halt, acc}), do: {:halted, acc}
  defp last({:suspend, acc}), do: {:suspended, acc, &last/1}

  defp chunk({call, _span} = under_way, frame, acc, fun) do
    case Protocol.decode_chunk(frame) do
      {:ok, _id, chunk} ->
        give(under_way, {:chunk, chunk}, acc, fun)

      {:error, _reason} ->
        send(call.dest, :unreadable_frame)
        {:cont, acc}
    end
  end

  defp give({call, span}, element, acc, fun) do
    fun.(element, acc)
  catch
    kind, reason ->
      StreamProxy.stop(call.proxy)
      CallSpan.failed(span, kind, reason, __STACKTRACE__)
      :erlang.raise(kind, reason, __STACKTRACE__)
  end
end
