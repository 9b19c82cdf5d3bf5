defmodule Mix.Tasks.Dspex.Optimize do
  @shortdoc "Improves a program by one of DSPy's optimizers"

  @moduledoc """
  Improves a program by one of DSPy's optimizers, and writes its state into a file.

      $ mix dspex.optimize eval/triage.exs --out priv/triage.json --lm-calls 500
      $ mix dspex.optimize eval/triage.exs --out priv/triage.json --optimizer gepa --seconds 3600

    * `--out` – required: the file for the state. It is replaced, in one step, at each better candidate, so that any end of
      the task leaves the best so far; an error before the first one leaves it as it was. It keeps its permissions, and a
      symbolic link leads to the new file. What is there and no regular file, or cannot be replaced, is refused at the start
    * `--optimizer` – one of those of `DSPex.PythonBridge.Optimize`, in place of the file's. If it is another one, what
      the file has for its own and this one does not take is left out, and named: the options, and a valset, a seed or LMs
      that it has no use for
    * `--require-gain` – exit with 1 unless the score is higher by at least so much than that of the program as it was, such
      as 0.02. Both are means over the set on which candidates are scored, so a gain there may be chance
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

  ## Stopping

  SIGTERM ends the task and all LM requests, and prints which state is in the file. So does Ctrl-C, twice, which prints
  nothing: the file has the best so far, too.

  With DSPy's disk cache (`DSPY_BRIDGE_DISK_CACHE`) the same command, started again, asks the LM nothing that it has answered
  before, and comes to the same result.

  ## Exit status

    * 0 – the file has a state, also if a budget was spent, or SIGTERM has stopped it after the first candidate. If it is not
      better than the program as it was, which wins ties, the text says so
    * 1 – the file has a state, and the gain is below `--require-gain`, or is not known
    * 2 – there is none, or an error has ended the optimization: a wrong argument or file, no Python, an LM that refuses the
      key, a metric that raises, an application that does not start. The text says whether the file has been replaced

  Mix itself exits with 1 if it cannot load the project. The progress goes to standard error: one line if that is a terminal, and a line for each better
  candidate.
  """

  use Mix.Task

  alias DSPex.PythonBridge.{Error, Evaluate, Optimize}
  alias Mix.DSPex.{Baseline, EvaluationFile, Progress, StateFile}

  @budget [lm_calls: :integer, tokens: :integer, seconds: :float]
  @switches [out: :string, optimizer: :string, require_gain: :float] ++ @budget
  # What each optimizer takes of `@of_optimizer`, next to its own options.
  @takes %{
    "labeled_few_shot" => [],
    "bootstrap_few_shot" => [:teacher_lm],
    "random_search" => [:valset, :teacher_lm],
    "copro" => [:prompt_lm],
    "mipro_v2" => [:valset, :seed, :prompt_lm, :teacher_lm],
    "simba" => [:seed, :prompt_lm, :teacher_lm],
    "gepa" => [:valset, :seed, :reflection_lm]
  }
  @of_optimizer [:options, :valset, :seed, :prompt_lm, :teacher_lm, :reflection_lm]
  @scores_nothing ~w(labeled_few_shot bootstrap_few_shot)
  # Means of the same scores may differ by less, if they are added in another order.
  @same 1.0e-9
  # What is not the file's to say there.
  @own [:trainset, :valset, :metric, :on_progress]

  @impl Mix.Task
  @spec run([String.t()]) :: :ok
  def run(args) do
    {path, switches} = arguments(args)
    Mix.DSPex.start()

    with :ok <- StateFile.check(switches[:out]),
         {:ok, file} <- EvaluationFile.read(path, [:trainset, :metric], [:valset]),
         {:ok, definition} <- definition(file),
         {:ok, options} <- options(file, switches),
         :ok <- scores(options[:optimizer], switches[:require_gain]),
         :ok <- optimize(file, definition, options, switches) do
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
      options = options ++ Enum.to_list(Map.take(values, [:metric, :trainset, :valset]))
      options = if budget == %{}, do: options, else: Keyword.put(options, :budget, budget)
      {:ok, with_optimizer(options, switches[:optimizer])}
    else
      text when is_binary(text) -> {:error, "#{path}: #{text}"}
      own -> {:error, "#{path}: :optimize: #{inspect(own)} cannot be one of them"}
    end
  end

  # So that a file's optimizer can be compared with others.
  defp with_optimizer(options, nil), do: options

  defp with_optimizer(options, optimizer) do
    takes = @takes[optimizer]
    own = options[:optimizer]

    left_out =
      if takes && own && "#{own}" != optimizer,
        do: for(key <- @of_optimizer -- takes, Keyword.has_key?(options, key), do: key),
        else: []

    if left_out != [] do
      keys = Enum.map_join(left_out, ", ", &inspect/1)
      Mix.shell().error("#{optimizer} in place of #{own}: the file's #{keys} left out")
    end

    options |> Keyword.drop(left_out) |> Keyword.put(:optimizer, optimizer)
  end

  defp scores(optimizer, gain) do
    name? = is_atom(optimizer) or is_binary(optimizer)

    if gain != nil and name? and "#{optimizer}" in @scores_nothing,
      do: {:error, "--require-gain: #{optimizer} scores nothing; measure with mix dspex.eval"},
      else: :ok
  end

  defp write(state, out), do: StateFile.write(out, [Baseline.sorted_json(state), "\n"])

  ## The run, and what it reports

  defp optimize(file, definition, options, switches) do
    out = switches[:out]

    outcome =
      EvaluationFile.with_server(file, fn server ->
        with_sigterm(fn -> follow(server, definition, options, out) end)
      end)

    case outcome do
      {{:ok, result}, _best} -> finished(result, out, switches[:require_gain])
      {{:error, error}, best} -> {:error, explained(error, best, out)}
      {:interrupted, nil} -> {:error, "stopped before the first candidate; nothing was written"}
      {:interrupted, best} -> interrupted(best, out, switches[:require_gain])
      {:error, error} -> {:error, error}
    end
  end

  defp interrupted(best, out, gain) do
    Mix.shell().info("stopped; " <> kept(best, out))
    require_gain(nil, gain)
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

    listen(task, out, Progress.new(), nil)
  end

  # `best`: the score of the state in the file.
  defp listen(task, out, progress, best) do
    receive do
      {:event, {:candidate, %{best: true} = candidate}} ->
        case write(candidate.state, out) do
          :ok -> listen(task, out, better(progress, candidate, out), candidate.score)
          {:error, text} -> listen(task, out, Progress.line(progress, text), best)
        end

      {:event, {:candidate, _worse}} ->
        listen(task, out, progress, best)

      {:event, {:progress, event}} ->
        listen(task, out, Progress.show(progress, under_way(event)), best)

      :interrupted ->
        Task.shutdown(task, :brutal_kill)
        Progress.finish(progress)
        {:interrupted, best}

      :over ->
        Progress.finish(progress)
        {Task.await(task, :infinity), best}
    end
  end

  defp better(progress, %{score: score} = candidate, out) do
    score = Evaluate.Table.number(score)
    text = "candidate #{candidate.number}: #{score} on #{candidate.of} examples, in #{out}"
    Progress.line(progress, text)
  end

  defp under_way(event) do
    done = if event.total, do: "#{event.done}/#{event.total}, "
    best = if event.best, do: ", best #{Evaluate.Table.number(event.best)}"
    "#{done}#{event.step}, #{event.lm_calls} LM calls#{best}"
  end

  # As a message to this process: the BEAM's own handler would end everything at once, with the status 0.
  defp with_sigterm(fun) do
    me = self()

    stop = fn ->
      send(me, :interrupted)
      :ok
    end

    :gen_event.delete_handler(:erl_signal_server, :erl_signal_handler, [])
    {:ok, trap} = System.trap_signal(:sigterm, stop)

    try do
      fun.()
    after
      System.untrap_signal(:sigterm, trap)
      :gen_event.add_handler(:erl_signal_server, :erl_signal_handler, [])
    end
  end

  # The state is that at the beginning.
  defp finished(%{stopped: budget, score: nil}, _out, _gain) when budget != nil,
    do: {:error, "#{budget} were spent before the first candidate; nothing was written"}

  defp finished(result, out, gain) do
    known = if result.score && result.baseline, do: result.score - result.baseline
    not_better = if known && known < @same, do: "not better than before\n"

    with :ok <- write(result.state, out) do
      Mix.shell().info("#{result}\n#{not_better}the state is in #{out}")
      require_gain(known, gain)
    end
  end

  defp require_gain(_known, nil), do: :ok

  defp require_gain(nil, gain),
    do: failed("the gain is not known, and --require-gain is #{gain}")

  defp require_gain(known, gain) when known < gain - @same,
    do: failed("the gain is #{Evaluate.Table.number(known)}, below --require-gain #{gain}")

  defp require_gain(_known, _gain), do: :ok

  @spec failed(String.t()) :: no_return()
  defp failed(text) do
    Mix.shell().error("failed: " <> text)
    exit({:shutdown, 1})
  end

  defp explained(error, nil, _out), do: error

  defp explained(error, best, out),
    do: %{error | message: "#{error.message}; #{kept(best, out)}"}

  defp kept(best, out),
    do: "#{out} has the best state so far, with the score #{Evaluate.Table.number(best)}"

  @spec refuse(String.t()) :: no_return()
  defp refuse(text), do: Mix.raise(text, exit_status: 2)
end
