defmodule DSPex.PythonBridge.Evaluate do
  @moduledoc """
  Measures a program: runs it on examples, and scores each result by a metric.

      examples = [
        {%{question: "What is the capital of Italy?"}, %{answer: "Rome"}},
        {%{question: "What is the capital of Peru?"}, %{answer: "Lima"}}
      ]

      {:ok, result} =
        Evaluate.run(MyApp.Pool, "qa", examples, metric: {:field, :answer, :exact_match})

      result.score
      IO.puts(result)

  See docs/guide/evaluating.md.
  """

  alias DSPex.PythonBridge.{Bridge, Error, Pool, Program, Programs}
  alias DSPex.PythonBridge.Evaluate.{Options, Requests, Result}
  alias DSPex.PythonBridge.Telemetry.RunSpan

  @typedoc """
  Inputs with what is expected of the outputs and what else the metric needs; or inputs alone. The inputs are those that
  a module's `run` takes, structs among them.
  """
  @type example :: {inputs :: map() | keyword(), expected :: map() | nil} | map()
  @typedoc """
  A function, called with the example (its inputs and what is expected, in one map) and the outputs, both decoded JSON
  with string keys, and, if it takes three arguments, with what the score is for; or an output field and how it is
  compared.
  """
  @type metric ::
          (example :: map(), prediction :: map() -> score())
          | (example :: map(), prediction :: map(), purpose() -> score())
          | {:field, atom() | String.t(), :equals | :exact_match | :f1 | :contains}
  @type score ::
          number()
          | boolean()
          | {number() | boolean(), feedback :: String.t()}
          | {:error, term()}
  @typedoc """
  What a score is for: in an evaluation always `:score`. See `DSPex.PythonBridge.Optimize` for the others.
  """
  @type purpose :: :score | :bootstrap | {:feedback, map()}
  @type option ::
          {:metric, metric()}
          | {:max_concurrency, pos_integer()}
          | {:timeout, timeout()}
          | {:on_result, (Result.item() -> term())}
          | {:lm, String.t() | map()}
          | {:config, map()}
          | {:item_timeout_ms, pos_integer()}
          | {:attempts, 1..10}
          | {:tools, map()}
          | {:retry, boolean()}
          | {:traceparent, String.t() | nil}
          | {:telemetry_metadata, map()}

  @doc """
  Runs the program on all examples and gives their scores: `{:ok, %DSPex.PythonBridge.Evaluate.Result{}}`, or
  `{:error, %DSPex.PythonBridge.Error{}}`.

  `server` is a bridge or a pool, of which all peers are used, also those of other nodes. `program` is an id, or a module
  with `use DSPex.PythonBridge.Program`, whose tools are called; outputs are maps in both cases. `examples` is any enumerable, of which no more is
  taken than is needed next. If it raises, that is an error of the type `:invalid_request`.

  A run that fails has the score 0 and its error in the results. These end the evaluation at once, as its error:

    * the metric raises, exits, or gives something else than it may: `:tool_error`
    * the LM refuses the key (`:lm_error`), or there is none (`:lm_not_configured`)
    * wrong arguments: `:invalid_args` or `:invalid_request`, with a text that names them
    * the timeout, and what ends any other request, such as `:python_process_died`

  If a peer dies, its examples are sent again, and the metric is not called again for what it has scored. If the calling
  process ends, so do all runs and the metric.

  Options:

    * `:metric` – required. A function of two or three arguments, which runs in processes of its own, several at once; it may run
      other programs. What it has captured is copied a few times in all. `:exact_match` and `:f1` compare text as DSPy does, without case, punctuation and articles; `:equals`
      compares JSON values; `:contains` looks for the expected text in the output
    * `:max_concurrency` – how many examples are in work at once; by default 64
    * `:timeout` – of the whole evaluation in ms; by default `:infinity`
    * `:on_result` – a function that is called in this process with each result, an element of `results`, as it is known
    * `:lm`, `:config` – for these runs, as in docs/protocol.md
    * `:item_timeout_ms`, with the metric's time, `:attempts`, `:tools`, `:retry`, `:traceparent`, `:telemetry_metadata` –
      as in `DSPex.PythonBridge.Bridge.request/4`
  """
  @spec run(Bridge.server() | Pool.pool(), String.t() | module(), Enumerable.t(example()), [
          option()
        ]) :: {:ok, Result.t()} | {:error, Error.t()}
  def run(server, program, examples, opts) do
    with {:ok, id, spec} <- program(program),
         {:ok, options} <- Options.new(opts, spec) do
      total = if is_list(examples) and not List.improper?(examples), do: length(examples)
      about = %{program_id: id, telemetry_metadata: opts[:telemetry_metadata] || %{}}
      started = System.monotonic_time(:millisecond)

      RunSpan.run(:evaluate, server, about, Result.figures(Result.tally(), total), fn span ->
        progress = &RunSpan.progress(span, Result.figures(&1, total))

        with {:ok, tally} <- Requests.run(server, {id, spec}, examples, options, progress),
             do: {:ok, Result.new(tally, System.monotonic_time(:millisecond) - started)}
      end)
    end
  end

  defp program(id) when is_binary(id), do: {:ok, id, nil}

  defp program(module) when is_atom(module) do
    case Programs.Declared.one(module) do
      {:ok, {id, _definition}} -> {:ok, id, Program.Tools.spec(module)}
      {:error, text} -> refused(": #{inspect(module)}: #{text}")
    end
  end

  defp program(_other), do: refused("")

  defp refused(why) do
    text = "program: expected an id, or a module with `use DSPex.PythonBridge.Program`#{why}"
    {:error, Error.new(:invalid_request, text)}
  end
end
