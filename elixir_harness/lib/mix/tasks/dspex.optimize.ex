defmodule Mix.Tasks.Dspex.Optimize do
  @shortdoc "Improves a program by one of DSPy's optimizers"

  @moduledoc """
  Improves a program by one of DSPy's optimizers, and writes its state into a file.

      $ mix dspex.optimize eval/triage.exs --out priv/triage.json --lm-calls 500
      $ mix dspex.optimize eval/triage.exs --out priv/triage.json --optimizer gepa --seconds 3600

    * `--out` – required: the file for the state. It is replaced, in one step, at each better candidate, so that any end of
      the task leaves the best so far; an error before the first one leaves it as it was. It keeps its permissions, and a
      symbolic link leads to the new file. What is there and no regular file, or cannot be replaced, is refused at the start
    * `--optimizer` – one of those of `DSPex.PythonBridge.Optimize`, in place of the file's
    * `--require-gain` – exit with 1 unless the score is higher by at least so much than that of the program as it was, such
      as 0.02. Both are means over the set on which candidates are scored, so a gain there may be chance
    * `--lm-calls`, `--tokens`, `--seconds` – the budget. When one of them is spent, the best candidate is the result

  ## The file

  As for `mix dspex.eval`; one file may serve both. [Optimizing](optimizing.md#from-the-command-line) has an example.

    * `:trainset`, `:valset` (if the optimizer needs one), `:metric` – as in `DSPex.PythonBridge.Optimize.run/3`
    * `:optimize` – a keyword list of more options of `DSPex.PythonBridge.Optimize.run/3`, such as `:optimizer`, `:options`,
      `:budget`, `:seed`, `:reflection_lm` and `:tools`
    * `:program`, `:server` – as for `mix dspex.eval`, but not the id of a program that is there
    * `:dataset`, `:options` – for `mix dspex.eval` alone. Measure with examples that the optimizer has not seen

  ## The state

  A JSON object, as DSPy's `save` writes it: `state:` of a definition, decoded, or `state_path:`. It has demos, which are examples
  of yours.

  ## Stopping

  Ctrl-C, twice, and SIGTERM end the task and all LM requests. The file has the best state so far, if a line about a
  candidate was printed.

  With DSPy's disk cache (`DSPY_BRIDGE_DISK_CACHE`) the same command, started again, asks the LM nothing that it has answered
  before, and comes to the same result.

  ## Exit status

    * 0 – the file has a state, also if a budget was spent. If it is not better than the program as it was, which wins ties,
      the text says so
    * 1 – the file has a state, and the gain is below `--require-gain`, or is not known, as the optimizer scores nothing
    * 2 – an error has ended the optimization: a wrong argument or file, no Python, an LM that refuses the key, a metric that
      raises, an application that does not start; or a budget was spent before the first candidate; or
      the text could not be written to standard output
    * 143 – SIGTERM

  Mix itself exits with 1 if it cannot load the project. The progress goes to standard error: a line for each better candidate,
  and for each time that the examples are through.
  """

  use Mix.Task

  alias DSPex.PythonBridge.{Evaluate, Optimize}
  alias Mix.DSPex.{Baseline, EvaluationFile, StateFile}

  @budget [lm_calls: :integer, tokens: :integer, seconds: :float]
  @switches [out: :string, optimizer: :string, require_gain: :float] ++ @budget
  # Means of the same scores may differ by less, if they are added in another order.
  @same 1.0e-9

  @impl Mix.Task
  def run(args) do
    {result, switches} =
      Mix.DSPex.measured(fn ->
        {path, switches} = arguments(args)
        Mix.DSPex.start()
        with {:error, text} <- StateFile.check(switches[:out]), do: Mix.raise(text)
        file = EvaluationFile.read(path, [:trainset, :metric])
        {optimize(file, options(file, switches), switches[:out]), switches}
      end)

    gain = if result.score && result.baseline, do: result.score - result.baseline
    not_better = if gain && gain < @same, do: "not better than before\n"
    Mix.DSPex.print("#{result}\n#{not_better}the state is in #{switches[:out]}")
    require_gain(gain, switches[:require_gain])
  end

  defp arguments(args) do
    {switches, words} = OptionParser.parse!(args, strict: @switches)
    usage = "expected mix dspex.optimize FILE.exs --out STATE.json; see mix help dspex.optimize"
    if length(words) != 1 or switches[:out] == nil, do: Mix.raise(usage)
    {hd(words), switches}
  end

  defp options(%{path: path, optimize: options} = file, switches) do
    if Enumerable.impl_for(options[:budget] || []) == nil,
      do: EvaluationFile.refuse(path, ":optimize: :budget: expected a map")

    given = Map.new(Keyword.take(switches, Keyword.keys(@budget)))
    budget = Map.merge(Map.new(options[:budget] || []), given)

    Enum.to_list(Map.take(file, [:metric, :trainset, :valset])) ++
      if(budget == %{}, do: [], else: [budget: budget]) ++
      Keyword.take(switches, [:optimizer]) ++ options
  end

  defp optimize(%{path: path, args: args} = file, options, out) do
    if args == nil,
      do: EvaluationFile.refuse(path, ":program: expected a definition or a module, not an id")

    # A module has its tools' functions, too.
    definition = if is_atom(file.program), do: file.program, else: args
    options = [on_progress: &progress(&1, out)] ++ options
    run = &Optimize.run(&1, definition, options)
    result = EvaluationFile.checked(path, EvaluationFile.with_server(file, run))

    # The state is that at the beginning.
    if result.stopped && !result.score,
      do:
        Mix.raise("#{result.stopped} were spent before the first candidate; nothing was written")

    with {:error, text} <- write(result.state, out), do: Mix.raise(text)
    result
  end

  defp write(state, out), do: StateFile.write(out, [Baseline.sorted_json(state), "\n"])

  defp progress({:candidate, %{best: true} = candidate}, out) do
    text = "candidate #{candidate.number}: #{Evaluate.Table.number(candidate.score)}"

    case write(candidate.state, out) do
      :ok -> IO.puts(:stderr, "#{text} on #{candidate.of} examples, in #{out}")
      {:error, why} -> IO.puts(:stderr, "#{text}; #{why}")
    end
  end

  defp progress({:progress, %{done: total, total: total} = event}, _out) when total != nil do
    best = if event.best, do: ", best #{Evaluate.Table.number(event.best)}"
    IO.puts(:stderr, "#{total}/#{total}, #{event.lm_calls} LM calls#{best}")
  end

  defp progress(_event, _out), do: :ok

  defp require_gain(_gain, nil), do: :ok

  defp require_gain(nil, least),
    do: failed("the gain is not known, and --require-gain is #{least}")

  defp require_gain(gain, least) when gain < least - @same,
    do: failed("the gain is #{Evaluate.Table.number(gain)}, below --require-gain #{least}")

  defp require_gain(_gain, _least), do: :ok

  defp failed(text) do
    Mix.shell().error("failed: " <> text)
    exit({:shutdown, 1})
  end
end
