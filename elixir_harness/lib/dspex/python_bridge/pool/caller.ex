defmodule DSPex.PythonBridge.Pool.Caller do
  @moduledoc false
  # The part of a pool's call that runs in the caller's process, before and after its way to a peer
  # (`DSPex.PythonBridge.Pool.Router`). Changes of programs go to the coordinator, questions about the peers to all of them.

  import DSPex.PythonBridge.Pool.Sums, only: [is_summed: 1]

  alias DSPex.PythonBridge.{Calls, Client, Error, Protocol}
  alias DSPex.PythonBridge.Client.StreamReducer
  alias DSPex.PythonBridge.OTP.{Deadline, Registry}
  alias DSPex.PythonBridge.Pool.{Attempt, CoordinatorClient, Handle, Request, Router, Sums}
  alias DSPex.PythonBridge.Programs.{Change, Tools}
  alias DSPex.PythonBridge.Tools.FunctionHolder

  # For each call.
  @compile {:inline, find: 1, check_timeout: 2, program: 2, whole: 5, attempt: 1}

  # They have no chunks, and their bodies are kept.
  @changes [:create_program, "create_program", :cleanup, "cleanup"]

  @typedoc "The name of a pool, or its pid, as the caller has given it."
  @type pool :: term()

  @doc "Makes a call without chunks and tools. The arguments are those of `DSPex.PythonBridge.Client.Caller.exchange/5`."
  @spec exchange(pool(), Protocol.command(), map(), timeout() | :default, keyword()) ::
          Client.Caller.result()
  def exchange(pool, command, args, timeout, opts) do
    case prepare(pool, command, args, timeout, opts) do
      {:ok, handle, request} -> Router.run(handle, request, attempt(opts))
      result -> result
    end
  end

  @doc "A call with chunks or tools, for `DSPex.PythonBridge.Client.StreamReducer`; `:tools` in `opts`."
  @spec streamed(pool(), Protocol.command(), map(), timeout() | :default, keyword()) ::
          StreamReducer.request()
  def streamed(pool, command, args, timeout, opts) do
    open = fn opts ->
      opts = if command in @changes, do: Keyword.put(opts, :stream, false), else: opts

      case prepare(pool, command, args, timeout, opts) do
        {:ok, handle, request} -> open(handle, request, opts)
        result -> result
      end
    end

    {:pool, pool, command, args, opts, open}
  end

  defp open(%Handle{name: name} = handle, request, opts) do
    holder = FunctionHolder.open(opts, name, request.program)

    opened(name, holder, Router.run(handle, request, %{attempt(opts) | holder: holder}))
  end

  defp opened(name, holder, {:begun, %{follow: follow} = call, frame}) do
    conclude = fn
      reply, :final ->
        conclude(name, reply)

      reply, :repeatable ->
        case follow.(reply) do
          {:again, run} -> {:again, fn -> opened(name, holder, run.()) end}
          {:done, result} -> result
        end
    end

    {:open, Map.merge(call, %{holder: holder, conclude: conclude}), frame}
  end

  defp opened(_name, holder, result), do: with_tools_begun(FunctionHolder.close(holder), result)

  # No peer is left that could say so.
  defp with_tools_begun(:bound, {:error, %Error{type: type}})
       when type in [:bridge_not_running, :overloaded],
       do: Client.Caller.read({:error, :tool_begun})

  defp with_tools_begun(:bound, result), do: Client.Caller.once(result)
  defp with_tools_begun(:ok, result), do: result

  # With chunks that were given, it is not made again.
  defp conclude(name, {:error, :bridge_not_running}) do
    if Handle.fetch(name),
      do: {:error, Error.new(:python_process_died)},
      else: {:error, Error.not_running(:pool, name)}
  end

  # From another node.
  defp conclude(_name, {:served, {:done, reply}}), do: reply
  defp conclude(name, {:served, _nobody}), do: conclude(name, {:error, :bridge_not_running})
  defp conclude(_name, reply), do: Client.Caller.read(reply)

  # The usual options first: they need no lookup.
  defp attempt(opts) when opts in [[], [meta: true]], do: %Attempt{}

  defp attempt(opts) do
    retry = Keyword.get(opts, :retry, true)

    %Attempt{
      retry: retry,
      stream?: Keyword.get(opts, :stream, false),
      spread?: Keyword.get(opts, :spread, false)
    }
  end

  # A call of one peer, ready to be sent; or the result of one of the whole pool.
  defp prepare(pool, command, args, timeout, opts) do
    started = Deadline.now()

    with {:ok, handle} <- find(pool),
         {:ok, timeout} <- check_timeout(timeout, handle),
         :ok <- Tools.check(handle.programs, {:pool, handle.name}, command, args, opts),
         {:ok, body} <- Protocol.encode_body(command, args, opts) do
      request = Request.new(body, program(command, args), started, timeout)

      with nil <- whole(handle, request, command, args, opts), do: {:ok, handle, request}
    end
  end

  defp find(pool) do
    case Handle.fetch(pool) do
      nil -> {:error, if(bridge?(pool), do: a_bridge(pool), else: Error.not_running(:pool, pool))}
      handle -> {:ok, handle}
    end
  end

  defp bridge?(server) do
    pid = if is_atom(server), do: Process.whereis(server), else: server
    is_pid(pid) and Registry.get(:bridge, pid) != nil
  end

  defp a_bridge(server) do
    text = "#{inspect(server)} is a bridge: use Bridge.call, Bridge.request or Bridge.stream"
    Error.new(:invalid_request, text)
  end

  defp check_timeout(:default, handle), do: {:ok, handle.settings.default_timeout}
  defp check_timeout(timeout, handle), do: Client.Caller.check_timeout(timeout, handle.pid)

  defp program(command, args) when command in [:execute_program, "execute_program"],
    do: Change.program_id(command, args)

  defp program(_command, _args), do: nil

  # Commands for the pool as a whole; nil for those of one peer.
  defp whole(handle, request, command, args, opts) when is_summed(command),
    do: timed(fn -> Sums.run(handle, command, args, request.deadline, opts) end)

  defp whole(handle, request, command, args, _opts) do
    with {_kind, _ids, _stamp} = change <- Change.new(command, args),
         do: timed(fn -> change(handle, request, change) end)
  end

  # A peer's own duration is a part of it.
  defp timed(fun) do
    began = System.monotonic_time(:microsecond)

    with {:ok, id, result, meta} <- fun.() do
      us = System.monotonic_time(:microsecond) - began
      {:ok, id, result, Map.put(meta, "duration_ms", us / 1000)}
    end
  end

  defp change(handle, request, change) do
    case CoordinatorClient.await(handle.name, request.deadline) do
      nil ->
        {:error, Error.not_running(:pool, handle.name)}

      coordinator ->
        sent = %Calls.Request{body: request.body, change: change}
        left = Request.left(request)
        Client.Caller.read(Client.Caller.send_and_wait(coordinator, left, sent))
    end
  end
end
