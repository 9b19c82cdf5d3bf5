defmodule Mix.Tasks.Dspex.Optimize do
  @shortdoc "Improves a program by one of DSPy's optimizers"

  @moduledoc """
  Improves a program by one of DSPy's optimizers, and writes its state into a file.

      $ mix dspex.optimize eval/triage.exs --out priv/triage.json --lm-calls 500
      $ mix dspex.optimize eval/triage.exs --out priv/triage.json --optimizer gepa --seconds 3600

    * `--out` – required: the file for the state. It is replaced, in one step, at each better candidate, so that any end of
      the task leaves the best so far; an error before the first one leaves it as it was. Its permissions stay, and a link
      is followed. A folder, a device or a pipe is refused before anything is paid for
    * `--optimizer` – one of those of `DSPex.PythonBridge.Optimize`, in place of the file's. What is for the file's own
      optimizer is left out then, which is printed: its `:options`, and the `:valset` if the other one takes none
    * `--lm-calls`, `--tokens`, `--seconds` – the budget. When one of them is spent, the best candidate is the result

  ## The file

  Elixir code whose last value is a map or keyword list, as for `mix dspex.eval`; one file may serve both:

      # eval/triage.exs
      tickets = MyApp.Tickets.labelled()

      %{
        program: MyApp.Triage,
        trainset: Enum.take(tickets, 100),
        valset: tickets |> Enum.drop(100) |> Enum.take(50),
        dataset: Enum.drop(tickets, 150),
        metric: {:field, :team, :equals},
        optimize: [optimizer: :mipro_v2, budget: [lm_calls: 500], num_threads: 8]
      }

    * `:program` – a module with `use DSPex.PythonBridge.Program`, or a definition: the arguments of `create_program`
      with an `:id`, as a map or keyword list
    * `:trainset`, `:valset` (if the optimizer needs one), `:metric` – as in `DSPex.PythonBridge.Optimize.run/3`
    * `:optimize` – a keyword list of more options of `DSPex.PythonBridge.Optimize.run/3`, such as `:optimizer`, `:options`,
      `:budget`, `:seed`, `:reflection_lm` and `:tools`
    * `:server` – the name of a bridge or pool that your application starts. By default the task starts a bridge of its
      own, with the configuration of `:dspex`, and stops it afterwards
    * `:dataset`, `:options` – for `mix dspex.eval` alone. Measure with examples that the optimizer has not seen

  The project's application is started before the file is read, as by `mix run`.

  ## The state

  A JSON object, as DSPy's `save` writes it: `state:` of a definition, decoded, or `state_path:`. It has demos, which are examples
  of yours.

      {:ok, _} =
        Pool.call(:create_program, Map.put(MyApp.Triage.definition(), :state, JSON.decode!(File.read!("priv/triage.json"))))

  ## Ctrl-C

  It ends the task and all LM requests, and prints which state is in the file; so does SIGTERM. A second one ends it at once.
  Where there is no `stty`, the break menu of the BEAM comes instead: `a` ends it, and the file has the best so far, too.

  With DSPy's disk cache (`DSPY_BRIDGE_DISK_CACHE`) the same command, started again, asks the LM nothing that it has answered
  before, and comes to the same result.

  ## Exit status

    * 0 – the file has a state, also if a budget was spent, or you have stopped it after the first candidate
    * 2 – there is none, or an error has ended the optimization: a wrong argument or file, no Python, an LM that refuses the
      key, a metric that raises, an application that does not start. The text says whether the file has been replaced

  Mix itself exits with 1 if it cannot load the project. The progress goes to standard error: a bar if that is a terminal, else a line
  for each better candidate.
  """

  use Mix.Task

  alias DSPex.PythonBridge.{Error, Evaluate, Optimize}
  alias Mix.DSPex.{Baseline, EvaluationFile, Interrupt, OptimizationProgress, StateFile}

  @budget [lm_calls: :integer, tokens: :integer, seconds: :float]
  @switches [out: :string, optimizer: :string] ++ @budget
  @without_valset ~w(labeled_few_shot bootstrap_few_shot copro simba)
  # What is not the file's to say there.
  @own [:trainset, :valset, :metric, :on_progress]

  @impl Mix.Task
  @spec run([String.t()]) :: :ok
  def run(args) do
    {path, switches} = arguments(args)
    Mix.DSPex.start()

    with {:ok, file} <- EvaluationFile.read(path, [:trainset, :metric], [:valset]),
         {:ok, definition} <- definition(file),
         {:ok, options} <- options(file, switches),
         # Before anything is paid for.
         {:ok, out} <- StateFile.new(switches[:out]),
         :ok <- optimize(file, definition, options, out) do
      :ok
    else
      {:error, %Error{type: type, message: text}} -> refuse("#{path}: #{type}: #{text}")
      {:error, text} -> refuse(text)
    end
  end

  defp arguments(args) do
    case OptionParser.parse!(args, strict: @switches) do
      {switches, [path]} ->
        if switches[:out],
          do: {path, switches},
          else: refuse("--out: missing; expected a file for the state")

      {_switches, _words} ->
        refuse(
          "expected one file, mix dspex.optimize FILE.exs --out STATE.json; see mix help dspex.optimize"
        )
    end
  rescue
    error in OptionParser.ParseError -> refuse(Exception.message(error))
  end

  # A module has its tools' functions, too.
  defp definition(%EvaluationFile{program: {:definition, _id, args}, given: given}),
    do: {:ok, if(is_atom(given), do: given, else: args)}

  defp definition(%EvaluationFile{path: path}),
    do:
      {:error,
       "#{path}: :program: expected a definition, or a module with definition/0, not an id"}

  defp options(%EvaluationFile{path: path, values: values}, switches) do
    options = values[:optimize] || []

    with true <- Keyword.keyword?(options) || ":optimize: expected a keyword list",
         nil <- Enum.find(@own, &Keyword.has_key?(options, &1)),
         budget = Keyword.take(switches, Keyword.keys(@budget)),
         true <- Enumerable.impl_for(options[:budget] || []) != nil || ":budget: expected a map" do
      budget = Map.merge(Map.new(options[:budget] || []), Map.new(budget))
      sets = Keyword.take(Enum.to_list(values), [:trainset, :valset, :metric])
      options = Keyword.merge(options, sets) |> with_optimizer(switches[:optimizer])
      {:ok, if(budget == %{}, do: options, else: Keyword.put(options, :budget, budget))}
    else
      text when is_binary(text) -> {:error, "#{path}: #{text}"}
      own -> {:error, "#{path}: :optimize: #{inspect(own)} cannot be one of them"}
    end
  end

  # So that a file's optimizer can be compared with others: what is for the file's own one is left out.
  defp with_optimizer(options, nil), do: options

  defp with_optimizer(options, named) do
    own = options[:optimizer]
    sets = if named in @without_valset, do: [:options, :valset], else: [:options]
    same? = own == named or (is_atom(own) and Atom.to_string(own) == named)
    left_out = if same?, do: [], else: Enum.filter(sets, &Keyword.has_key?(options, &1))

    if left_out != [] do
      names = Enum.map_join(left_out, " and ", &inspect/1)
      Mix.shell().error("--optimizer #{named}: the file's #{names} left out, for #{inspect(own)}")
    end

    options |> Keyword.drop(left_out) |> Keyword.put(:optimizer, named)
  end

  ## The run, and what it reports

  defp optimize(file, definition, options, out) do
    outcome =
      EvaluationFile.with_server(file, fn server ->
        Interrupt.during(fn -> follow(server, definition, options, out) end)
      end)

    case outcome do
      {{:ok, result}, best} -> finished(result, best, out)
      {{:error, error}, best} -> {:error, explained(error, best, out)}
      {:interrupted, nil} -> {:error, "stopped before the first candidate; nothing was written"}
      {:interrupted, best} -> Mix.shell().info("stopped; " <> kept(best, out))
      {:error, error} -> {:error, error}
    end
  end

  # In a task: whatever it waits for, this process gets the signals, and can end it.
  defp follow(server, definition, options, out) do
    me = self()
    options = [on_progress: &send(me, {:event, &1})] ++ options

    task =
      Task.async(fn ->
        result = Optimize.run(server, definition, options)
        send(me, :over)
        result
      end)

    listen(task, out, OptimizationProgress.new(), nil)
  end

  defp listen(task, out, progress, best) do
    receive do
      {:event, event} ->
        best = better(event, best, out)
        listen(task, out, OptimizationProgress.show(progress, event, out.given), best)

      :interrupted ->
        Task.shutdown(task, :brutal_kill)
        OptimizationProgress.finish(progress)
        {:interrupted, best}

      :over ->
        OptimizationProgress.finish(progress)
        {Task.await(task, :infinity), best}
    end
  end

  # The file's last candidate: its score.
  defp better({:candidate, %{best: true, state: state, score: score}}, best, out) do
    case write(state, out) do
      :ok ->
        score

      {:error, text} ->
        Mix.shell().error(text)
        best
    end
  end

  defp better(_event, best, _out), do: best

  # The state is that at the beginning.
  defp finished(%{stopped: budget, score: nil}, _best, _out) when budget != nil,
    do: {:error, "#{budget} were spent before the first candidate; nothing was written"}

  defp finished(result, _best, out) do
    with :ok <- write(result.state, out) do
      Mix.shell().info("#{result}\nthe state is in #{out.given}")
    end
  end

  defp write(state, out), do: StateFile.write(out, [Baseline.sorted_json(state), "\n"])

  defp explained(error, nil, _out), do: error

  defp explained(error, best, out),
    do: %{error | message: "#{error.message}; #{kept(best, out)}"}

  defp kept(best, out),
    do: "#{out.given} has the best state so far, with the score #{Evaluate.Table.number(best)}"

  @spec refuse(String.t()) :: no_return()
  defp refuse(text), do: Mix.raise(text, exit_status: 2)
end
