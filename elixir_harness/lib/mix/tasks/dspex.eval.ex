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

  The progress goes to standard error, a line for each tenth. [Evaluating](evaluating.md#in-ci) shows what is printed, and how
  examples are found in a baseline.

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
      raises, an application that does not start; or all runs failed without an answer of the LM that could be scored; or
      the result could not be written to standard output

  Mix itself exits with 1 if it cannot load the project, and nothing is on standard output then. Of runs of which only some
  fail, each has the score 0: look at `failed`.

  Ctrl-C, twice, ends the task and all LM requests. So does SIGTERM, as of any other program: a shell sees 143, not 0.
  """

  use Mix.Task

  alias DSPex.PythonBridge.Evaluate
  alias DSPex.PythonBridge.Evaluate.Table
  alias Mix.DSPex.{Baseline, EvaluationFile, StateFile}

  @switches [min: :float, baseline: :string, tolerance: :float, state: :string, json: :boolean]
  # Means of the same scores may differ by less, if they are added in another order.
  @same 1.0e-9

  @impl Mix.Task
  def run(args) do
    report =
      Mix.DSPex.measured(fn ->
        {path, switches} = arguments(args)
        measure = fn -> measure(path, Map.new(switches)) end
        if switches[:json], do: Mix.DSPex.divert_output(measure), else: measure.()
      end)

    Mix.DSPex.print(if report.json, do: json(report), else: text(report))
    for {_reason, text} <- report.reasons, do: Mix.shell().error("failed: " <> text)
    if report.reasons == [], do: :ok, else: exit({:shutdown, 1})
  end

  defp arguments(args) do
    {switches, words} = OptionParser.parse!(args, strict: @switches)
    usage = "expected one file, mix dspex.eval FILE.exs; see mix help dspex.eval"
    if length(words) != 1, do: Mix.raise(usage)
    {hd(words), switches}
  end

  # What costs LM calls comes last.
  defp measure(path, switches) do
    Mix.DSPex.start(clean: switches[:json])
    report = Map.merge(%{min: nil, tolerance: 0.0, baseline: nil, json: false}, switches)
    scores = if report.baseline, do: Baseline.read!(report.baseline)
    state = if switches[:state], do: StateFile.read!(switches.state)
    file = path |> EvaluationFile.read([:dataset, :metric]) |> with_state(state)
    file = %{file | dataset: Enum.to_list(file.dataset)}
    ids = Baseline.ids(file.dataset)

    if scores && !Enum.any?(ids, &is_map_key(scores, &1)),
      do: Mix.raise("--baseline #{report.baseline}: it has none of the examples of the dataset")

    result = evaluate(file)
    change = scores && Baseline.compare(scores, Enum.zip(ids, result.results))
    report = Map.merge(report, %{program: file.id, ids: ids, result: result, change: change})
    Map.put(report, :reasons, below_min(report) ++ regression(report))
  end

  # In place of its own state and demos.
  defp with_state(file, nil), do: file

  defp with_state(%{args: %{} = args} = file, state),
    do: %{file | args: args |> Map.drop(["state_path", "demos"]) |> Map.put("state", state)}

  defp with_state(file, _state),
    do: EvaluationFile.refuse(file.path, ":program: --state needs a definition, not an id")

  defp evaluate(%{path: path} = file) do
    # A module has its tools' functions, too.
    program = if is_atom(file.program), do: file.program, else: file.id
    options = [metric: file.metric, on_result: progress(length(file.dataset))] ++ file.options
    EvaluationFile.checked(path, Evaluate.Options.new(options))

    EvaluationFile.with_server(file, fn server ->
      EvaluationFile.create(file, server)
      result = Evaluate.run(server, program, file.dataset, options)
      %{results: [first | _]} = result = EvaluationFile.checked(path, result)

      # Otherwise the LM has answered something that has a score.
      if Enum.all?(result.results, &(&1.error && &1.error.type != :output_invalid)) do
        text = "#{first.error.type}: all runs failed, the first with: #{first.error.message}"
        EvaluationFile.refuse(path, text)
      end

      result
    end)
  end

  # A line for each tenth.
  defp progress(total) do
    seen = :counters.new(2, [])

    fn item ->
      :counters.add(seen, 1, 1)
      if item.error, do: :counters.add(seen, 2, 1)
      [done, failed] = for n <- 1..2, do: :counters.get(seen, n)

      if div(done * 10, total) > div((done - 1) * 10, total),
        do: IO.puts(:stderr, "#{done}/#{total} examples, #{failed} failed")
    end
  end

  ## The report

  defp below_min(%{min: min, result: %{score: score}}) when min != nil and score < min - @same,
    do: [below_min: "the score #{Table.number(score)} is below --min #{min}"]

  defp below_min(_report), do: []

  defp regression(%{change: %{change: change}, tolerance: tolerance})
       when change < -tolerance - @same do
    text = "the score has changed by #{Table.number(change)}: a regression beyond --tolerance"
    [regression: "#{text} #{tolerance}"]
  end

  defp regression(_report), do: []

  defp text(%{result: result, change: nil}), do: Table.text(result)

  defp text(%{result: result, change: change, baseline: path}) do
    signed = if(change.change < 0, do: "", else: "+") <> Table.number(change.change)

    shared =
      "#{path}: #{Table.number(change.before)} → #{Table.number(change.now)} (#{signed}) " <>
        "on the #{change.shared} examples that it has; #{change.new} new, #{change.gone} gone"

    Enum.join([Table.text(result), "", shared | worse(change)], "\n")
  end

  defp worse(%{worse: 0}), do: ["nothing got worse"]

  defp worse(%{worse: count, worst: worst}) do
    pairs = for {_id, item, before} <- worst, do: {item, before}
    ["#{count} got worse, the worst of them:", Table.compared(pairs)]
  end

  # With one line for each result: a baseline is kept under version control.
  defp json(%{result: result} = report) do
    head = %{
      version: 1,
      ok: report.reasons == [],
      reasons: Keyword.keys(report.reasons),
      program: report.program,
      score: result.score,
      examples: length(result.results),
      failed: result.failed,
      min: report.min,
      tolerance: report.tolerance,
      baseline: report.change && %{report.change | worst: Enum.map(report.change.worst, &lost/1)},
      usage: result.usage,
      duration_ms: result.duration_ms
    }

    results =
      for {id, item} <- Enum.zip(report.ids, result.results),
          do: %{id: id, score: item.score, error: item.error && item.error.type}

    lines = results |> Enum.map(&Baseline.sorted_json/1) |> Enum.intersperse(",\n")
    head = head |> Baseline.sorted_json() |> IO.iodata_to_binary() |> String.slice(0..-2//1)
    [head, ",\"results\":[\n", lines, "\n]}"]
  end

  defp lost({id, item, before}),
    do: %{id: id, index: item.index, before: before, score: item.score}
end
