defmodule DSPex.PythonBridge.Client.StreamReducer do
  @moduledoc false
  # One call with chunks, or tools, in the caller's process: between its beginning and its conclusion, which are
  # `DSPex.PythonBridge.Client.Caller`'s, or a pool's. What happens meanwhile is the work of
  # `DSPex.PythonBridge.Client.StreamProxy`.
  #
  # With chunks it is a reduction as `Enumerable` defines it: a function gets one element after the other and says
  # after each whether to go on. Whatever ends it early, an exception of that function included, cancels the call.

  alias DSPex.PythonBridge.Calls.{Journal, Request}
  alias DSPex.PythonBridge.Client.{Caller, Delivered, StreamProxy}
  alias DSPex.PythonBridge.{Error, Protocol}
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Programs.Change
  alias DSPex.PythonBridge.Telemetry.{CallSpan, Metadata}

  @typedoc """
  A call to a bridge or a pool, which `open` makes: it gets the options, with chunks if `:stream` is true.
  """
  @type request ::
          {:bridge | :pool, server :: term(), Protocol.command(), args :: map(), keyword(),
           open()}
  @type open :: (keyword() -> attempt() | Caller.result())
  @typedoc """
  A request for a bridge. `conclude` makes its reply the result, or says how the call is made again: not if it is bound, since
  a tool has begun that must not be called again.
  """
  @type attempt ::
          {:send, Caller.dest(), Deadline.t(), Request.t(),
           conclude :: (Request.reply(), bound? :: boolean() ->
                          Caller.result() | {:again, (-> attempt() | Caller.result())})}
  @typedoc "A chunk as the peer wrote it, with string keys; the last element is the result."
  @type element :: {:chunk, map()} | {:over, Caller.result()}

  # proxy: nil before the first attempt. attempt: the present one. left: what comes next, before `again` makes the next attempt,
  # or `result`. journal?: whether the peers may get the run's journal.
  @enforce_keys [:span, :tools, :about, :keeper]
  defstruct [:span, :tools, :about, :keeper, :proxy, :attempt, :again, :result] ++
              [delivered: %Delivered{}, left: [], journal?: true]

  @doc "A call to a bridge. The arguments are those of `DSPex.PythonBridge.Client.Caller.exchange/5`, with `:tools` in `opts`."
  @spec to_bridge(GenServer.server(), Protocol.command(), map(), timeout() | :default, keyword()) ::
          request()
  def to_bridge(server, command, args, timeout, opts) do
    open = fn opts ->
      with {:ok, call, request} <- Caller.prepare(server, command, args, timeout, opts) do
        conclude = fn reply, _bound? -> Caller.conclude(call, reply) end
        {:send, call.dest, call.deadline, request, conclude}
      end
    end

    {:bridge, server, command, args, opts, open}
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

  @doc """
  The enumerable of `DSPex.PythonBridge.Bridge.stream/3`: a function, so that inspection does not show the caller's contents.
  """
  @spec stream(request()) :: Enumerable.t()
  def stream(request) do
    fn acc, fun ->
      reduce(request, acc, fn
        {:chunk, chunk}, acc -> if it = element(chunk), do: fun.(it, acc), else: {:cont, acc}
        {:over, {:ok, _id, result, meta}}, acc -> fun.({:ok, result, meta}, acc)
        {:over, {:error, error}}, acc -> fun.({:error, error}, acc)
      end)
    end
  end

  defp element(%{"field" => field, "chunk" => text}), do: {:chunk, field, text}
  defp element(%{"field" => field, "reset" => true}), do: {:reset, field}
  defp element(%{"status" => text}), do: {:status, text}

  defp element(%{"index" => index, "success" => true, "result" => result}),
    do: {:item, index, {:ok, result}}

  defp element(%{"index" => index, "error" => text} = item),
    do: {:item, index, {:error, Error.from_peer(item["error_type"], text, item["retryable"])}}

  # From a later version of the peer.
  defp element(_unknown), do: nil

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
  defp begin({kind, server, command, args, opts, open}, stream?, span, acc, fun) do
    about = %{
      pool: if(kind == :pool, do: Metadata.name(server)),
      program_id: Change.program_id(command, args),
      telemetry_metadata: Keyword.get(opts, :telemetry_metadata, %{})
    }

    tools = Keyword.get(opts, :tools, %{})

    state = %__MODULE__{
      span: span,
      tools: tools,
      about: about,
      keeper: Keyword.get(opts, :keeper, %{})
    }

    opened(state, open.([stream: stream?] ++ opts), {:cont, acc}, fun)
  end

  # Its chunks, which the proxy keeps, come when the caller asks for them.
  defp opened(state, {:send, dest, deadline, request, conclude}, step, fun) do
    proxy = state.proxy || StreamProxy.start(state.tools, state.about, state.keeper)

    request = if state.journal?, do: request, else: %{request | journal: nil}
    StreamProxy.make(proxy, dest, deadline, request)
    attempt = {:send, dest, deadline, request, conclude}
    go_on(%{state | proxy: proxy, attempt: attempt, again: nil}, step, fun)
  end

  defp opened(state, result, {:cont, acc}, fun), do: over(state, result, acc, fun)

  defp go_on(%{left: [chunk | left]} = state, {:cont, acc}, fun),
    do: call_back(%{state | left: left}, chunk, acc, fun)

  # It is made again: the peer is gone.
  defp go_on(%{again: open} = state, {:cont, _acc} = step, fun) when open != nil,
    do: opened(state, open.(), step, fun)

  defp go_on(%{result: result} = state, {:cont, acc}, fun) when result != nil,
    do: over(state, result, acc, fun)

  defp go_on(state, {:cont, acc} = step, fun) do
    case StreamProxy.next(state.proxy) do
      {:chunk, frame} -> state |> chunk(frame) |> go_on(step, fun)
      {:over, reply, bound?} -> state |> replied(reply, bound?) |> go_on({:cont, acc}, fun)
    end
  end

  defp go_on(state, {:suspend, acc}, fun), do: {:suspended, acc, &go_on(state, &1, fun)}

  defp go_on(state, {:halt, acc}, _fun) do
    StreamProxy.stop(state.proxy)
    CallSpan.over(state.span, :cancelled)
    {:halted, acc}
  end

  defp over(state, result, acc, fun) do
    if state.proxy, do: StreamProxy.stop(state.proxy)
    last(fun.({:over, CallSpan.over(state.span, result)}, acc))
  end

  defp last({:cont, acc}), do: {:done, acc}
  defp last({:halt, acc}), do: {:halted, acc}
  defp last({:suspend, acc}), do: {:suspended, acc, &last/1}

  defp chunk(state, frame) do
    case Protocol.decode_chunk(frame) do
      # Of the bridge, which has sent the run to its next peer.
      {:ok, _id, %{"status" => "restarted"}} ->
        restarted(state)

      {:ok, _id, chunk} ->
        {chunks, delivered} = Delivered.take(state.delivered, chunk)
        %{state | left: chunks, delivered: delivered}

      {:error, _reason} ->
        {:send, dest, _deadline, _request, _conclude} = state.attempt
        send(dest, :unreadable_frame)
        state
    end
  end

  defp restarted(state) do
    {chunks, delivered} = Delivered.restarted(state.delivered)
    %{state | left: chunks, delivered: delivered}
  end

  defp replied(%{attempt: {:send, _dest, _deadline, request, conclude}} = state, reply, bound?) do
    case conclude.(reply, bound?) do
      {:again, open} ->
        restarted(%{state | again: open})

      {:ok, _id, _result, _meta} = result ->
        %{state | left: Delivered.rest(state.delivered), result: result}

      {:error, error} ->
        cond do
          bound? -> %{state | result: Caller.once({:error, error})}
          Journal.refused?(request.journal, error) -> without_journal(state)
          true -> %{state | result: {:error, error}}
        end
    end
  end

  # As a run that has none: the tools that have answered are not called again.
  defp without_journal(%{attempt: attempt} = state),
    do: restarted(%{state | journal?: false, again: fn -> attempt end})

  defp call_back(state, chunk, acc, fun) do
    step =
      try do
        fun.({:chunk, chunk}, acc)
      catch
        kind, reason ->
          StreamProxy.stop(state.proxy)
          CallSpan.failed(state.span, kind, reason, __STACKTRACE__)
          :erlang.raise(kind, reason, __STACKTRACE__)
      end

    go_on(state, step, fun)
  end
end
