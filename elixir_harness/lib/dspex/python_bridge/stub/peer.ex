defmodule DSPex.PythonBridge.Stub.Peer do
  @moduledoc false
  # The peer of a stub: a process in the place of a port (`DSPex.PythonBridge.Bridge.Peer`), which belongs to the bridge that has
  # started it. It answers all commands; each run has a process of its own (`DSPex.PythonBridge.Stub.Run`).

  use GenServer

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Stub.{Fields, Run}

  # programs: their definitions, and how often they were run and when last. runs: the ids of the requests by the processes.
  # tool_calls: who waits for the result of each.
  @enforce_keys [:bridge, :stub, :default, :started]
  defstruct @enforce_keys ++ [programs: %{}, runs: %{}, tool_calls: %{}]

  @doc "Starts the peer of the calling process, a bridge."
  @spec start_link(atom(), Run.default()) :: pid()
  def start_link(stub, default) do
    state = %__MODULE__{bridge: self(), stub: stub, default: default, started: now()}
    {:ok, pid} = GenServer.start_link(__MODULE__, state)
    pid
  end

  @impl GenServer
  def init(state) do
    Process.flag(:trap_exit, true)
    {:ok, state}
  end

  @impl GenServer
  def handle_info({bridge, {:command, frame}}, %{bridge: bridge} = state) do
    {:ok, message} = Payload.decode(IO.iodata_to_binary(frame))
    {:noreply, came(state, message)}
  end

  def handle_info({bridge, :close}, %{bridge: bridge} = state), do: {:stop, :normal, state}

  # From a run.
  def handle_info({:tool_call, call_id, pid, frame}, state) do
    send_frame(state, frame)
    {:noreply, put_in(state.tool_calls[call_id], pid)}
  end

  def handle_info({:EXIT, pid, reason}, state) do
    {id, runs} = Map.pop(state.runs, pid)
    text = "stub #{inspect(state.stub)}: the answer's process ended: #{inspect(reason)}"
    if id && reason != :normal, do: fail(state, id, Error.new(:internal, text))
    {:noreply, %{state | runs: runs}}
  end

  @impl GenServer
  def terminate(_reason, state), do: for({pid, _id} <- state.runs, do: Process.exit(pid, :kill))

  defp came(state, %{"cancel" => id}) do
    case Enum.find(state.runs, &match?({_pid, ^id}, &1)) do
      {pid, id} ->
        Process.exit(pid, :kill)
        fail(state, id, Error.new(:cancelled, "cancelled"))
        %{state | runs: Map.delete(state.runs, pid)}

      nil ->
        state
    end
  end

  defp came(state, %{"tool_result" => %{"call_id" => call_id} = result}) do
    {pid, tool_calls} = Map.pop(state.tool_calls, call_id)
    result = if result["success"], do: {:ok, result["result"]}, else: {:error, result["error"]}
    if pid, do: send(pid, {call_id, result})
    %{state | tool_calls: tool_calls}
  end

  defp came(state, %{"id" => id, "command" => "execute_program", "args" => args} = request) do
    program = state.programs[args["program_id"]]
    of_peer = %{peer: self(), bridge: state.bridge, stub: state.stub, default: state.default}
    pid = Run.start_link(of_peer, request, program && program.fields)
    state = put_in(state.runs[pid], id)
    ran = program && %{program | count: program.count + 1, last: now()}
    if ran, do: put_in(state.programs[args["program_id"]], ran), else: state
  end

  defp came(state, %{"id" => id, "command" => command, "args" => args} = request) do
    case run(state, command, args) do
      {:error, error} ->
        fail(state, id, error)
        state

      {result, state} ->
        meta = if request["meta"], do: [{"meta", %{"duration_ms" => 0.0}}], else: []
        reply = [{"id", id}, {"success", true}, {"result", result}] ++ meta
        send_frame(state, Run.object(reply))
        state
    end
  end

  defp run(state, "ping", _args), do: {%{"status" => "ok", "timestamp" => now()}, state}

  defp run(state, "create_program", %{"id" => id} = args) do
    program = %{args: args, fields: Fields.of(args), created: now(), count: 0, last: nil}
    {%{"program_id" => id, "status" => "created"}, put_in(state.programs[id], program)}
  end

  defp run(_state, "create_program", _args),
    do: {:error, Error.new(:invalid_args, "id: expected text")}

  defp run(state, "list_programs", args) do
    listed = Enum.sort_by(Map.take(state.programs, named(state, args)), &elem(&1, 1).created)
    result = %{"programs" => Enum.map(listed, &elem(&1, 0))}
    details = for {id, program} <- listed, do: details(id, program)
    {if(args["details"], do: Map.put(result, "details", details), else: result), state}
  end

  defp run(state, "get_stats", _args) do
    {%{
       "programs_count" => map_size(state.programs),
       "memory_usage" => %{"rss" => 0, "vms" => 0},
       "uptime" => now() - state.started,
       "in_flight" => map_size(state.runs),
       "queued" => 0,
       "commands" => %{},
       "versions" => %{},
       "pid" => nil
     }, state}
  end

  defp run(state, "cleanup", args) do
    kept = Map.drop(state.programs, named(state, args))
    removed = map_size(state.programs) - map_size(kept)
    {%{"status" => "cleaned", "programs_removed" => removed}, %{state | programs: kept}}
  end

  defp run(_state, command, _args),
    do: {:error, Error.new(:unknown_command, "Unknown command: #{command}")}

  defp named(state, args), do: args["program_ids"] || Map.keys(state.programs)

  defp details(id, %{args: args} = program) do
    %{
      "id" => id,
      "program_type" => args["program_type"] || "predict",
      "signature" => args["signature"],
      "created_at" => program.created,
      "execution_count" => program.count,
      "last_executed" => program.last,
      "loaded" => true
    }
  end

  defp fail(state, id, error),
    do: send_frame(state, Run.object([{"id", id} | Run.failure(error)]))

  defp send_frame(state, frame), do: send(state.bridge, {self(), {:data, frame}})
  defp now, do: System.system_time(:microsecond) / 1_000_000
end
