defmodule DSPex.PythonBridge.Optimize do
  @moduledoc """
  Improves a program: an optimizer of DSPy tries instructions and demos, and keeps what scores best by a metric.

      {:ok, result} =
        Optimize.run(MyApp.Pool, MyApp.Triage,
          trainset: train,
          valset: validation,
          metric: {:field, :team, :exact_match},
          optimizer: :mipro_v2,
          budget: [lm_calls: 500, seconds: 3600],
          on_progress: &IO.inspect/1
        )

      IO.puts(result)
      File.write!("triage.json", JSON.encode!(result.state))
      {:ok, _} = Pool.call(MyApp.Pool, :create_program, %{result.definition | id: "triage-2"})

  The program itself is not changed: `result.definition` is the better one, to be created under the same id or another. Its
  `state` is a map with a JSON form, for a file or a database.

  ## Optimizers

  | `:optimizer` | what it does | `:options` (docs/protocol.md) |
  | --- | --- | --- |
  | `:labeled_few_shot` | takes examples as demos, and asks no LM for it | `k` |
  | `:bootstrap_few_shot` | makes demos of runs that the metric likes | `max_bootstrapped_demos`, `max_labeled_demos`, `max_rounds` |
  | `:random_search` | the same with several choices of demos | `num_candidate_programs`, `stop_at_score` |
  | `:copro` | writes other instructions, in rounds | `breadth`, `depth` |
  | `:mipro_v2` | searches instructions and demos together; needs optuna | `auto` (`"light"`) |
  | `:simba` | learns from its worst runs; needs numpy | `bsize`, `num_candidates`, `max_steps` |
  | `:gepa` | reflects on feedback, predictor by predictor; needs `:reflection_lm` | one of `auto`, `max_full_evals`, `max_metric_calls` |
  """

  alias DSPex.PythonBridge.{Bridge, Client, Error, Evaluate, Pool, Program}
  alias DSPex.PythonBridge.Client.StreamReducer
  alias DSPex.PythonBridge.Optimize.{Progress, Request, Result}
  alias DSPex.PythonBridge.OTP.{Ask, Deadline}
  alias DSPex.PythonBridge.Telemetry.RunSpan

  @typedoc """
  What `:on_progress` gets:

    * `{:progress, map}`, at most ten times a second: the optimizer's `step`, `done` of `total` of its present evaluation
      (nil if it has none), `lm_calls` so far, and the `best` score so far (nil before the first)
    * `{:candidate, map}` for each program that was scored on the whole set: its `number`, its `score`, the mean `of` how many
      examples that is, whether it is the `best` so far, and if so its `state` (else nil)
  """
  @type event :: {:progress, map()} | {:candidate, map()}
  @type lm :: String.t() | map() | keyword()
  @type option ::
          {:trainset, Enumerable.t(Evaluate.example())}
          | {:valset, Enumerable.t(Evaluate.example())}
          | {:metric, Evaluate.metric()}
          | {:optimizer, atom() | String.t()}
          | {:options, map() | keyword()}
          | {:budget, map() | keyword()}
          | {:on_progress, (event() -> :stop | term())}
          | {:num_threads, 1..64}
          | {:seed, integer()}
          | {:prompt_lm, lm()}
          | {:teacher_lm, lm()}
          | {:reflection_lm, lm()}
          | {:lm, lm()}
          | {:timeout, timeout()}
          | {:tools, map()}
          | {:retry, boolean()}
          | {:traceparent, String.t() | nil}
          | {:telemetry_metadata, map()}

  @doc """
  Optimizes a program: `{:ok, %DSPex.PythonBridge.Optimize.Result{}}`, or `{:error, %DSPex.PythonBridge.Error{}}`.

  `server` is a bridge, or a pool of this node. One peer makes the run, and serves other calls meanwhile. `definition` is
  what `create_program` takes, a map with an `id`, or a module with `use DSPex.PythonBridge.Program`; its own `state` is where
  the optimizer starts. The program need not exist: until the end there is one under an id of its own, such as
  `"triage:optimize:1f3a…"`.

  These end it at once, as its error: a metric that fails (`:tool_error`), a key that the LM refuses (`:lm_error`) or none
  (`:lm_not_configured`), wrong arguments (`:invalid_args` or `:invalid_request`, with a text that names them), a package
  that is not installed (`:invalid_args`), the timeout, too many optimizations on all peers (`:overloaded`).

  If the peer dies, the run is made again by the next one, as often as the bridge's or pool's `:max_retries` says. The metric
  and the tools are not called again for what they have answered, and with DSPy's disk cache no LM is either. The answers are
  kept until the end: some 300 bytes each, and their feedback. `:on_progress` then gets candidates again. If the calling
  process ends, so do the run and the metric.

  Options:

    * `:trainset` – required. Examples, as for `DSPex.PythonBridge.Evaluate.run/4`. All are sent at once, in one frame
    * `:valset` – other examples, on which `:random_search`, `:mipro_v2` and `:gepa` score candidates. Without it they take the
      trainset, or a part of it, as `:copro` and `:simba` always do; the first two score none
    * `:metric` – required, as for `DSPex.PythonBridge.Evaluate.run/4`. Its function runs in processes of its own, several at
      once. With three arguments it gets what the score is for: `:score`, `:bootstrap` (is this run good enough for a
      demo?), or `{:feedback, predictor}` of `:gepa`, a map of `name`, `inputs` and `outputs`, of which it may say in
      `{score, feedback}` what was wrong
    * `:optimizer` – required, see above; `:options` – its own options
    * `:budget` – `lm_calls`, `tokens`, `seconds`: when one of them is spent, the result is the best candidate so far, and
      `stopped` names it
    * `:on_progress` – a function that is called in this process with each `t:event/0`. If it returns `:stop`, the run ends
      and the result is the best candidate so far, with `stopped: "caller"`
    * `:num_threads` – how many runs of the program are in work at once, 1 to 64; by default 8
    * `:seed` – of the choices of `:mipro_v2`, `:simba` and `:gepa`
    * `:prompt_lm`, `:teacher_lm`, `:reflection_lm` – the LMs that write instructions, make demos and reflect
    * `:lm` – of the program for this run, as in docs/protocol.md
    * `:timeout` – in ms, after which the best candidate is lost, unlike that of a budget; by default `:infinity`
    * `:tools` – as in `DSPex.PythonBridge.Bridge.request/4`, in addition to those that the module has
    * `:retry`, `:traceparent`, `:telemetry_metadata` – as there
  """
  @spec run(Bridge.server() | Pool.pool(), map() | module(), [option()]) ::
          {:ok, Result.t()} | {:error, Error.t()}
  def run(server, definition, opts) do
    with {:ok, id, given, spec} <- read(definition),
         {:ok, request} <- Request.new(opts, spec) do
      metadata = Keyword.get(request.opts, :telemetry_metadata, %{})
      about = %{program_id: id, telemetry_metadata: metadata, optimizer: request.optimizer}
      started = Deadline.now()

      RunSpan.run(:optimize, server, about, %{}, fn span ->
        progress = %Progress{report: request.on_progress, span: span}

        with {:ok, client} <- client(server),
             {reply, progress} <- optimize(client, server, {id, given}, request, progress),
             {:ok, result} <- Result.new(reply, progress, given, Deadline.now() - started) do
          RunSpan.update(span, Map.merge(Progress.figures(progress), Result.figures(result)))
          {:ok, result}
        end
      end)
    end
  end

  defp read(definition) do
    case Program.Tools.declared(definition) do
      {:ok, id, spec} ->
        given = if is_atom(definition), do: definition.definition(), else: definition
        {:ok, id, Map.new(given), spec}

      {:error, text} ->
        {:error, Error.new(:invalid_request, "definition: #{text}")}
    end
  end

  # A pool of another node is refused: a process of another kind may never answer.
  defp client(server) do
    case Program.Runner.client(server) do
      Pool -> {:ok, Pool}
      Bridge -> with({:ok, _dest} <- Client.Caller.find_anywhere(server), do: {:ok, Bridge})
    end
  end

  # A program of its own, so that nobody redefines or removes it meanwhile.
  defp optimize(client, server, {id, given}, request, progress) do
    deadline = Deadline.new(request.timeout)
    suffix = Base.encode16(:crypto.strong_rand_bytes(6), case: :lower)
    temporary = "#{id}:optimize:#{suffix}"
    keeper = keeper(client, server, given |> Map.drop([:id, "id"]) |> Map.put(:id, temporary))

    try do
      case Ask.ask(keeper, request.timeout, &{:created, &1}) do
        {:ok, {:ok, _created, _meta}} ->
          args = Map.put(request.args, :program_id, temporary)
          left = Deadline.left(deadline)
          call = streamed(client).(server, :execute_program, args, left, request.opts)
          # Its events have the id of the definition.
          stream(put_elem(call, 3, %{program_id: id}), progress)

        {:ok, error} ->
          {error, progress}

        # Somebody killed it.
        :down ->
          {{:error, Error.new(:internal, "the process that creates the program ended")}, progress}

        {:timeout, _ref} ->
          {{:error, Error.new(:timeout)}, progress}
      end
    after
      send(keeper, :remove)
    end
  end

  # A process that creates the program, and removes it when it is asked to, or when the caller has died: not before the
  # program is there, else it would stay. The caller does not wait for it.
  defp keeper(client, server, %{id: id} = definition) do
    caller = self()

    spawn(fn ->
      watch = Process.monitor(caller)
      keep(client.request(server, :create_program, definition, timeout: :infinity), watch)
      client.request(server, :cleanup, %{program_ids: [id]}, timeout: :infinity)
    end)
  end

  defp keep(created, watch) do
    receive do
      {:created, ref} ->
        send(ref, {ref, created})
        keep(created, watch)

      :remove ->
        :ok

      {:DOWN, ^watch, :process, _caller, _reason} ->
        :ok
    end
  end

  defp streamed(Pool), do: &Pool.Caller.streamed/5
  defp streamed(Bridge), do: &StreamReducer.to_bridge/5

  defp stream(call, progress) do
    {_ended, last} =
      StreamReducer.reduce(call, {:cont, progress}, fn
        {:chunk, chunk}, progress ->
          case Progress.take(progress, chunk) do
            {:go_on, progress} -> {:cont, progress}
            {:stop, progress} -> {:halt, {:stopped, progress}}
          end

        {:over, reply}, progress ->
          {:cont, {reply, progress}}
      end)

    last
  end
end
