defmodule DSPex.PythonBridge.Optimize.Run do
  @moduledoc false
  # The run of an optimizer: at one peer of a bridge or pool, and after its death at the next, which starts from the
  # beginning. The tools, the metric among them, are not called again for what they have answered
  # (`DSPex.PythonBridge.Tools.Functions`), so that chunks, which come again, do not keep it from being made again.

  alias DSPex.PythonBridge.{Calls, Error, Pool, Protocol, Telemetry}
  alias DSPex.PythonBridge.Client.{Caller, StreamProxy}
  alias DSPex.PythonBridge.Optimize.{Progress, TemporaryProgram}
  alias DSPex.PythonBridge.OTP.{Deadline, Registry}
  alias DSPex.PythonBridge.Pool.Route
  alias DSPex.PythonBridge.Telemetry.Metadata
  alias DSPex.PythonBridge.Tools.FunctionHolder

  # As the option's default; that of a bridge of another node is not known here.
  @default_retries 3
  # The peer that was given the program may be replaced before it gets the run, or lose its programs.
  @creations 3

  @enforce_keys [:where, :program, :holder, :create, :retry?]
  defstruct @enforce_keys

  @type where :: {:bridge, Caller.dest()} | {:pool, Pool.Handle.t()}
  # A run at a bridge that is no pool's, which does not go on to another one.
  @typep at_bridge :: {Caller.dest(), Calls.Request.t(), Deadline.t()}
  @typedoc """
  `program`: the process of the program. `holder`: of the functions. `create`: the body of the request that creates the
  program.
  """
  @type t :: %__MODULE__{
          where: where(),
          program: pid(),
          holder: pid() | nil,
          create: binary(),
          retry?: boolean()
        }

  @doc "The bridge or pool."
  @spec find(term()) :: {:ok, where()} | {:error, Error.t()}
  def find(server) do
    case Pool.Handle.fetch(server) do
      nil -> find_bridge(server)
      handle -> {:ok, {:pool, handle}}
    end
  end

  defp find_bridge(server) do
    case DSPex.PythonBridge.Client.Caller.find_anywhere(server) do
      {:ok, dest} ->
        {:ok, {:bridge, dest}}

      # Else it would have been found above.
      {:error, %Error{type: :invalid_request}} ->
        text = "#{inspect(server)} is a pool of another node: call Optimize.run there"
        {:error, Error.new(:invalid_request, text)}

      not_running ->
        not_running
    end
  end

  @doc """
  Makes it, and passes on its items. `execute`: the body of the request.
  """
  @spec make(t(), execute :: binary(), Deadline.t(), Progress.t()) ::
          {Caller.result() | :stopped, Progress.t()}
  def make(%__MODULE__{} = run, execute, deadline, progress) do
    {result, progress} = attempt(run, route(run, execute, deadline), progress)
    {with_tools_begun(FunctionHolder.close(run.holder), result), progress}
  end

  defp with_tools_begun(:bound, {:error, _error} = result), do: Caller.once(result)
  defp with_tools_begun(_bound, result), do: result

  # The bridge itself would send it to a peer without the program.
  defp route(%{where: {:bridge, dest}}, execute, deadline),
    do: {dest, %Calls.Request{body: execute, resend: :never, stream?: true}, deadline}

  defp route(%{where: {:pool, handle}} = run, execute, deadline) do
    %Route{
      handle: handle,
      body: execute,
      deadline: deadline,
      stream?: true,
      resend?: run.retry?,
      reach: :here
    }
  end

  defp attempt(run, route, progress) do
    case next(route) do
      {:send, request, route} ->
        {reply, progress} = at_peer(run, call(route, request), progress, @creations)

        case follow(run, route, reply) do
          {:resend, route} -> attempt(run, route, progress)
          {:done, result} -> {result, progress}
        end

      {:error, _error} = result ->
        {result, progress}
    end
  end

  @spec next(Route.t() | at_bridge()) ::
          {:send, Calls.Request.t(), Route.t() | at_bridge()} | {:error, Error.t()}
  defp next({_dest, request, _deadline} = at_bridge), do: {:send, request, at_bridge}
  defp next(route), do: Route.next(route)

  defp call({dest, request, deadline}, request), do: call(dest, deadline, request)
  defp call(%Route{} = route, request), do: call(route.bridge, route.deadline, request)

  defp call(dest, deadline, request),
    do: %{dest: dest, deadline: deadline, request: request, again?: true}

  defp follow(_run, _route, :stopped), do: {:done, :stopped}

  defp follow(_run, _route, {:tools_begun, reply}),
    do: {:done, Caller.once(Caller.read(reply))}

  defp follow(_run, %Route{} = route, reply), do: Route.follow(route, reply)

  defp follow(%{retry?: true}, route, {:error, :replaced}), do: {:resend, route}

  defp follow(%{retry?: true}, {dest, request, deadline}, {:error, died})
       when died == :python_process_died or elem(died, 0) == :died do
    if request.deaths < max_retries(dest) do
      metadata = %{bridge: Metadata.name(dest), pool: nil, reason: :died}
      Telemetry.execute([:bridge, :resend], %{count: 1}, metadata)
      {:resend, {dest, %{request | deaths: request.deaths + 1}, deadline}}
    else
      {:done, {:error, Error.new(:python_process_died)}}
    end
  end

  defp follow(_run, _route, reply), do: {:done, Caller.read(reply)}

  defp max_retries(dest) do
    case Registry.get(:bridge, dest) do
      %{max_retries: most} -> most
      _of_another_node -> @default_retries
    end
  end

  ## At a peer

  defp at_peer(run, call, progress, left) do
    TemporaryProgram.at(run.program, call.dest)
    created = TemporaryProgram.ask(call.dest, run.create, call.request.resend, call.deadline)

    with {:frame, frame} <- created, true <- Protocol.success?(frame) do
      {reply, progress} = items(call, StreamProxy.start(call, run.holder), progress)

      if left > 1 and missing?(reply),
        do: at_peer(run, call, progress, left - 1),
        else: {reply, progress}
    else
      _refused_or_gone -> {created, progress}
    end
  end

  defp missing?({:frame, _frame} = reply),
    do: match?({:error, %Error{type: :program_not_found}}, Caller.read(reply))

  defp missing?(_reply), do: false

  ## Its items

  defp items(call, proxy, progress) do
    case StreamProxy.next(proxy, call.deadline) do
      {:chunk, frame} ->
        case take(call, proxy, frame, progress) do
          {:go_on, progress} ->
            items(call, proxy, progress)

          {:stop, progress} ->
            StreamProxy.stop(proxy)
            {:stopped, progress}
        end

      {:over, reply} ->
        {reply, progress}
    end
  end

  defp take(call, proxy, frame, progress) do
    case Protocol.decode_chunk(frame) do
      {:ok, _id, item} ->
        Progress.take(progress, item)

      {:error, _reason} ->
        send(call.dest, :unreadable_frame)
        {:go_on, progress}
    end
  catch
    kind, reason ->
      StreamProxy.stop(proxy)
      :erlang.raise(kind, reason, __STACKTRACE__)
  end
end
