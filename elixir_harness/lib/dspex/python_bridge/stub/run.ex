defmodule DSPex.PythonBridge.Stub.Run do
  @moduledoc false
  # One `execute_program` of a stub, in a process of its own, which its peer kills when the caller gives up.
  #
  # A mistake of the test's (an answer raises, or is none, or there is none) is an error of the call. It is logged and noted for
  # the verification, since the code under test may take it for an error of the LM.

  require Logger

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Program.Dump
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Stub.{Expectations, Fields, Metric}

  # Of a run without LM calls.
  @meta %{"queue_ms" => 0.0, "wait_ms" => 0.0, "lm_usage" => %{}, "lm_calls" => 0}
        |> Map.merge(%{"cache_hits" => 0, "finish_reasons" => [], "fallbacks" => 0})
        |> Map.put("cost_usd", 0.0)
  @not_inputs "inputs: expected an object of the signature's input fields"
  # Errors with texts of their own.
  @types [:timeout, :overloaded, :python_process_died]
  @expected "expected {:ok, outputs}, {:ok, outputs, meta} or {:error, error}"

  @typedoc "The answers of a stub to the runs that no test has answered."
  @type default :: (program :: String.t(), inputs :: map() -> term()) | nil

  @doc """
  Starts the process of a run. `of_peer`: the pids of its `:peer` and `:bridge`, the name of its `:stub`, and the `:default`
  answers of that. `fields`: those of the program, if its definition is known.
  """
  @spec start_link(map(), map(), Fields.t() | nil) :: pid()
  def start_link(of_peer, %{"id" => id, "args" => args} = request, fields) do
    run = %{id: id, program: args["program_id"], fields: fields, stream?: request["stream"]}
    run = Map.merge(of_peer, run)

    spawn_link(fn ->
      # A killed item of a list ends alone.
      Process.flag(:trap_exit, true)
      {us, result} = :timer.tc(fn -> result(run, args) end)
      write(run, reply(id, result, Map.put(@meta, "duration_ms", us / 1000)))
    end)
  end

  defp write(run, frame) do
    send(run.bridge, {run.peer, {:data, frame}})
    :ok
  end

  defp result(_run, %{"optimize" => optimize}) when optimize != nil,
    do: refuse("optimize: a stub cannot optimize; test with a bridge and offline/script")

  defp result(run, %{"inputs" => inputs} = args) when is_list(inputs),
    do: list(run, answers(run, inputs), args)

  defp result(run, %{"inputs" => %{} = inputs}) do
    [{inputs, answer}] = answers(run, [inputs])

    with {:ok, outputs, _meta} = answered <- answer(run, inputs, answer) do
      if not Process.get({__MODULE__, :chunks?}, false), do: whole(run, outputs)
      answered
    end
  end

  defp result(_run, _args), do: refuse(@not_inputs <> ", or a list of such objects")

  # What the peer would refuse is not a run that a test has expected.
  defp answers(run, inputs) do
    lineage = Expectations.lineage(caller(run))
    # By these, mocks and repositories that an answer uses find their owner.
    Process.put(:"$callers", lineage)

    for item <- inputs do
      wrong = if is_map(item), do: Fields.wrong(run.fields, :inputs, item), else: @not_inputs
      taken = wrong == nil && Expectations.take(run.stub, run.program, lineage)
      {item, taken || refuse(wrong)}
    end
  end

  # Nobody, if the call is a cast, or is over.
  defp caller(run) do
    GenServer.call(run.bridge, {:caller, run.id})
  catch
    :exit, _the_bridge_ends -> nil
  end

  defp refuse(text), do: {:error, Error.new(:invalid_args, text)}

  # An answer that was not sent in chunks is one for each field, in their order, as it is with a cache.
  defp whole(run, outputs) do
    order = with %{outputs: {names, _required}} <- run.fields, do: names, else: (_any -> [])

    for field <- (Map.keys(outputs) -- order) ++ order,
        is_binary(outputs[field]),
        do: stream(run, JSON.encode!(%{"field" => field, "chunk" => outputs[field]}))
  end

  ## A list of inputs

  defp list(run, answers, args) do
    expected = args["expected"] || List.duplicate(nil, length(answers))
    timeout = with ms when is_number(ms) <- args["item_timeout_ms"] || :infinity, do: ceil(ms)

    answers
    |> Enum.zip(expected)
    |> Enum.with_index()
    |> Task.async_stream(fn {item, index} -> {index, item(run, args["metric"], item)} end,
      max_concurrency: args["max_concurrency"] || max(length(answers), 1),
      timeout: timeout,
      on_timeout: :kill_task,
      ordered: false,
      zip_input_on_exit: true
    )
    |> Enum.reduce_while(%{}, fn ended, results ->
      case ended(run, ended, timeout) do
        {_index, {:over, error}} ->
          {:halt, {:error, error}}

        {index, {kind, value, scored}} ->
          scored = if args["metric"], do: Map.merge(%{"score" => 0.0}, scored), else: %{}
          result = Map.merge(keys(kind, value), scored)
          # The first key says what it is.
          stream(run, ~s({"index":#{index},) <> binary_slice(JSON.encode!(result), 1..-1//1))
          {:cont, Map.put(results, index, result)}
      end
    end)
    |> case do
      {:error, error} -> {:error, error}
      results -> {:ok, all(for(n <- 1..map_size(results)//1, do: results[n - 1]), args), %{}}
    end
  end

  defp ended(_run, {:ok, result}, _timeout), do: result

  defp ended(run, {:exit, {{_item, index}, reason}}, timeout) do
    error =
      if reason == :timeout,
        do: Error.new(:timeout, "not finished within #{timeout} ms"),
        else: internal(run, "the answer's process ended: #{inspect(reason)}")

    {index, {:error, error, %{}}}
  end

  defp item(run, metric, {{inputs, answer}, expected}) do
    # The peer streams items, not their chunks.
    run = %{run | stream?: false}

    with {:ok, outputs, _meta} <- answer(run, inputs, answer),
         {:ok, scored} <-
           Metric.score(metric, expected, inputs, outputs, &call_tool(run, &1, &2)) do
      {:ok, outputs, scored}
    else
      {:error, error} -> {:error, error, %{}}
      {:over, error} -> {:over, error}
    end
  end

  defp all(results, %{"metric" => metric}) when metric != nil do
    scores = Enum.map(results, & &1["score"])
    mean = if scores != [], do: Enum.sum(scores) / length(scores)
    failed = Enum.count(results, &(not &1["success"]))
    %{"score" => mean, "failed" => failed, "results" => results}
  end

  defp all(results, _no_metric), do: %{"results" => results}

  ## One call of an answer's function

  defp answer(_run, _inputs, {:error, error}), do: {:error, error}

  defp answer(%{default: nil} = run, _inputs, {nil, owner, why}) do
    text = "Program not found: #{run.program}: the stub #{inspect(run.stub)} has no answer for it"
    mistake(run, owner, Error.new(:program_not_found, text <> why))
  end

  defp answer(run, inputs, {fun, owner, _why}) do
    Process.put(__MODULE__, run)

    case read(run, if(fun, do: fun.(inputs), else: run.default.(run.program, inputs))) do
      text when is_binary(text) -> mistake(run, owner, internal(run, text))
      {:ok, outputs, meta} -> {:ok, Fields.gone_on(run.fields, inputs, outputs), meta}
      error -> error
    end
  catch
    kind, reason ->
      banner = Exception.format_banner(kind, reason, __STACKTRACE__)
      stack = "\n" <> Exception.format_stacktrace(__STACKTRACE__)
      mistake(run, owner, internal(run, "the answer's function: #{banner}"), stack)
  end

  # What an answer is, or a text about what is wrong with it.
  defp read(run, {:ok, outputs}), do: read(run, {:ok, outputs, %{}})

  defp read(run, {:ok, outputs, meta}) do
    with {:ok, outputs} <- as_json(outputs, "outputs"),
         {:ok, meta} <- as_json(meta, "meta"),
         nil <- Fields.wrong(run.fields, :outputs, outputs),
         do: {:ok, outputs, meta}
  end

  defp read(_run, {:error, %Error{type: type} = error}) when type != :bridge_not_running do
    with {:ok, meta} <- as_json(error.meta || %{}, "error.meta"),
         do: {:error, %{error | meta: meta}}
  end

  defp read(_run, {:error, text}) when is_binary(text), do: {:error, Error.new(:internal, text)}
  defp read(_run, {:error, type}) when type in @types, do: {:error, Error.new(type)}
  defp read(_run, other), do: "#{@expected}, got #{inspect(other, limit: 10)}"

  # As it comes from the wire.
  defp as_json(%{} = map, what) do
    case Payload.encode(Dump.any(map), what) do
      {:ok, json} -> Payload.decode(IO.iodata_to_binary(json))
      {:error, error} -> error.message
    end
  end

  defp as_json(_other, what), do: "#{what}: expected a map"

  defp internal(run, text),
    do: Error.new(:internal, "stub #{inspect(run.stub)}, program #{run.program}: #{text}")

  defp mistake(run, owner, error, stack \\ "") do
    Logger.error(error.message <> stack)
    if owner, do: Expectations.failed(owner, run.stub, error.message)
    {:error, error}
  end

  ## Frames

  @doc "The frame of a reply: a result with what `meta` has for it, or an error; `meta` is that of any other reply."
  @spec reply(pos_integer(), {:ok, term(), map()} | {:error, Error.t()}, map()) :: binary()
  def reply(id, result, meta \\ %{})

  # Success comes first: the bridge looks for it there.
  def reply(id, {:ok, result, of_answer}, meta) do
    meta = JSON.encode!(Map.merge(meta, of_answer))
    ~s({"id":#{id},"success":true,"result":#{JSON.encode!(result)},"meta":#{meta}})
  end

  def reply(id, {:error, error}, meta) do
    meta = Map.merge(meta, error.meta || %{})

    ~s({"id":#{id},) <>
      binary_slice(JSON.encode!(Map.put(keys(:error, error), "meta", meta)), 1..-1//1)
  end

  defp keys(:ok, outputs), do: %{"success" => true, "result" => outputs}

  defp keys(:error, %Error{type: type, message: text, retryable: retryable}) do
    keys = %{"success" => false, "error" => text, "error_type" => type}
    usual? = type != :lm_error and retryable == Error.new(type, text).retryable
    if usual?, do: keys, else: Map.put(keys, "retryable", retryable)
  end

  ## In an answer's function

  @doc "Sends a chunk of the run that the calling process answers."
  @spec chunk(String.t(), String.t()) :: :ok
  def chunk(field, text) do
    run = current("chunk/2")
    Process.put({__MODULE__, :chunks?}, true)
    stream(run, JSON.encode!(%{"field" => field, "chunk" => text}))
  end

  @doc "Sends the present step of the run that the calling process answers."
  @spec status(String.t()) :: :ok
  def status(text), do: stream(current("status/1"), JSON.encode!(%{"status" => text}))

  @doc "Calls a tool of the caller, and waits for its result."
  @spec call_tool(String.t(), map()) :: {:ok, term()} | {:error, String.t()}
  def call_tool(name, args), do: call_tool(current("call_tool/2"), name, args)

  # A process has one tool call at a time, so that its pid is the id of that.
  defp call_tool(run, name, args) do
    call_id = List.to_string(:erlang.pid_to_list(self()))
    call = JSON.encode!(%{"call_id" => call_id, "name" => name, "args" => args})
    write(run, ~s({"id":#{run.id},"tool_call":#{call}}))

    receive do
      {^call_id, result} -> result
    end
  end

  @doc "The process that waits for the result of a tool call."
  @spec caller_of(call_id :: String.t()) :: pid()
  def caller_of(call_id), do: call_id |> String.to_charlist() |> :erlang.list_to_pid()

  defp stream(%{stream?: true} = run, json), do: write(run, ~s({"id":#{run.id},"stream":#{json}}))
  defp stream(_run, _json), do: :ok

  defp current(function) do
    Process.get(__MODULE__) ||
      raise ArgumentError, "Stub.#{function}: only for the process that runs an answer's function"
  end
end
