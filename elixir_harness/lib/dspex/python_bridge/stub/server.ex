defmodule DSPex.PythonBridge.Stub.Server do
  @moduledoc false
  # The process of a stub. It speaks the protocol between a bridge and its callers, which encode, decode, keep their time
  # and emit telemetry as always; in place of a peer it has functions. Under the same name it is a pool whose only bridge
  # it is. Its interface is `DSPex.PythonBridge.Stub`.

  use GenServer
  use DSPex.PythonBridge.OTP.ServerGuard

  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.{Error, Pool, Protocol, Telemetry}
  alias DSPex.PythonBridge.OTP.{Deadline, Registry, ServerGuard}
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Stub.{Answers, Calls, Commands, Context, Coordinator}
  alias DSPex.PythonBridge.Stub.{Definition, Evaluation, Reply, Run, RunArguments}

  @enforce_keys [:name, :handle, :coordinator, :answers, :calls, :commands]
  defstruct @enforce_keys ++ [next_id: 1, monitors: %{}]

  # monitors: of the processes that own answers or use them.
  @typep t :: %__MODULE__{
           name: atom(),
           handle: Pool.Handle.t(),
           coordinator: pid(),
           answers: Answers.t(),
           calls: Calls.t(),
           commands: Commands.t(),
           next_id: pos_integer(),
           monitors: %{pid() => reference()}
         }

  @doc "Starts a stub with the settings of a pool of its name, and the answers to runs that no test has answered."
  @spec start_link(Pool.Options.t(), (String.t(), map() -> term()) | nil) :: GenServer.on_start()
  def start_link(%Pool.Options{name: name} = settings, answers),
    do: GenServer.start_link(__MODULE__, {settings, answers}, name: name)

  @impl GenServer
  @spec init({Pool.Options.t(), (String.t(), map() -> term()) | nil}) ::
          {:ok, t()} | {:stop, term()}
  def init({%Pool.Options{name: name} = settings, answers}) do
    Process.flag(:trap_exit, true)
    Telemetry.look_once()

    handle = %{Pool.Handle.new(settings) | bridges: {name}}

    case Coordinator.start_link(handle) do
      {:ok, coordinator} ->
        state = %__MODULE__{
          name: name,
          handle: handle,
          coordinator: coordinator,
          answers: %Answers{default: answers},
          calls: Calls.new(handle.counters),
          commands: Commands.new(handle.programs)
        }

        register(state, settings)
        {:ok, state}

      {:error, reason} ->
        {:stop, reason}
    end
  end

  defp register(%{name: name, handle: handle}, settings) do
    entry = %{name: name, default_timeout: settings.default_timeout, programs: handle.programs}
    Registry.put(:bridge, self(), Map.put(entry, :stub, name))
    Pool.Handle.publish(handle)
  end

  @impl GenServer
  def terminate(_reason, state) do
    Pool.Handle.withdraw(state.handle)
    Registry.delete(:bridge, self())
    # The callers see the end of this process.
    Calls.stop(state.calls)

    # A link does not end it if this process ends in order. Its name must be free for the next stub.
    Coordinator.stop(state.coordinator)
  end

  ## Questions to a bridge

  @impl GenServer
  def handle_call(:get_status, _from, state) do
    status = %{
      state: :running,
      os_pid: nil,
      pending: Calls.count(state.calls),
      restarts: 0,
      uptime_ms: Commands.uptime_ms(state.commands),
      late_replies: 0,
      unreadable_frames: 0,
      last_error: nil,
      programs: %{failed: %{}}
    }

    {:reply, status, state}
  end

  def handle_call(:restart, _from, state), do: {:reply, :ok, state}

  ## Answers

  def handle_call({:answer, owner, ledger, program, fun, rows}, _from, state) do
    answers = Answers.add(state.answers, owner, ledger, program, fun, rows)
    {:reply, :ok, watch(%{state | answers: answers}, owner)}
  end

  def handle_call({:allow, owner, pid}, _from, state) do
    case Answers.allow(state.answers, owner, pid) do
      {:ok, answers} -> {:reply, :ok, %{state | answers: answers} |> watch(owner) |> watch(pid)}
      {:error, text} -> {:reply, {:error, text}, state}
    end
  end

  def handle_call(question, from, state), do: drop({:"$gen_call", from, question}, state)

  # A process that has ended already is forgotten at once.
  defp watch(state, pid) when is_map_key(state.monitors, pid), do: state
  defp watch(state, pid), do: put_in(state.monitors[pid], Process.monitor(pid))

  ## From callers

  @impl GenServer
  def handle_info({:request, request} = message, state) do
    if Request.valid?(request),
      do: {:noreply, request_came(state, request)},
      else: drop(message, state)
  end

  def handle_info({:abandon, ref}, state) when is_reference(ref), do: abandon(state, ref)

  def handle_info({{:caller_down, id}, _monitor, :process, _pid, _reason}, state),
    do: abandon(state, id)

  def handle_info({:timeout, _timer, {:cast, id}}, state), do: abandon(state, id)

  # A tool asks whether it may begin, which must not be called twice.
  def handle_info({:bind, _port, id, ref}, state) do
    send(ref, {ref, if(Calls.there?(state.calls, id), do: :ok, else: :over)})
    {:noreply, state}
  end

  def handle_info({:tool_result, _port, _id, frame}, state),
    do: {:noreply, %{state | calls: Calls.tool_result(state.calls, frame)}}

  ## From runs, see DSPex.PythonBridge.Stub.Context and DSPex.PythonBridge.Stub.Run

  def handle_info({:chunk, id, frame}, state) do
    Calls.chunk(state.calls, id, frame)
    {:noreply, state}
  end

  def handle_info({:tool_call, id, from, frame}, state),
    do: {:noreply, %{state | calls: Calls.tool_call(state.calls, id, from, frame)}}

  def handle_info({:answered, id, reply}, state), do: {:noreply, answer(state, id, reply)}

  ## Ends

  def handle_info({:EXIT, pid, reason}, %{coordinator: pid} = state), do: {:stop, reason, state}

  # A run that was killed, by a link of its function's for example, has sent no answer.
  def handle_info({:EXIT, pid, reason}, state) do
    case Calls.of_run(state.calls, pid) do
      nil ->
        {:noreply, state}

      id ->
        text = "stub #{inspect(state.name)}: the answer's process ended: #{inspect(reason)}"
        {:noreply, answer(state, id, Reply.new(id, {:error, Error.new(:internal, text)}, nil))}
    end
  end

  def handle_info({:DOWN, _monitor, :process, pid, _reason}, state) do
    answers = Answers.gone(state.answers, pid)
    {:noreply, %{state | answers: answers, monitors: Map.delete(state.monitors, pid)}}
  end

  def handle_info(message, state), do: drop(message, state)

  defp drop(message, state) do
    ServerGuard.drop(message, __MODULE__)
    {:noreply, state}
  end

  defp abandon(state, id_or_ref),
    do: {:noreply, %{state | calls: Calls.abandon(state.calls, id_or_ref)}}

  defp answer(state, id, reply) do
    {there?, calls} = Calls.answer(state.calls, id, reply)
    state = %{state | calls: calls}

    if there?,
      do: %{state | commands: Commands.count(state.commands, "execute_program", reply)},
      else: state
  end

  ## A request

  defp request_came(%{next_id: id} = state, request) do
    frame = IO.iodata_to_binary(Protocol.request_frame(id, request.timeout, request.body))
    {:ok, %{"command" => command, "args" => args} = wishes} = Payload.decode(frame)
    call = %{id: id, request: request, command: command, wishes: wishes}
    state = %{state | next_id: id + 1}

    if command == "execute_program" do
      execute(state, call, RunArguments.read(args))
    else
      in_flight = Calls.count(state.calls)
      at_once(state, call, Commands.run(state.commands, command, args, request, in_flight))
    end
  end

  defp at_once(state, call, result) do
    result = with {:ok, result} <- result, do: {:ok, result, %{}}
    reply = Context.reply(run(state, call, "", nil, []), result)
    Calls.reply(call.request, reply)
    %{state | commands: Commands.count(state.commands, call.command, reply)}
  end

  ## A run

  defp execute(state, call, {:error, error}), do: at_once(state, call, {:error, error})

  defp execute(state, %{id: id, request: request} = call, {:ok, args}) do
    lineage = Answers.lineage(request.pid)
    run = run(state, call, args.program, Commands.fields(state.commands, args.program), lineage)

    case work(state, run, args) do
      {{:error, error}, state} ->
        at_once(state, call, {:error, error})

      {work, state} ->
        %{state | calls: Calls.open(state.calls, id, request, Run.start_link(run, work))}
    end
  end

  defp run(state, %{id: id, request: request, wishes: wishes}, program, fields, lineage) do
    %Context{
      server: self(),
      stub: state.name,
      id: id,
      program: program,
      fields: fields,
      stream?: request.stream?,
      meta: Context.wishes(wishes),
      lineage: lineage,
      timeout: request.timeout,
      deadline: Deadline.new(request.timeout),
      began: System.monotonic_time(:microsecond)
    }
  end

  defp work(state, run, %{inputs: inputs} = args) when is_list(inputs) do
    case args.evaluation && Evaluation.prepare(args.evaluation, run.fields, inputs) do
      {:error, error} ->
        {{:error, error}, state}

      evaluation ->
        {items, state} = Enum.map_reduce(inputs, state, &item(&2, run, &1))
        limits = %{max_concurrency: args.max_concurrency, item_timeout: args.item_timeout}
        {{:list, items, limits, with({:ok, evaluation} <- evaluation, do: evaluation)}, state}
    end
  end

  defp work(state, run, %{inputs: inputs}), do: item(state, run, inputs)

  # What the peer would refuse is not a run that a test has expected.
  defp item(state, run, inputs) when is_map(inputs) do
    case Definition.check_inputs(run.fields, inputs) do
      :ok ->
        {answer, answers} = Answers.take(state.answers, run.lineage, run.program)
        commands = Commands.ran(state.commands, run.program)
        {{inputs, answer}, %{state | answers: answers, commands: commands}}

      error ->
        {error, state}
    end
  end

  defp item(state, _run, _inputs) do
    text = "inputs: expected an object of the signature's input fields"
    {{:error, Error.new(:invalid_args, text)}, state}
  end
end
