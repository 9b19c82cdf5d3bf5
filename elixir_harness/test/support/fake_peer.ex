defmodule DSPex.Test.FakePeer do
  @moduledoc """
  Peers inside the BEAM, each with one bad habit, for tests that need no OS process: a bridge has one in a millisecond. Those of
  tests/fakes with the same names are for tests of ports, of OS processes and of other nodes.

    * `:echo` answers each request with its own args, and with the deadline that it came with
    * `:silent` answers the first `answers:` requests (1 by default: the bridge's own ping), and nothing afterwards
    * `:who` keeps programs as ids with their signatures. It never answers `hold`; `die` ends it
    * `:plays` plays a script, the steps in a run's `args.play`, `args.config.play` or `args.optimize.options.play`:

          ["stream", map]               a chunk
          ["count", n]                  n chunks of the field `n`, with their numbers as strings
          ["raw", text]                 a frame of these bytes, ID in it being the call's id
          ["long", kind, n]             a chunk ("stream") or a reply with a text of n characters
          ["tool", call_id, name, args] a call of a tool, not waited for
          ["result", call_id]           waits for that tool's result
          ["go", name]                  waits for a `go` with this name in its args
          ["reply", result, meta]       the reply; without a result, all results of tools that have come, by call_id
          ["sizes"]                     a reply with the length of each result of a tool, or its error, by call_id
          ["asked"]                     a reply whose result is what the request asks for
          ["fail", error_type, meta]    an error reply; meta may be left out
          ["die"]                       the end of the peer, with exit status 5
          ["first", steps, others]      steps in the first peer of the bridge, others in its successors
          ["journaled", steps, others]  steps if the request has a journal, others if it has none
          ["journal", entry]            an entry of the run's journal
          ["journal"]                   a reply with the journal of the request

      It answers `heard` with all control frames that have come, in their order, and everything else at once.
  """

  use GenServer

  defstruct [:bridge, :kind, :starts, answers: 1] ++
              [programs: %{}, heard: [], results: %{}, gone: [], plays: []]

  @doc "Options for a bridge without a name, or a pool, whose peers are of this kind."
  def opts(kind, opts \\ []) do
    {answers, opts} = Keyword.pop(opts, :answers, 1)
    starts = :counters.new(1, [])

    transport = fn ->
      :counters.add(starts, 1, 1)
      state = %__MODULE__{bridge: self(), kind: kind, answers: answers}
      state = %{state | starts: :counters.get(starts, 1)}
      {:ok, pid} = GenServer.start_link(__MODULE__, state)
      pid
    end

    [name: nil, transport: transport] ++ opts
  end

  @doc "The peer that a bridge has."
  def of(bridge) do
    {:links, links} = bridge |> GenServer.whereis() |> Process.info(:links)

    Enum.find(links, fn pid ->
      is_pid(pid) and :proc_lib.translate_initial_call(pid) == {__MODULE__, :init, 1}
    end)
  end

  @doc "Kills the peer of a bridge."
  def kill(bridge), do: Process.exit(of(bridge), :kill)

  @impl GenServer
  def init(state), do: {:ok, state}

  @impl GenServer
  def handle_info({bridge, {:command, frame}}, %{bridge: bridge} = state) do
    message = frame |> IO.iodata_to_binary() |> JSON.decode!()
    {:noreply, state |> came(message) |> go_on()}
  end

  def handle_info({bridge, :close}, %{bridge: bridge} = state), do: {:stop, :normal, state}

  defp came(state, %{"tool_result" => result} = message) do
    results = Map.put(state.results, result["call_id"], result)
    %{state | results: results, heard: state.heard ++ [message]}
  end

  defp came(state, message) when not is_map_key(message, "id"),
    do: %{state | heard: state.heard ++ [message]}

  defp came(%{kind: :silent, answers: 0} = state, _request), do: state

  defp came(%{kind: :silent} = state, request),
    do: reply(%{state | answers: state.answers - 1}, request, %{"status" => "ok"})

  defp came(%{kind: :echo} = state, request) do
    reply(state, request, %{"args" => request["args"], "timeout_ms" => request["timeout_ms"]})
  end

  defp came(%{kind: :plays} = state, %{"command" => "execute_program", "args" => args} = request),
    do: %{state | plays: state.plays ++ [{request, script(args)}]}

  defp came(%{kind: :plays} = state, request) do
    gone = if request["command"] == "go", do: [request["args"]["name"]], else: []
    result = %{"heard" => state.heard, "id" => request["id"], "starts" => state.starts}
    reply(%{state | gone: gone ++ state.gone}, request, result)
  end

  defp came(%{kind: :who} = state, %{"command" => command, "args" => args} = request) do
    case command do
      "die" ->
        die(state, 4)

      "hold" ->
        state

      "create_program" ->
        result = %{"program_id" => args["id"], "status" => "created"}
        reply(put_in(state.programs[args["id"]], args["signature"]), request, result)

      "execute_program" when is_map_key(state.programs, :erlang.map_get("program_id", args)) ->
        reply(state, request, %{"signature" => state.programs[args["program_id"]]})

      "execute_program" ->
        fail(state, request, "Program not found: #{args["program_id"]}", "program_not_found")

      "list_programs" ->
        reply(state, request, %{"programs" => Map.keys(state.programs)})

      "cleanup" ->
        ids = args["program_ids"] || Map.keys(state.programs)
        programs = Map.drop(state.programs, ids)
        reply(%{state | programs: programs}, request, %{"status" => "cleaned"})

      _other ->
        reply(state, request, %{"peer" => inspect(self())})
    end
  end

  ## Scripts

  defp script(%{"play" => play}), do: play
  defp script(%{"config" => %{"play" => play}}), do: play
  defp script(%{"optimize" => %{"options" => %{"play" => play}}}), do: play

  # Each as far as it goes.
  defp go_on(%{plays: plays} = state) do
    plays = for {request, steps} <- plays, left = play(state, request, steps), do: {request, left}
    %{state | plays: plays}
  end

  defp play(_state, _request, []), do: nil

  defp play(state, request, [["first", first, others] | steps]),
    do: play(state, request, if(state.starts == 1, do: first, else: others) ++ steps)

  defp play(state, request, [["journaled", with_it, without] | steps]),
    do: play(state, request, if(request["journal"], do: with_it, else: without) ++ steps)

  defp play(state, request, [step | steps] = left) do
    waits? =
      match?(["result", id] when not is_map_key(state.results, id), step) or
        (hd(step) == "go" and Enum.at(step, 1) not in state.gone)

    if waits? do
      left
    else
      step(state, request, step)
      play(state, request, steps)
    end
  end

  defp step(_state, _request, [wait, _for]) when wait in ["result", "go"], do: :ok
  defp step(state, request, ["stream", chunk]), do: stream(state, request, chunk)

  defp step(state, request, ["count", n]) do
    for i <- 0..(n - 1)//1, do: stream(state, request, %{"field" => "n", "chunk" => "#{i}"})
  end

  defp step(state, request, ["raw", text]),
    do: write(state, String.replace(text, "ID", "#{request["id"]}"))

  defp step(state, request, ["long", "stream", n]),
    do: stream(state, request, %{"field" => "a", "chunk" => String.duplicate("x", n)})

  defp step(state, request, ["long", _reply, n]),
    do: reply(state, request, String.duplicate("x", n))

  defp step(state, request, ["tool", call_id, name, args]) do
    call = %{"call_id" => call_id, "name" => name, "args" => args}
    write(state, request, ~s("tool_call":#{JSON.encode!(call)}))
  end

  defp step(state, request, ["reply"]), do: step(state, request, ["reply", state.results])

  defp step(state, request, ["reply", result]),
    do: reply(state, request, result, %{"asked" => asked(request)})

  defp step(state, request, ["reply", result, meta]), do: reply(state, request, result, meta)

  defp step(state, request, ["sizes"]) do
    size = fn result -> result["error"] || String.length(result["result"]) end
    reply(state, request, Map.new(state.results, fn {id, it} -> {id, size.(it)} end))
  end

  defp step(state, request, ["journal", entry]),
    do: write(state, request, ~s("journal":#{JSON.encode!(entry)}))

  defp step(state, request, ["journal"]), do: reply(state, request, request["journal"])
  defp step(state, request, ["asked"]), do: reply(state, request, asked(request))
  defp step(state, request, ["fail", type]), do: fail(state, request, "no", type)
  defp step(state, request, ["fail", type, meta]), do: fail(state, request, "no", type, meta)
  defp step(state, _request, ["die"]), do: die(state, 5)

  defp asked(request),
    do: for(key <- ~w(stream meta history lm_events), is_map_key(request, key), do: key)

  ## Frames

  defp stream(state, request, chunk),
    do: write(state, request, ~s("stream":#{JSON.encode!(chunk)}))

  defp reply(state, request, result, meta \\ nil) do
    meta = if meta, do: ~s(,"meta":#{JSON.encode!(meta)}), else: ""
    write(state, request, ~s("success":true,"result":#{JSON.encode!(result)}#{meta}))
    state
  end

  defp fail(state, request, text, type, meta \\ nil) do
    meta = if meta, do: ~s(,"meta":#{JSON.encode!(meta)}), else: ""
    write(state, request, ~s("success":false,"error":"#{text}","error_type":"#{type}"#{meta}))
    state
  end

  defp write(state, request, rest), do: write(state, ~s({"id":#{request["id"]},#{rest}}))
  defp write(state, frame), do: send(state.bridge, {self(), {:data, frame}})

  defp die(state, status) do
    send(state.bridge, {self(), {:exit_status, status}})
    exit(:normal)
  end
end
