defmodule Mix.Tasks.Dspex.Eval do
  @shortdoc "Scores a program on a dataset; fails if it got worse"

  @moduledoc """
  Scores a program on a dataset, for CI: fails if the score is too low, or lower than before.

      $ mix dspex.eval eval/triage.exs
      $ mix dspex.eval eval/triage.exs --min 0.8
      $ mix dspex.eval eval/triage.exs --json > eval/triage.json
      $ mix dspex.eval eval/triage.exs --baseline eval/triage.json --tolerance 0.02
      $ mix dspex.eval eval/triage.exs --state priv/triage.json

    * `--min` – the lowest score that passes
    * `--baseline` – a file with an earlier output of `--json`, with which the scores are compared
    * `--tolerance` – by how much the score may be lower than that of the baseline; by default 0
    * `--state` – a file that `mix dspex.optimize` has written: the program is scored with this state, in place of its own
      state and demos
    * `--json` – one JSON object on standard output, see below. Its output is a baseline

  ## The file

  Elixir code whose last value is a map or keyword list:

      # eval/triage.exs
      %{
        program: MyApp.Triage,
        dataset: [
          {%{ticket: "I was charged twice!"}, %{team: "billing"}},
          {%{ticket: "It burns!"}, %{team: "support"}}
        ],
        metric: {:field, :team, :equals}
      }

    * `:program` – a module with `use DSPex.PythonBridge.Program`, or a definition: the arguments of `create_program`
      with an `:id`, as a map or keyword list. With `:server` it may also be the id of a program that is there
    * `:dataset`, `:metric` – as in `DSPex.PythonBridge.Evaluate.run/4`. The dataset is read to its end before anything
      runs
    * `:server` – the name of a bridge or pool that your application starts. The program is created there first, in
      place of one with its id. By default the task starts a bridge of its own, with the configuration of `:dspex`, and
      stops it afterwards
    * `:options` – a keyword list of more options of `DSPex.PythonBridge.Evaluate.run/4`, such as `:max_concurrency`,
      `:timeout`, `:lm` and `:tools`, but not `:metric` and `:on_result`

  The project's application is started before the file is read, as by `mix run`.

  ## What is printed

  The score, the worst results, the change since the baseline, and what got worse, with their inputs and outputs. Only
  examples that the baseline has, too, are compared: they are recognized by a hash of their inputs, so the dataset may grow
  and change its order. `--min` is compared with the score of all.

  The progress goes to standard error: one line if that is a terminal, else one for each tenth.

  ## JSON

  With `--json` standard output has an object and nothing else; logs, and what the file and the metric print, go to standard
  error. It has no inputs, outputs or texts of errors, so that it can be kept under version control. Hashes of inputs that
  can be guessed, such as yes and no, can be guessed, too.

    * `version` – 1; a baseline of another version is refused
    * `ok`, and `reasons`: a list of `"below_min"` and `"regression"`
    * `program` – its id; `score`; `examples` and `failed`, their numbers
    * `min` (or null), `tolerance`
    * `baseline` – null, or an object: `before`, `now` and `change`, of the scores of the examples that are in both;
      `shared`, `new`, `gone` and `worse`, numbers of examples; `worst`, a list of at most 10 of `{"id", "index", "before",
      "score"}`
    * `usage`, `duration_ms` – as in `DSPex.PythonBridge.Evaluate.Result`
    * `results` – in the order of the dataset, `{"id", "score", "error"}`: the hash of the inputs, and the type of the error,
      or null

  ## Exit status

    * 0 – the result is good enough
    * 1 – the score is below `--min`, or has fallen by more than `--tolerance`
    * 2 – nothing was measured: a wrong argument, file or baseline, no Python, an LM that refuses the key, a metric that
      raises, an application that does not start; or all runs failed without an answer of the LM that could be scored

  Mix itself exits with 1 if it cannot load the project, and nothing is on standard output then. Of runs of which only some
  fail, each has the score 0: look at `failed`.

  Ctrl-C, twice, ends the task and all LM requests. So does SIGTERM, as of any other program: a shell sees 143, not 0.
  """

  use Mix.Task

  alias DSPex.PythonBridge.{Error, Evaluate}
  alias Mix.DSPex.{Baseline, EvaluationFile, EvaluationReport, Progress, StateFile}

  @switches [min: :float, baseline: :string, tolerance: :float, state: :string, json: :boolean]
  # What is not the file's to say.
  @own [:metric, :on_result]

  @impl Mix.Task
  @spec run([String.t()]) :: :ok
  def run(args) do
    {path, switches} = arguments(args)
    measure = fn -> measure(path, switches) end

    report = if switches[:json], do: Mix.DSPex.divert_output(measure), else: measure.()
    reasons = EvaluationReport.reasons(report)

    if switches[:json],
      do: IO.puts(EvaluationReport.json(report)),
      else: Mix.shell().info(EvaluationReport.text(report))

    for {_reason, text} <- reasons, do: Mix.shell().error("failed: " <> text)
    if reasons == [], do: :ok, else: exit({:shutdown, 1})
  end

  defp arguments(args) do
    case OptionParser.parse!(args, strict: @switches) do
      {switches, [path]} ->
        check(switches)
        {path, switches}

      {_switches, _words} ->
        refuse("expected one file, mix dspex.eval FILE.exs; see mix help dspex.eval")
    end
  rescue
    error in OptionParser.ParseError -> refuse(Exception.message(error))
  end

  defp check(switches) do
    tolerance = switches[:tolerance]

    cond do
      tolerance && !switches[:baseline] -> refuse("--tolerance: it needs --baseline")
      tolerance && tolerance < 0 -> refuse("--tolerance: expected 0 or more, got #{tolerance}")
      true -> :ok
    end
  end

  defp measure(path, switches) do
    Mix.DSPex.start(clean: switches[:json])
    # The BEAM would exit with 0, as if the result were good enough.
    :os.set_signal(:sigterm, :default)

    # What costs LM calls comes last.
    with {:ok, scores} <- baseline(switches[:baseline]),
         {:ok, state} <- state(switches[:state]),
         {:ok, file} <- EvaluationFile.read(path, [:dataset, :metric]),
         {:ok, file} <- EvaluationFile.with_state(file, state),
         {:ok, options} <- options(file),
         {:ok, ids} <- ids(file),
         :ok <- comparable(scores, ids, switches[:baseline]),
         {:ok, id, result} <- evaluate(file, options) do
      %EvaluationReport{
        program: id,
        ids: ids,
        result: result,
        min: switches[:min],
        tolerance: switches[:tolerance] || 0.0,
        baseline: switches[:baseline],
        change: scores && Baseline.compare(scores, Enum.zip(ids, result.results))
      }
    else
      {:error, %Error{type: type, message: text}} -> refuse("#{path}: #{type}: #{text}")
      {:error, text} -> refuse(text)
    end
  end

  defp baseline(nil), do: {:ok, nil}
  defp baseline(path), do: Baseline.read(path)

  defp state(nil), do: {:ok, nil}
  defp state(path), do: StateFile.read(path)

  defp options(%EvaluationFile{path: path, values: values}) do
    options = values[:options] || []

    with true <- Keyword.keyword?(options) || ":options: expected a keyword list",
         nil <- Enum.find(@own, &Keyword.has_key?(options, &1)),
         options = [metric: values.metric] ++ options,
         {:ok, _checked} <- Evaluate.Options.new(options) do
      {:ok, options}
    else
      text when is_binary(text) -> {:error, "#{path}: #{text}"}
      {:error, error} -> {:error, "#{path}: #{error.message}"}
      own -> {:error, "#{path}: :options: #{inspect(own)} cannot be one of them"}
    end
  end

  defp ids(%EvaluationFile{path: path, values: %{dataset: dataset}}) do
    with {:error, text} <- Baseline.ids(dataset), do: {:error, "#{path}: #{text}"}
  end

  defp comparable(nil, _ids, _path), do: :ok

  defp comparable(scores, ids, path) do
    if Enum.any?(ids, &is_map_key(scores, &1)),
      do: :ok,
      else: {:error, "--baseline #{path}: it has none of the examples of the dataset"}
  end

  defp evaluate(file, options) do
    EvaluationFile.with_server(file, fn server ->
      with {:ok, id} <- EvaluationFile.create(file, server),
           # A module has its tools' functions, too.
           program = if(is_atom(file.given), do: file.given, else: id),
           {:ok, result} <- score(server, program, file.values.dataset, options) do
        case EvaluationReport.nothing_measured(result) do
          nil -> {:ok, id, result}
          %{error: error} -> {:error, all_failed(error)}
        end
      end
    end)
  end

  defp score(server, program, dataset, options) do
    progress = Progress.new()
    seen = :counters.new(2, [])
    opts = [on_result: &seen(&1, seen, length(dataset), progress)] ++ options
    result = Evaluate.run(server, program, dataset, opts)
    Progress.finish(progress)
    result
  end

  defp seen(item, seen, total, progress) do
    :counters.add(seen, 1, 1)
    if item.error, do: :counters.add(seen, 2, 1)
    done = :counters.get(seen, 1)
    tenth? = div(done * 10, total) > div((done - 1) * 10, total)
    text = "#{done}/#{total} examples, #{:counters.get(seen, 2)} failed"
    Progress.show(progress, text, tenth?)
  end

  defp all_failed(error),
    do: %{error | message: "all runs failed, the first with: #{error.message}"}

  @spec refuse(String.t()) :: no_return()
  defp refuse(text), do: Mix.raise(text, exit_status: 2)
end
