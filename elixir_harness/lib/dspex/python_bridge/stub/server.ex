defmodule DSPex.PythonBridge.Stub.Server do
  @moduledoc false
  # The process of a stub. It speaks the protocol between a bridge and its callers, which encode, decode, keep their time
  # and emit telemetry as always; in place of a peer it has functions. Under the same name it is a pool whose only bridge
  # it is. Its interface is `DSPex.PythonBridge.Stub`.

  use GenServer
  use DSPex.PythonBridge.OTP.ServerGuard

  alias DSPex.PythonBridge.Calls.{LoadCounters, NodeMessage, Request}
  alias DSPex.PythonBridge.{Error, Pool, Programs, Protocol, Telemetry}
  alias DSPex.PythonBridge.OTP.{Deadline, Registry, ServerGuard}
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Stub.{Answers, Commands, Coordinator, Definition, Reply, Run}
  alias DSPex.PythonBridge.Tools.Invocation

  # The slot of the only bridge.
  @slot 1
  # Nothing is written to a port.
  @max_frame_bytes 4_294_967_295

  @enforce_keys [:name, :handle, :coordinator, :answers, :started]
  defstruct @enforce_keys ++
              [calls: %{}, next_id: 1, tool_calls: %{}, monitors: %{}, runs: %{}, counts: %{}]

  # calls: by id, those that are under way. tool_calls: by id, who waits for the result. monitors: of the processes that
  # own answers or use them.
  @typep call :: %{request: Request.t(), run: pid(), watch: reference()}
  @typep t :: %__MODULE__{
           name: atom(),
           handle: Pool.Handle.t(),
           coordinator: pid(),
           answers: Answers.t(),
           started: integer(),
           calls: %{pos_integer() => call()},
           next_id: pos_integer(),
           tool_calls: %{pos_integer() => pid()},
           monitors: %{pid() => reference()},
           runs: %{String.t() => {pos_integer(), float()}},
           counts: %{String.t() => map()}
         }

  @typedoc "The options of a stub, checked; `settings`: those that a pool of its name would have."
  @type options :: %{
          settings: Pool.Options.t(),
          answers: (String.t(), map() -> term()) | nil,
          programs: [{id :: String.t(), body :: binary()}]
        }

  @doc "Starts a stub."
  @spec start_link(options()) :: GenServer.on_start()
  def start_link(%{settings: settings} = options),
    do: GenServer.start_link(__MODULE__, options, name: settings.name)

  @impl GenServer
  @spec init(options()) :: {:ok, t()} | {:stop, term()}
  def init(%{settings: %Pool.Options{name: name} = settings} = options) do
    Process.flag(:trap_exit, true)
    Telemetry.look_once()

    with {:ok, coordinator} <- Coordinator.start_link(name) do
      handle = %{Pool.Handle.new(settings) | bridges: {name}}

      for {id, body} <- options.programs,
          do: Programs.Store.put(handle.programs, id, Programs.Store.stamp(), body)

      entry = %{name: name, default_timeout: settings.default_timeout, programs: handle.programs}
      Registry.put(:bridge, self(), Map.put(entry, :stub, name))
      LoadCounters.reset(handle.counters, @slot)
      LoadCounters.put_state(handle.counters, @slot, :ready)
      Pool.Handle.publish(handle)

      {:ok,
       %__MODULE__{
         name: name,
         handle: handle,
         coordinator: coordinator,
         answers: %Answers{default: options.answers},
         started: Deadline.now()
       }}
    else
      {:error, reason} -> {:stop, reason}
    end
  end

  @impl GenServer
  def terminate(_reason, state) do
    Pool.Handle.withdraw(state.handle)
    Registry.delete(:bridge, self())
    # The callers see the end of this process.
    for {_id, call} <- state.calls, do: Process.exit(call.run, :kill)
  end

  ## Questions to a bridge

  @impl GenServer
  def handle_call(:get_status, _from, state) do
    status = %{
      state: :running,
      os_pid: nil,
      pending: map_size(state.calls),
      restarts: 0,
      uptime_ms: Deadline.now() - state.started,
      late_replies: 0,
      unreadable_frames: 0,
      last_error: nil
    }

    {:reply, status, state}
  end

  def handle_call({:load_failure, _id}, _from, state), do: {:reply, nil, state}
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

  ## Requests, and their callers' end

  @impl GenServer
  def handle_info(message, state) when elem(message, 0) == :request do
    request = NodeMessage.read_request(message)

    if Request.valid?(request),
      do: {:noreply, request_came(state, request)},
      else: drop(message, state)
  end

  def handle_info({:abandon, ref}, state) when is_reference(ref) do
    id = Enum.find_value(state.calls, fn {id, call} -> if call.request.ref == ref, do: id end)
    {:noreply, give_up(state, id)}
  end

  def handle_info({{:caller_down, id}, _monitor, :process, _pid, _reason}, state),
    do: {:noreply, give_up(state, id)}

  def handle_info({:timeout, _timer, {:cast, id}}, state), do: {:noreply, give_up(state, id)}

  ## From a run, see DSPex.PythonBridge.Stub.Run

  def handle_info({:chunk, id, frame}, state) do
    with %{^id => %{request: %Request{ref: ref}}} when ref != nil <- state.calls,
         do: send(ref, {ref, :chunk, frame})

    {:noreply, state}
  end

  def handle_info({:tool_call, id, {pid, call_id}, frame}, state) do
    invocation = %Invocation{port: nil, id: id, frame: frame, max_frame_bytes: @max_frame_bytes}

    case state.calls do
      %{^id => %{request: %Request{tools?: true, ref: ref}}} ->
        send(ref, NodeMessage.tool_call(invocation, ref))

      _without_tools ->
        Invocation.refuse(invocation, :not_given)
    end

    {:noreply, put_in(state.tool_calls[call_id], pid)}
  end

  def handle_info({:answered, id, reply}, state), do: {:noreply, answer(state, id, reply)}

  ## From the caller's tools

  def handle_info({:tool_result, _port, _id, frame}, state) do
    with {:ok, %{"tool_result" => %{"call_id" => call_id} = result}} <- Payload.decode(frame),
         {pid, tool_calls} when pid != nil <- Map.pop(state.tool_calls, call_id) do
      result = if result["success"], do: {:ok, result["result"]}, else: {:error, result["error"]}
      send(pid, {call_id, result})
      {:noreply, %{state | tool_calls: tool_calls}}
    else
      _late -> {:noreply, state}
    end
  end

  ## Ends

  def handle_info({:EXIT, pid, reason}, %{coordinator: pid} = state), do: {:stop, reason, state}

  # A run that was killed, by a link of its function's for example, has sent no answer.
  def handle_info({:EXIT, pid, reason}, state) do
    case Enum.find(state.calls, fn {_id, call} -> call.run == pid end) do
      nil ->
        {:noreply, state}

      {id, _call} ->
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

  ## A request

  defp request_came(%{next_id: id} = state, request) do
    state = %{state | next_id: id + 1}
    frame = IO.iodata_to_binary(Protocol.request_frame(id, request.timeout, request.body))
    {:ok, %{"command" => command, "args" => args} = wishes} = Payload.decode(frame)
    call = %{id: id, request: request, command: command, wishes: wishes}

    if command == "execute_program",
      do: execute(state, call, Commands.read_run(args)),
      else: carry_out(state, call, Commands.run(command, args, commands_state(state)))
  end

  defp commands_state(state) do
    %{
      programs: state.handle.programs,
      runs: state.runs,
      counts: state.counts,
      in_flight: map_size(state.calls),
      started: state.started
    }
  end

  defp carry_out(state, call, result) do
    with {:ok, _result} <- result, change when change != nil <- call.request.change do
      change = put_elem(change, 2, elem(change, 2) || Programs.Store.stamp())
      Programs.Store.apply_change(state.handle.programs, change, call.request.body)
    end

    result = with {:ok, result} <- result, do: {:ok, result, %{}}
    at_once(state, call, result)
  end

  defp at_once(state, call, result) do
    reply = Run.reply(run(state, call, "", nil, []), result)
    reply(state, call.request, reply)
    count(state, call.command, reply)
  end

  ## A run

  defp execute(state, call, {:error, error}), do: at_once(state, call, {:error, error})

  defp execute(state, call, {:ok, args}) do
    fields = fields(state, args.program)
    lineage = Answers.lineage(call.request.pid)
    run = run(state, call, args.program, fields, lineage)

    case work(state, run, args) do
      {{:error, error}, state} -> at_once(state, call, {:error, error})
      {work, state} -> start(state, call, run, work)
    end
  end

  defp fields(state, program) do
    with {_stamp, body} <- Programs.Store.get(state.handle.programs, program),
         do: Definition.fields(Commands.definition(body))
  end

  defp run(state, %{id: id, request: request, wishes: wishes}, program, fields, lineage) do
    now = Deadline.now()

    %Run{
      server: self(),
      stub: state.name,
      id: id,
      program: program,
      fields: fields,
      stream?: request.stream?,
      meta?: wishes["meta"] == true or wishes["history"] == true,
      lineage: lineage,
      timeout: request.timeout,
      deadline: Deadline.new(request.timeout, now),
      began: now
    }
  end

  defp work(state, run, %{inputs: inputs} = args) when is_list(inputs) do
    {items, state} = Enum.map_reduce(inputs, state, &item(&2, run, &1))
    limits = %{max_concurrency: args.max_concurrency, item_timeout: args.item_timeout}
    {{:list, items, limits}, state}
  end

  defp work(state, run, %{inputs: inputs}), do: item(state, run, inputs)

  # What the peer would refuse is not a run that a test has expected.
  defp item(state, run, inputs) when is_map(inputs) do
    case Definition.check_inputs(run.fields, inputs) do
      :ok ->
        {answer, answers} = Answers.take(state.answers, run.lineage, run.program)
        {{inputs, answer}, counted(%{state | answers: answers}, run.program)}

      error ->
        {error, state}
    end
  end

  defp item(state, _run, _inputs) do
    text = "inputs: expected an object of the signature's input fields"
    {{:error, Error.new(:invalid_args, text)}, state}
  end

  defp counted(state, program) do
    {count, _last} = Map.get(state.runs, program, {0, nil})
    put_in(state.runs[program], {count + 1, Commands.time()})
  end

  defp start(state, %{id: id, request: request}, run, work) do
    call = %{request: request, run: Run.start_link(run, work), watch: watch_caller(request, id)}
    put_in(state.calls[id], call)
  end

  # A caller keeps its own time; a cast has no caller that could.
  defp watch_caller(%Request{pid: nil, timeout: timeout}, id),
    do: :erlang.start_timer(timeout, self(), {:cast, id})

  defp watch_caller(%Request{pid: pid}, id),
    do: :erlang.monitor(:process, pid, tag: {:caller_down, id})

  ## The end of a run

  # The caller has given up.
  defp give_up(state, id) do
    case Map.pop(state.calls, id) do
      {nil, _calls} ->
        state

      {call, calls} ->
        Process.exit(call.run, :kill)
        count_out(state, call.request)
        ended(%{state | calls: calls}, call)
    end
  end

  defp answer(state, id, reply) do
    case Map.pop(state.calls, id) do
      {nil, _calls} ->
        state

      {call, calls} ->
        reply(state, call.request, reply)
        %{state | calls: calls} |> ended(call) |> count("execute_program", reply)
    end
  end

  defp ended(state, %{request: request, run: run, watch: watch}) do
    if request.pid, do: Process.demonitor(watch), else: :erlang.cancel_timer(watch)
    %{state | tool_calls: Map.reject(state.tool_calls, fn {_id, pid} -> pid == run end)}
  end

  defp reply(state, request, reply) do
    count_out(state, request)
    if request.ref, do: send(request.ref, {request.ref, reply})
    :ok
  end

  # The caller has counted it in.
  defp count_out(state, %Request{retry: :pool}),
    do: LoadCounters.done(state.handle.counters, @slot)

  defp count_out(_state, _request), do: :ok

  defp count(state, command, reply) do
    failed = if match?({:frame, _}, reply) and Protocol.success?(elem(reply, 1)), do: 0, else: 1
    none = %{"count" => 0, "errors" => 0, "p50_ms" => 0.0, "p99_ms" => 0.0}
    counts = Map.get(state.counts, command, none)
    counts = %{counts | "count" => counts["count"] + 1, "errors" => counts["errors"] + failed}
    %{state | counts: Map.put(state.counts, command, counts)}
  end
end
