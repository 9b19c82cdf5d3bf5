defmodule DSPex.PythonBridge.Durable do
  @moduledoc """
  Runs that outlive their process, their node and a deploy.

      tools = %{refund: {&MyApp.Billing.refund/2, approve: true, repeat: false}}
      opts = [store: {FileStore, "/var/lib/my_app/runs"}, tools: tools]
      args = %{program_id: "support", inputs: %{ticket: "I was charged twice!"}}

      {:suspended, run} = Durable.run(MyApp.Pool, args, [id: "ticket-7"] ++ opts)
      [%{key: key, tool: "refund", args: %{"cents" => 900}}] = run.waiting

      # Two days and a deploy later, on any node that reaches the store.
      {:ok, result, meta} = Durable.resume(MyApp.Pool, "ticket-7", [approve: key] ++ opts)

  Each answer of an LM and each result of a tool is stored before anything follows from it. When the run is resumed, no LM is
  asked again for what was stored, and no tool with a stored result is called again. What was under way at a crash and had
  not come yet is asked for again.

  A run is at work in the process that calls `run/3` or `resume/3`, and ends with it. Between these there is no process and no
  Python. One process at a time has a run, by a claim in the store that lasts `:lease` ms and is extended meanwhile: the others
  get `{:error, :claimed}`.

  docs/guide/durable.md shows approvals in LiveView, resumption by jobs, a store in PostgreSQL and what to erase.

  ## Options

    * `:store` – `{module, term}` or a module: `DSPex.PythonBridge.Durable.Store`
    * `:lease` – 1,000 to 86,400,000 ms, by default 30,000: how long a run stays claimed after its node has died. A store
      that takes longer for one record ends the run
    * `:tools` – as for `DSPex.PythonBridge.Bridge.request/4`. `{function, approve: true}`: each call waits for an approval.
      A function may return `{:suspend, info}` to wait for a decision; `info` has a JSON form. With `repeat: false` a call that had begun
      and whose result was not stored, since the node died, waits for a decision, too (`"unknown_outcome"`); without, the function is called
      again, with the same `call_key`
    * `:budget` – as for `DSPex.PythonBridge.Bridge.request/4`. A spent budget suspends the run; a new one in `resume/3` is
      for all that the run spends from its beginning on
    * `:timeout`, `:on_chunk`, `:history`, `:traceparent`, `:telemetry_metadata` – as for
      `DSPex.PythonBridge.Bridge.request/4`, of this call alone
    * `:attempts`, `:max_concurrency`, `:item_timeout_ms` – of `run/3` alone: they are stored

  Decisions about calls that wait, by their keys, for `resume/3` and for `run/3` with the id of a run that is there; each may be
  a list:

    * `:approve` – a key: the function is called
    * `:deny` – `{key, text}`: it is not called, and the LM is told the text
    * `:answer` – `{key, value}`: it is not called, and the value is its result
    * `:keep` – a number: of the stored answers of LMs only the first ones count, `0` for a run from its beginning. It is the
      way on after `:journal_mismatch`, when the program has changed. Results of tools stay

  `:store` and `:lease` may be set for all: `config :dspex, :durable, store: {FileStore, "/var/lib/my_app/runs"}`.

  A wrong option is an error of type `:invalid_request`. Keys of an LM in `args` are refused: they would be stored.
  """

  alias DSPex.PythonBridge.{Bridge, Error, Pool, Telemetry}
  alias DSPex.PythonBridge.Durable.{History, Options, Run, Session, Store}
  alias DSPex.PythonBridge.Telemetry.Metadata

  @type result ::
          {:ok, term(), meta :: map()}
          | {:suspended, Run.t()}
          | {:error, :claimed | :not_found | Error.t()}

  @doc """
  Makes a run of `execute_program`, whose arguments `args` are, under an id of your own.

  If there is one with this id, it goes on, or gives its result again; with other arguments it is an error.

    * `{:ok, result, meta}` – as of `DSPex.PythonBridge.Bridge.request/4`
    * `{:suspended, run}` – it waits for the decisions of `run.waiting`
    * `{:error, :claimed}` – another process has it
    * `{:error, %DSPex.PythonBridge.Error{}}` – the run can be resumed, unless it was cancelled. `:journal_mismatch`: the program
      asks something else than it did; see `:keep`
  """
  @spec run(Bridge.server() | Pool.pool(), map(), keyword()) :: result()
  def run(server, args, opts) do
    with {:ok, opts} <- Options.check(opts, :run),
         {:ok, args} <- Options.arguments(args, opts),
         do: look(server, opts.id, args, opts)
  end

  @doc """
  Goes on with a run, with the decisions that it waits for: the result is that of `run/3`, or `{:error, :not_found}`. Without a
  decision, a suspended run stays so.
  """
  @spec resume(Bridge.server() | Pool.pool(), String.t(), keyword()) :: result()
  def resume(server, id, opts) do
    with {:ok, opts} <- Options.check(opts, :resume), do: look(server, id, nil, opts)
  end

  # What is over needs no claim.
  defp look(server, id, args, opts) do
    case read(id, opts) do
      {:ok, %History{id: nil}} when args == nil -> {:error, :not_found}
      {:ok, %History{over: over} = history} when over != nil -> over(history, args)
      {:ok, _history} -> claimed(id, opts, opts.tools, &go_on(server, &1, &2, id, args, opts))
      error -> error
    end
  end

  defp over(history, args) do
    with :ok <- same(history, args) do
      case history.over do
        {:done, result, meta} -> {:ok, result, meta}
        :cancelled -> {:error, Error.new(:cancelled, "the run was cancelled")}
      end
    end
  end

  defp read(id, opts) do
    with {:ok, records} <- Store.call(opts.store, :read, [id], opts.lease),
         {:ok, history} <- History.read(records) do
      {:ok, history}
    else
      {:error, reason} -> failed(reason)
    end
  end

  defp failed(:claimed), do: {:error, :claimed}
  defp failed(text), do: {:error, Error.new(:internal, "the run's records: #{text}")}

  defp claimed(id, opts, tools, fun) do
    case Session.start(opts.store, id, opts.lease, tools) do
      {:ok, session, history} -> finished(session, fn -> fun.(session, history) end)
      {:error, reason} -> failed(reason)
    end
  end

  # What the caller gives may raise, or throw: `:on_chunk`.
  defp finished(session, fun) do
    fun.()
  catch
    kind, reason ->
      Session.finish(session, "its process has raised")
      :erlang.raise(kind, reason, __STACKTRACE__)
  end

  defp go_on(server, session, history, id, args, opts) do
    with true <- history.id != nil or args != nil or {:error, :not_found},
         :ok <- same(history, args),
         :ok <- tools(history, opts.tools.functions),
         {:ok, decisions} <- Options.decisions(opts, history),
         {:ok, history} <- stored(session, history, begun(history, args) ++ decisions) do
      about = %{server: Metadata.name(server), run_id: id, program_id: history.args["program_id"]}

      cond do
        history.over != nil ->
          Session.finish(session, nil)
          over(history, nil)

        decisions == [] and map_size(history.waiting) > 0 ->
          ended(session, nil, about)

        true ->
          if history.entries != [], do: emit(:resumed, about)
          server |> request(session, history, opts) |> spent(history) |> concluded(session, about)
      end
    else
      {:error, error} ->
        # As it was.
        if history.id, do: Session.finish(session, nil), else: Session.delete(session)
        {:error, error}
    end
  end

  defp same(%History{args: before}, args) do
    if args == nil or before == nil or before == args,
      do: :ok,
      else: Options.refuse(":id: there is a run with this id and other arguments")
  end

  defp tools(history, functions) do
    case Enum.sort(Enum.reject(history.tools, &is_map_key(functions, &1))) do
      [] ->
        :ok

      missing ->
        Options.refuse(
          ":tools: expected those that the run has called: #{Enum.join(missing, ", ")}"
        )
    end
  end

  defp begun(%History{id: nil}, args), do: [History.run(args)]
  defp begun(_history, _args), do: []

  defp stored(_session, history, []), do: {:ok, history}

  defp stored(session, history, [record | records]) do
    with :ok <- Session.append(session, record),
         {:ok, history} <- History.add(history, record) do
      stored(session, history, records)
    else
      {:error, text} -> {:error, Error.new(:internal, text)}
    end
  end

  defp request(server, session, history, opts) do
    keeper = %{
      run_id: history.id,
      on_journal: &Session.append(session, History.entry(&1)),
      on_killed: &Session.killed(session, &1, &2)
    }

    of_run = [
      keeper: keeper,
      journal: Enum.reverse(history.entries),
      tools: Session.wrapped(session, opts.tools)
    ]

    budget = if history.budget, do: %{"budget" => history.budget}, else: %{}
    args = Map.merge(history.args, budget)
    client = if Pool.Handle.fetch(server), do: Pool, else: Bridge

    client.request(server, :execute_program, args, Options.request(opts) ++ of_run)
  end

  # A batch ends with success, whatever its items do.
  defp spent(
         {:ok, %{"results" => items}, meta} = result,
         %History{args: %{"inputs" => [_ | _]}} = history
       ) do
    case Enum.find(items, &(&1["error_type"] == "budget_spent")) do
      nil -> result
      item -> spent(result, history, meta["budget"], Error.new(:budget_spent, item["error"]))
    end
  end

  defp spent({:error, %Error{type: :budget_spent, meta: meta} = error} = result, history),
    do: spent(result, history, meta["budget"], error)

  defp spent(result, _history), do: result

  # Else it is a budget of others, of a tenant for example.
  defp spent(result, %History{budget: budget}, spent, error) do
    if budget && spent && Enum.any?(budget, fn {name, limit} -> spent[name] >= limit end),
      do: {:spent, spent, error},
      else: result
  end

  defp concluded({:ok, result, meta}, session, about) do
    record = %{over: "done", result: result, meta: Map.delete(meta, "history")}

    case Session.append(session, History.record(record)) do
      :ok ->
        Session.finish(session, nil)
        {:ok, result, meta}

      {:error, text} ->
        ended(session, Error.new(:internal, "the result could not be stored: #{text}"), about)
    end
  end

  defp concluded({:spent, spent, error}, session, about) do
    wait = %{wait: History.budget_key(), tool: nil, args: nil, why: spent}

    if Session.append(session, History.record(wait)) == :ok,
      do: ended(session, nil, about),
      else: ended(session, error, about)
  end

  defp concluded({:error, error}, session, about) do
    if error.type == :journal_mismatch, do: emit(:diverged, about)
    ended(session, error, about)
  end

  defp ended(session, error, about) do
    case Session.finish(session, error && error.message) do
      {:ok, run, true} ->
        emit(:suspended, about)
        {:suspended, run}

      {:ok, _run, false} ->
        {:error, error}

      {:error, text} ->
        {:error, error || Error.new(:internal, text)}
    end
  end

  defp emit(event, about), do: Telemetry.execute([:durable, event], %{count: 1}, about)

  ## Runs that are there

  @doc "The runs of a store, in the order of their ids, without their results. `opts`: `:store`, `:lease`."
  @spec list(keyword()) :: {:ok, [Run.t()]} | {:error, Error.t()}
  def list(opts \\ []) do
    with {:ok, opts} <- Options.check(opts, :store),
         {:ok, listed} <- Store.call(opts.store, :list, [], opts.lease) do
      {:ok,
       for({id, claimed?, summary} <- Enum.sort(listed), do: listed(id, claimed?, summary, opts))}
    else
      {:error, text} when is_binary(text) -> failed(text)
      error -> error
    end
  end

  defp listed(id, claimed?, summary, opts) do
    run =
      (summary && Run.of_summary(id, summary)) ||
        case read(id, opts) do
          {:ok, history} -> Run.of(id, history)
          {:error, error} -> %Run{id: id, state: :unreadable, error: error.message}
        end

    if claimed?, do: %{run | state: :running, waiting: []}, else: run
  end

  @doc "Cancels a run, which nothing resumes any more; its records stay. One that is at work ends with its process alone."
  @spec cancel(String.t(), keyword()) :: :ok | {:error, :claimed | :not_found | Error.t()}
  def cancel(id, opts \\ []) do
    with {:ok, opts} <- Options.check(opts, :store),
         {:ok, %History{id: run}} <- read(id, opts),
         true <- run != nil || {:error, :not_found} do
      claimed(id, opts, Options.no_tools(), fn session, history ->
        stored =
          if history.over,
            do: :ok,
            else: Session.append(session, History.record(%{over: "cancelled"}))

        Session.finish(session, nil)
        with {:error, text} <- stored, do: failed(text)
      end)
    end
  end

  @doc "Erases a run with all that was stored of it, also one that is over. It is `:ok` if there is none."
  @spec delete(String.t(), keyword()) :: :ok | {:error, :claimed | Error.t()}
  def delete(id, opts \\ []) do
    with {:ok, opts} <- Options.check(opts, :store) do
      claimed(id, opts, nil, fn session, _history ->
        with {:error, text} <- Session.delete(session), do: failed(text)
      end)
    end
  end
end
