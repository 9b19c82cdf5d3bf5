defmodule DSPex.PythonBridge.Stub.Run do
  @moduledoc false
  # One `execute_program` of a stub, in a process of its own, which its peer kills when the caller gives up. It sends chunks and
  # its reply to the bridge, and tool calls to its peer.
  #
  # A mistake of the test's (an answer raises, or is none, or there is none) is an error of the call. It is logged and noted for
  # the verification, since the code under test may take it for an error of the LM.

  require Logger

  alias DSPex.PythonBridge.{Error, Evaluate}
  alias DSPex.PythonBridge.Program.Dump
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Stub.{Expectations, Fields, Metric}

  # Of a run without LM calls.
  @meta Map.merge(
          %{"queue_ms" => 0.0, "wait_ms" => 0.0, "lm_usage" => %{}, "lm_calls" => 0},
          %{"cache_hits" => 0, "finish_reasons" => [], "fallbacks" => 0, "cost_usd" => 0.0}
        )
  # What the peer sums over the runs of a list.
  @summed ~w(lm_calls cache_hits cost_usd lm_usage fallbacks finish_reasons)
  # Parts of it that are there only if they are asked for.
  @parts ["history", "lm_events"]
  # Errors with texts of their own.
  @types [:timeout, :overloaded, :python_process_died]
  @expected "expected {:ok, outputs}, {:ok, outputs, meta} or {:error, error}: maps, and an " <>
              "error that is a DSPex.PythonBridge.Error, a text, " <>
              Enum.map_join(@types, " or ", &inspect/1)

  @typedoc "The answers of a stub to the runs that no test has answered."
  @type default :: (program :: String.t(), inputs :: map() -> term()) | nil
  @typedoc "`fields`: those of the program, if its definition is known."
  @type t :: %{
          peer: pid(),
          bridge: pid(),
          stub: atom(),
          default: default(),
          id: pos_integer(),
          program: String.t(),
          fields: Fields.t() | nil,
          stream?: boolean()
        }

  @doc "Starts the process of a run."
  @spec start_link(map(), map(), Fields.t() | nil) :: pid()
  def start_link(of_peer, %{"id" => id, "args" => args} = request, fields) do
    run = %{
      id: id,
      program: args["program_id"],
      fields: fields,
      stream?: request["stream"] == true
    }

    run = Map.merge(of_peer, run)

    spawn_link(fn ->
      began = System.monotonic_time(:microsecond)
      result = result(run, args)
      ms = (System.monotonic_time(:microsecond) - began) / 1000
      send_frame(run, object([{"id", id} | reply(result)] ++ meta(request, result, ms)))
    end)
  end

  defp reply({:ok, result, _meta}), do: [{"success", true}, {"result", result}]
  defp reply({:error, error}), do: failure(error)

  defp meta(request, result, ms) do
    {asked, not_asked} = Enum.split_with(@parts, &request[&1])
    own = with {:error, error} <- result, do: {:error, error, error.meta || %{}}
    meta = asked |> Map.new(&{&1, []}) |> Map.merge(@meta) |> Map.put("duration_ms", ms)
    meta = Map.merge(meta, Map.drop(elem(own, 2), not_asked))
    if asked != [] or request["meta"], do: [{"meta", meta}], else: []
  end

  defp send_frame(run, frame) do
    send(run.bridge, {run.peer, {:data, frame}})
    :ok
  end

  defp result(_run, %{"optimize" => optimize}) when optimize != nil,
    do: refuse("optimize: a stub cannot optimize; test with a bridge and offline/script")

  defp result(run, %{"inputs" => inputs} = args) when is_list(inputs) do
    # A killed item ends alone.
    Process.flag(:trap_exit, true)
    batch(run, answers(run, inputs), args)
  end

  defp result(run, %{"inputs" => %{} = inputs}) do
    [{inputs, answer}] = answers(run, [inputs])

    with {:ok, outputs, meta} <- answer(run, inputs, answer) do
      if not Process.get({__MODULE__, :chunks?}, false), do: whole(run, outputs)
      {:ok, outputs, meta}
    end
  end

  defp result(_run, _args) do
    text = "inputs: expected an object of the signature's input fields, or a list of such objects"
    refuse(text)
  end

  # What the peer would refuse is not a run that a test has expected.
  defp answers(run, inputs) do
    lineage = Expectations.lineage(caller(run))
    # By these, mocks and repositories that an answer uses find their owner.
    Process.put(:"$callers", lineage)

    for item <- inputs do
      case Fields.wrong_inputs(run.fields, item) do
        nil -> {item, Expectations.take(run.stub, run.program, lineage)}
        wrong -> {item, refuse(wrong)}
      end
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
    order = (run.fields && run.fields.outputs) || []

    for field <- (Map.keys(outputs) -- order) ++ order,
        is_binary(outputs[field]),
        do: stream(run, [{"field", field}, {"chunk", outputs[field]}])
  end

  ## A list of inputs

  defp batch(run, answers, args) do
    metric = args["metric"]
    expected = args["expected"] || List.duplicate(nil, length(answers))
    items = Enum.with_index(Enum.zip(answers, expected))
    timeout = with ms when is_number(ms) <- args["item_timeout_ms"] || :infinity, do: ceil(ms)

    items
    |> Task.async_stream(fn {item, index} -> item(run, metric, index, item) end,
      max_concurrency: args["max_concurrency"] || max(length(items), 1),
      timeout: timeout,
      on_timeout: :kill_task,
      ordered: false,
      zip_input_on_exit: true
    )
    |> Enum.reduce_while({%{}, %{}}, fn ended, {results, sum} ->
      case ended(run, ended, timeout) do
        {_index, :over, error} ->
          {:halt, {:error, error}}

        {index, result, meta} ->
          unscored? = metric != nil and not List.keymember?(result, "score", 0)
          pairs = if unscored?, do: [{"score", 0.0} | result], else: result
          stream(run, [{"index", index} | pairs])
          {:cont, {Map.put(results, index, Map.new(pairs)), sum(sum, Map.take(meta, @summed))}}
      end
    end)
    |> case do
      {:error, error} -> {:error, error}
      {results, meta} -> {:ok, all(Enum.map(items, &results[elem(&1, 1)]), metric), meta}
    end
  end

  defp ended(_run, {:ok, result}, _timeout), do: result

  defp ended(_run, {:exit, {{_item, index}, :timeout}}, timeout),
    do: failed(index, Error.new(:timeout, "not finished within #{timeout} ms"))

  defp ended(run, {:exit, {{_item, index}, reason}}, _timeout),
    do: failed(index, internal(run, "the answer's process ended: #{inspect(reason)}"))

  defp failed(index, error), do: {index, failure(error), error.meta || %{}}

  defp item(run, metric, index, {{inputs, answer}, expected}) do
    # The peer streams items, not their chunks.
    run = %{run | stream?: false}

    with {:ok, outputs, meta} <- answer(run, inputs, answer),
         {:ok, score} <- score(run, metric, expected, inputs, outputs) do
      {index, [{"success", true}, {"result", outputs} | score], meta}
    else
      {:over, error} ->
        {index, :over, error}

      # It would be that of all others, too.
      {:error, %Error{type: :program_not_found} = error} when metric != nil ->
        {index, :over, error}

      {:error, error} ->
        failed(index, error)
    end
  end

  defp score(_run, nil, _expected, _inputs, _outputs), do: {:ok, []}

  defp score(run, metric, expected, inputs, outputs) do
    with {:error, error} <-
           Metric.score(metric, expected, inputs, outputs, &call_tool(run, &1, &2)),
         do: {:over, error}
  end

  # One that is not known makes the sum unknown.
  defp sum(one, other) when is_number(one) and is_number(other), do: one + other
  defp sum(one, other) when is_list(one) and is_list(other), do: one ++ other

  defp sum(one, other) when is_map(one) and is_map(other),
    do: Map.merge(one, other, fn _key, one, other -> sum(one, other) end)

  defp sum(_one, _other), do: nil

  defp all(results, nil), do: %{"results" => results}

  defp all(results, _metric) do
    %{
      "score" => results |> Enum.map(& &1["score"]) |> Evaluate.Result.mean(),
      "failed" => Enum.count(results, &(not &1["success"])),
      "results" => results
    }
  end

  ## One call of an answer's function

  defp answer(_run, _inputs, {:error, error}), do: {:error, error}
  defp answer(%{default: nil} = run, _inputs, {nil, owner, why}), do: unknown(run, owner, why)

  defp answer(run, inputs, {fun, owner, _why}) do
    Process.put(__MODULE__, run)

    case if(fun, do: fun.(inputs), else: run.default.(run.program, inputs)) do
      {:ok, outputs} ->
        outputs(run, owner, outputs, %{})

      {:ok, outputs, meta} ->
        outputs(run, owner, outputs, meta)

      {:error, %Error{type: type} = error} when type != :bridge_not_running ->
        error(run, owner, error)

      {:error, text} when is_binary(text) ->
        {:error, Error.new(:internal, text)}

      {:error, type} when type in @types ->
        {:error, Error.new(type)}

      other ->
        wrong(run, owner, "#{@expected}, got #{inspect(other, limit: 10)}")
    end
  catch
    kind, reason ->
      banner = Exception.format_banner(kind, reason, __STACKTRACE__)
      stack = "\n" <> Exception.format_stacktrace(__STACKTRACE__)
      mistake(run, owner, internal(run, "the answer's function: #{banner}"), stack)
  end

  defp outputs(run, owner, outputs, meta) do
    with {:ok, outputs} <- as_json(outputs, "outputs"),
         {:ok, meta} <- as_json(meta, "meta"),
         nil <- Fields.wrong_outputs(run.fields, outputs) do
      {:ok, outputs, meta}
    else
      {:error, text} -> wrong(run, owner, text)
      text -> wrong(run, owner, text)
    end
  end

  defp error(run, owner, error) do
    case as_json(error.meta || %{}, "error.meta") do
      {:ok, meta} -> {:error, %{error | meta: meta}}
      {:error, text} -> wrong(run, owner, text)
    end
  end

  # As it comes from the wire.
  defp as_json(%{} = map, what) do
    case Payload.encode(Dump.any(map), what) do
      {:ok, json} -> Payload.decode(IO.iodata_to_binary(json))
      {:error, error} -> {:error, error.message}
    end
  end

  defp as_json(_other, what), do: {:error, "#{what}: expected a map"}

  defp internal(run, text),
    do: Error.new(:internal, "stub #{inspect(run.stub)}, program #{run.program}: #{text}")

  defp wrong(run, owner, text), do: mistake(run, owner, internal(run, text))

  defp unknown(run, owner, why) do
    text = "Program not found: #{run.program}: the stub #{inspect(run.stub)} has no answer for it"
    mistake(run, owner, Error.new(:program_not_found, text <> why))
  end

  defp mistake(run, owner, error, stack \\ "") do
    Logger.error(error.message <> stack)
    Expectations.failed(owner, run.stub, error.message)
    {:error, error}
  end

  ## Frames

  @doc "A JSON object with these keys in their order; raises `ArgumentError` for a value without a JSON form."
  @spec object([{String.t(), term()}]) :: binary()
  def object(pairs) do
    members =
      for {key, value} <- pairs do
        case Payload.encode(value, "stub: #{key}") do
          {:ok, json} -> [~s("), key, ~s(":), json]
          {:error, error} -> raise ArgumentError, error.message
        end
      end

    IO.iodata_to_binary(["{", Enum.intersperse(members, ","), "}"])
  end

  @doc "The keys of an error in a reply, or in a result of a list."
  @spec failure(Error.t()) :: [{String.t(), term()}]
  def failure(%Error{type: type, message: message, retryable: retryable}) do
    usual? = type != :lm_error and retryable == Error.new(type, message).retryable
    failure = [{"success", false}, {"error", message}, {"error_type", type}]
    if usual?, do: failure, else: failure ++ [{"retryable", retryable}]
  end

  ## In an answer's function

  @doc "Sends a chunk of the run that the calling process answers."
  @spec chunk(String.t(), String.t()) :: :ok
  def chunk(field, text) do
    run = current("chunk/2")
    Process.put({__MODULE__, :chunks?}, true)
    stream(run, [{"field", field}, {"chunk", text}])
  end

  @doc "Sends the present step of the run that the calling process answers."
  @spec status(String.t()) :: :ok
  def status(text), do: stream(current("status/1"), [{"status", text}])

  @doc "Calls a tool of the caller, and waits for its result."
  @spec call_tool(String.t(), map()) :: {:ok, term()} | {:error, String.t()}
  def call_tool(name, args), do: call_tool(current("call_tool/2"), name, args)

  defp call_tool(run, name, args) do
    call_id = System.unique_integer([:positive])
    call = %{"call_id" => call_id, "name" => name, "args" => args}
    frame = object([{"id", run.id}, {"tool_call", call}])
    send(run.peer, {:tool_call, call_id, self(), frame})

    receive do
      {^call_id, result} -> result
    end
  end

  defp stream(%{stream?: false}, _chunk), do: :ok

  # The first key says what it is.
  defp stream(run, chunk),
    do: send_frame(run, ~s({"id":#{run.id},"stream":#{object(chunk)}}))

  defp current(function) do
    Process.get(__MODULE__) ||
      raise ArgumentError, "Stub.#{function}: only for the process that runs an answer's function"
  end
end
