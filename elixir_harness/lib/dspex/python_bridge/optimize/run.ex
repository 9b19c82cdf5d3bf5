defmodule DSPex.PythonBridge.Optimize.Run do
  @moduledoc false
  # The run of an optimizer: at one peer of a bridge or pool, and after its death at the next, which starts from the
  # beginning. The tools, the metric among them, are not called again for what they have answered
  # (`DSPex.PythonBridge.Tools.Functions`), so that chunks, which come again, do not keep it from being made again.

  alias DSPex.PythonBridge.{Calls, Error, Pool, Protocol, Telemetry}
  alias DSPex.PythonBridge.Client.{Caller, StreamProxy}
  alias DSPex.PythonBridge.Optimize.{Progress, TemporaryProgram}
  alias DSPex.PythonBridge.OTP.{Deadline, Registry}
  alias DSPex.PythonBridge.Telemetry.Metadata
  alias DSPex.PythonBridge.Tools.FunctionHolder

  # As the option's default; that of a bridge of another node is not known here.
  @default_retries 3
  # The peer that was given the program may be replaced before it gets the run, or lose its programs.
  @creations 3

  @enforce_keys [:where, :program, :holder, :create, :retry?]
  defstruct @enforce_keys

  @type where :: {:bridge, Caller.dest()} | {:pool, Pool.Handle.t()}
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
    request = %Pool.Request{body: execute, program: nil, deadline: deadline}
    {result, progress} = attempt(run, request, progress)
    {with_tools_begun(FunctionHolder.close(run.holder), result), progress}
  end

  defp with_tools_begun(:bound, {:error, _error} = result), do: Caller.once(result)
  defp with_tools_begun(_bound, result), do: result

  defp attempt(run, request, progress) do
    {outcome, progress} = follow(begin(run, request), progress)

    case after_death(run, request, outcome) do
      nil -> {conclude(run, outcome), progress}
      request -> attempt(run, request, progress)
    end
  end

  # Deaths before the first chunk are the pool's to handle.
  defp after_death(%{retry?: true} = run, request, {:reply, {:error, reason}, dest}) do
    case reason do
      :replaced -> Pool.Request.renew(request)
      :python_process_died -> one_more_death(run, request, dest)
      {:died, _sent} -> one_more_death(run, request, dest)
      :bridge_not_running when elem(run.where, 0) == :pool -> one_more_death(run, request, dest)
      _final -> nil
    end
  end

  defp after_death(_run, _request, _outcome), do: nil

  defp one_more_death(run, %Pool.Request{deaths: deaths} = request, dest) do
    if deaths < max_retries(run.where) do
      pool = with {:pool, handle} <- run.where, do: handle.name, else: (_bridge -> nil)
      metadata = %{bridge: Metadata.name(dest), pool: pool, reason: :died}
      Telemetry.execute([:bridge, :resend], %{count: 1}, metadata)
      Pool.Request.renew(%{request | deaths: deaths + 1})
    end
  end

  defp max_retries({:pool, handle}), do: handle.settings.max_retries

  defp max_retries({:bridge, dest}) do
    case Registry.get(:bridge, dest) do
      %{max_retries: most} -> most
      _of_another_node -> @default_retries
    end
  end

  defp conclude(_run, :stopped), do: :stopped
  defp conclude(_run, {:result, result}), do: result

  defp conclude(run, {:reply, {:tools_begun, reply}, dest}),
    do: Caller.once(conclude(run, {:reply, reply, dest}))

  # Its bridge has ended, not the pool.
  defp conclude(%{where: {:pool, _handle}}, {:reply, {:error, :bridge_not_running}, _dest}),
    do: {:error, Error.new(:python_process_died)}

  defp conclude(_run, {:reply, reply, _dest}), do: Caller.read(reply)

  ## At a peer

  defp begin(%{where: {:pool, handle}} = run, request) do
    attempt = %Pool.Attempt{holder: run.holder, retry: run.retry?, stream?: true, again?: true}

    execute = fn {bridge, slot}, request ->
      Pool.Attempt.make(attempt, bridge, slot, request)
    end

    result =
      Pool.Router.run_here(handle, request, fn bridge, slot, request ->
        create_and_execute(run, {bridge, slot}, request, execute, @creations)
      end)

    if elem(result, 0) == :begun, do: result, else: {:result, result}
  end

  defp begin(%{where: {:bridge, dest}} = run, request) do
    execute = fn {bridge, nil}, %Pool.Request{deadline: deadline} = request ->
      # The bridge itself would send it to a peer without the program.
      sent = %Calls.Request{body: request.body, retry: :never, stream?: true}
      sent = %{sent | deaths: request.deaths}
      call = %{dest: bridge, deadline: deadline, request: sent, again?: true}
      proxy = StreamProxy.start(call, run.holder)

      case StreamProxy.next(proxy, deadline) do
        {:chunk, frame} -> {:begun, %{proxy: proxy, dest: bridge, deadline: deadline}, frame}
        {:over, reply} -> reply
      end
    end

    case create_and_execute(run, {dest, nil}, request, execute, @creations) do
      {:begun, _call, _frame} = begun -> begun
      reply -> {:reply, reply, dest}
    end
  end

  defp create_and_execute(run, peer, request, execute, left) do
    TemporaryProgram.at(run.program, peer)

    with {:frame, frame} = created <- TemporaryProgram.ask(peer, run.create, request.deadline) do
      if Protocol.success?(frame),
        do: again_if_missing(run, peer, request, execute, left - 1, execute.(peer, request)),
        else: created
    end
  end

  defp again_if_missing(run, peer, request, execute, left, {:frame, _frame} = reply)
       when left > 0 do
    case Caller.read(reply) do
      {:error, %Error{type: :program_not_found}} ->
        create_and_execute(run, peer, request, execute, left)

      _other ->
        reply
    end
  end

  defp again_if_missing(_run, _peer, _request, _execute, _left, reply), do: reply

  ## Its items

  defp follow({:begun, call, frame}, progress) do
    case take(call, frame, progress) do
      {:go_on, progress} -> follow(call, progress)
      {:stop, progress} -> stop(call, progress)
    end
  end

  defp follow(%{proxy: proxy} = call, progress) do
    case StreamProxy.next(proxy, call.deadline) do
      {:chunk, frame} -> follow({:begun, call, frame}, progress)
      {:over, reply} -> {{:reply, reply, call.dest}, progress}
    end
  end

  defp follow(outcome, progress), do: {outcome, progress}

  defp stop(call, progress) do
    StreamProxy.stop(call.proxy)
    {:stopped, progress}
  end

  defp take(call, frame, progress) do
    case Protocol.decode_chunk(frame) do
      {:ok, _id, item} ->
        Progress.take(progress, item)

      {:error, _reason} ->
        send(call.dest, :unreadable_frame)
        {:go_on, progress}
    end
  catch
    kind, reason ->
      StreamProxy.stop(call.proxy)
      :erlang.raise(kind, reason, __STACKTRACE__)
  end
end
