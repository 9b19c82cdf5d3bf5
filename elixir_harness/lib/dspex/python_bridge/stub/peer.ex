defmodule DSPex.PythonBridge.Stub.Peer do
  @moduledoc false
  # The peer of a stub: a process in the place of a port (`DSPex.PythonBridge.Bridge.Peer`), which belongs to the bridge that has
  # started it. It answers all commands; each run has a process of its own (`DSPex.PythonBridge.Stub.Run`).

  use GenServer

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Stub.{Fields, Run}

  # What a stub has no numbers for.
  @stats %{"memory_usage" => %{"rss" => 0, "vms" => 0}, "queued" => 0, "commands" => %{}}

  # programs: their details and fields, by id. runs: the ids of the requests, by process.
  @enforce_keys [:bridge, :stub, :default, :started]
  defstruct @enforce_keys ++ [programs: %{}, runs: %{}]

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
  def handle_info({bridge, {:command, frame}}, %{bridge: bridge} = state),
    do: {:noreply, came(state, frame |> IO.iodata_to_binary() |> JSON.decode!())}

  def handle_info({bridge, :close}, %{bridge: bridge} = state), do: {:stop, :normal, state}

  def handle_info({:EXIT, pid, reason}, state) do
    {id, runs} = Map.pop(state.runs, pid)
    text = "stub #{inspect(state.stub)}: the answer's process ended: #{inspect(reason)}"
    if id && reason != :normal, do: reply(state, id, {:error, Error.new(:internal, text)})
    {:noreply, %{state | runs: runs}}
  end

  @impl GenServer
  def terminate(_reason, state), do: for({pid, _id} <- state.runs, do: Process.exit(pid, :kill))

  defp came(state, %{"cancel" => id}) do
    case Enum.find(state.runs, &match?({_pid, ^id}, &1)) do
      {pid, id} ->
        Process.exit(pid, :kill)
        reply(state, id, {:error, Error.new(:cancelled, "cancelled")})
        %{state | runs: Map.delete(state.runs, pid)}

      nil ->
        state
    end
  end

  defp came(state, %{"tool_result" => %{"call_id" => call_id} = result}) do
    result = if result["success"], do: {:ok, result["result"]}, else: {:error, result["error"]}
    send(Run.caller_of(call_id), {call_id, result})
    state
  end

  defp came(state, %{"id" => id, "command" => "execute_program", "args" => args} = request) do
    program = state.programs[args["program_id"]]
    of_peer = %{peer: self(), bridge: state.bridge, stub: state.stub, default: state.default}
    pid = Run.start_link(of_peer, request, program && program.fields)
    put_in(state.runs[pid], id)
  end

  defp came(state, %{"id" => id, "command" => command, "args" => args}) do
    {result, state} = run(state, command, args)
    reply(state, id, result)
    state
  end

  defp run(state, "ping", _args), do: {{:ok, %{"status" => "ok", "timestamp" => now()}}, state}

  defp run(state, "create_program", %{"id" => id} = args) do
    details = Map.take(args, ["id", "program_type", "signature"])
    details = Map.merge(%{"program_type" => "predict", "created_at" => now()}, details)
    program = %{details: details, fields: Fields.of(args)}
    {{:ok, %{"program_id" => id, "status" => "created"}}, put_in(state.programs[id], program)}
  end

  defp run(state, "list_programs", args) do
    programs = for {_id, %{details: details}} <- named(state, args), do: details
    programs = Enum.sort_by(programs, & &1["created_at"])
    result = %{"programs" => Enum.map(programs, & &1["id"])}
    {{:ok, if(args["details"], do: Map.put(result, "details", programs), else: result)}, state}
  end

  defp run(state, "get_stats", _args) do
    counts = %{"programs_count" => map_size(state.programs), "in_flight" => map_size(state.runs)}
    {{:ok, @stats |> Map.merge(counts) |> Map.put("uptime", now() - state.started)}, state}
  end

  defp run(state, "cleanup", args) do
    removed = named(state, args)
    state = %{state | programs: Map.drop(state.programs, Map.keys(removed))}
    {{:ok, %{"status" => "cleaned", "programs_removed" => map_size(removed)}}, state}
  end

  defp run(state, "create_program", _args),
    do: {{:error, Error.new(:invalid_args, "id: expected text")}, state}

  defp run(state, command, _args),
    do: {{:error, Error.new(:unknown_command, "Unknown command: #{command}")}, state}

  defp named(state, %{"program_ids" => ids}), do: Map.take(state.programs, ids)
  defp named(state, _all), do: state.programs

  defp reply(state, id, {:ok, result}), do: write(state, Run.reply(id, {:ok, result, %{}}))
  defp reply(state, id, {:error, error}), do: write(state, Run.reply(id, {:error, error}))

  defp write(state, frame), do: send(state.bridge, {self(), {:data, frame}})
  defp now, do: System.system_time(:microsecond) / 1_000_000
end
