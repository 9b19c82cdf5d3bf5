defmodule DSPex.PythonBridge.Pool.Caller do
  @moduledoc false
  # The part of a pool's call that runs in the caller's process, before and after its way to a peer
  # (`DSPex.PythonBridge.Pool.Route`).

  import DSPex.PythonBridge.Pool.Sums, only: [is_summed: 1]

  alias DSPex.PythonBridge.{Calls, Client, Error, Protocol}
  alias DSPex.PythonBridge.Client.StreamReducer
  alias DSPex.PythonBridge.OTP.{Deadline, Server}
  alias DSPex.PythonBridge.Pool.{Budgets, Handle, Route, Sums}
  alias DSPex.PythonBridge.Programs.{Change, Tools}

  # For each call.
  @compile {:inline, find: 2, check_timeout: 2, options: 2, program: 2}

  @changes [:create_program, "create_program", :cleanup, "cleanup"]

  @typedoc "The name of a pool, or its pid, as the caller has given it."
  @type pool :: term()

  @doc "Makes a call without chunks and tools. The arguments are those of `DSPex.PythonBridge.Client.Caller.exchange/5`."
  @spec exchange(pool(), Protocol.command(), map(), timeout() | :default, keyword()) ::
          Client.Caller.result()
  def exchange(pool, command, args, timeout, opts) when is_summed(command) do
    began = System.monotonic_time(:microsecond)

    with {:ok, handle, timeout} <- find(pool, timeout),
         {:ok, id, result, meta} <- Sums.run(handle, command, args, Deadline.new(timeout), opts) do
      us = System.monotonic_time(:microsecond) - began
      {:ok, id, result, Map.put(meta, "duration_ms", us / 1000)}
    end
  end

  def exchange(pool, command, args, timeout, opts) do
    with {:ok, route} <- prepare(pool, command, args, timeout, opts), do: Route.run(route)
  end

  @doc "A call with chunks or tools, for `DSPex.PythonBridge.Client.StreamReducer`; `:tools` in `opts`."
  @spec streamed(pool(), Protocol.command(), map(), timeout() | :default, keyword()) ::
          StreamReducer.request()
  def streamed(pool, command, args, timeout, opts) do
    open = fn opts ->
      # These commands have neither chunks nor tools.
      if command in @changes or is_summed(command) do
        exchange(pool, command, args, timeout, Keyword.drop(opts, [:stream, :tools]))
      else
        with {:ok, route} <- prepare(pool, command, args, timeout, opts),
             do: open(route)
      end
    end

    {:pool, pool, command, args, Budgets.begin(pool, command, opts), open}
  end

  defp open(route) do
    with {:send, request, %Route{bridge: bridge, deadline: deadline} = route} <-
           Route.next(route),
         do: {:send, bridge, deadline, request, &settled(route, &1, &2)}
  end

  defp settled(route, reply, bound?),
    do: route |> conclude(reply, bound?) |> Budgets.settle(route.counted)

  defp conclude(route, reply, false) do
    case Route.follow(route, reply) do
      {:resend, route} -> {:again, fn -> open(route) end}
      {:done, result} -> result
    end
  end

  # A tool of it has begun that must not be called again.
  defp conclude(%Route{handle: %Handle{name: name}}, reply, true) do
    with {:error, %Error{type: :bridge_not_running}} <- Client.Caller.read(reply) do
      if Handle.fetch(name),
        do: {:error, Error.new(:python_process_died)},
        else: {:error, Error.not_running(:pool, name)}
    end
  end

  # A call, ready to be sent.
  defp prepare(pool, command, args, timeout, opts) do
    started = Deadline.now()

    with {:ok, handle, timeout} <- find(pool, timeout),
         {:ok, args, opts} <- Budgets.admit(handle, args, opts),
         :ok <- Tools.check(handle.programs, {:pool, handle.name}, command, args, opts),
         {:ok, body} <- Protocol.encode_body(command, args, opts) do
      route = %Route{
        handle: handle,
        body: body,
        deadline: Deadline.new(timeout, started),
        change: Change.new(command, args),
        program: program(command, args),
        journal: Calls.Journal.new(opts, command, args, handle.settings.journal_bytes)
      }

      {:ok, options(route, opts)}
    end
  end

  # The usual options first: they need no lookup.
  defp options(route, opts) when opts in [[], [meta: true]], do: route

  defp options(route, opts) do
    %{
      route
      | resend?: Keyword.get(opts, :retry, true),
        stream?: Keyword.get(opts, :stream, false),
        counted: opts[:counted],
        reach: if(opts[:spread], do: :any, else: :all)
    }
  end

  defp find(pool, timeout) do
    case Handle.fetch(pool) do
      nil ->
        {:error, not_a_pool(pool)}

      handle ->
        with {:ok, timeout} <- check_timeout(timeout, handle), do: {:ok, handle, timeout}
    end
  end

  defp not_a_pool(server) do
    with {:bridge, pid} when is_pid(pid) and node(pid) == node() <- Server.find(server) do
      text = "#{inspect(server)} is a bridge: use Bridge.call, Bridge.request or Bridge.stream"
      Error.new(:invalid_request, text)
    else
      _unknown -> Error.not_running(:pool, server)
    end
  end

  defp check_timeout(:default, handle), do: {:ok, handle.settings.default_timeout}
  defp check_timeout(timeout, handle), do: Client.Caller.check_timeout(timeout, handle.pid)

  defp program(command, args) when command in [:execute_program, "execute_program"],
    do: Change.program_id(command, args)

  defp program(_command, _args), do: nil
end
