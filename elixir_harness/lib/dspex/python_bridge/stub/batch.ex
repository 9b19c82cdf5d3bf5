defmodule DSPex.PythonBridge.Stub.Batch do
  @moduledoc false
  # The runs of a list of inputs, as the peer makes them: each in a process of its own, at most `max_concurrency` at once,
  # each for its `item_timeout` at most. At the deadline of the call those that have no result get a timeout.

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Stub.{Answer, Answers, Context, Evaluation, Reply}

  # The results are sent so long before the deadline: see docs/protocol.md.
  @earlier_ms 250

  # What the peer sums over the runs of a list.
  @summed ~w(lm_calls cache_hits cost_usd lm_usage fallbacks finish_reasons)

  @typedoc "The inputs of a run with what answers them, or what is wrong with them."
  @type item :: {map(), Answers.answer()} | {:error, Error.t()}
  @type limits :: %{
          max_concurrency: pos_integer() | :infinity,
          item_timeout: number() | :infinity
        }

  @doc """
  The results, in the order of the items, and the sum of what their answers say in `meta`; with an evaluation each has its score, and an error that would be that of all
  items is the whole's. It runs in the process of the run, which must not run answers itself.
  """
  @spec run(Context.t(), [item()], limits(), Evaluation.t() | nil) ::
          {:ok, [map()], map()} | {:error, Error.t()}
  def run(run, items, limits, evaluation) do
    # An answer that is killed is an error of its item.
    Process.flag(:trap_exit, true)
    ends = with end_ms when is_integer(end_ms) <- run.deadline, do: end_ms - earlier(run.timeout)
    state = %{run: run, limits: limits, ends: ends, running: %{}, results: %{}, meta: %{}}
    state = state |> Map.put(:evaluation, evaluation) |> work(Enum.with_index(items))
    {:ok, for(index <- 0..(length(items) - 1)//1, do: state.results[index]), state.meta}
  catch
    {:ended, error} -> {:error, error}
  end

  defp earlier(timeout), do: min(@earlier_ms, div(timeout, 10))

  defp work(%{running: running} = state, []) when running == %{}, do: state

  defp work(%{running: running, limits: limits} = state, [{item, index} | items])
       when map_size(running) < limits.max_concurrency,
       do: state |> start(item, index) |> work(items)

  defp work(state, waiting) do
    now = Deadline.now()
    next = Enum.min([state.ends | for({_pid, {_index, ends}} <- state.running, do: ends)])

    receive do
      {:item, pid, result} -> state |> ended(pid, result) |> work(waiting)
      {:EXIT, server, reason} when server == state.run.server -> exit(reason)
      {:EXIT, pid, reason} -> state |> ended(pid, died(state, reason)) |> work(waiting)
    after
      if(next == :infinity, do: :infinity, else: max(next - now, 0)) ->
        if Deadline.left(state.ends) == 0,
          do: over(state, waiting),
          else: state |> late() |> work(waiting)
    end
  end

  defp start(state, {:error, error}, index), do: settle(state, index, {:error, error})

  defp start(%{run: run} = state, {inputs, answer}, index) do
    collector = self()

    pid =
      spawn_link(fn ->
        # The peer streams items, not their chunks.
        Context.enter(%{run | stream?: false})
        result = Answer.call(run, inputs, answer)
        send(collector, {:item, self(), scored(state.evaluation, index, result)})
      end)

    ends = Deadline.new(with(ms when is_float(ms) <- state.limits.item_timeout, do: ceil(ms)))
    put_in(state.running[pid], {index, ends})
  end

  defp scored(nil, _index, {:ok, outputs, meta}), do: {:ok, outputs, %{}, meta}
  defp scored(nil, _index, error), do: error

  defp scored(evaluation, index, {:ok, outputs, meta}) do
    case Evaluation.score(evaluation, index, outputs) do
      {:ok, scored} -> {:ok, outputs, scored, meta}
      {:error, error} -> {:ended, error}
    end
  end

  defp scored(_evaluation, _index, {:error, error}),
    do: if(Evaluation.hits_all?(error), do: {:ended, error}, else: {:error, error})

  # Its exit, or a result after its time.
  defp ended(state, pid, _result) when not is_map_key(state.running, pid), do: state

  defp ended(state, _pid, {:ended, error}) do
    for {pid, _item} <- state.running, do: Process.exit(pid, :kill)
    throw({:ended, error})
  end

  defp ended(state, pid, result) do
    {{index, _ends}, running} = Map.pop!(state.running, pid)
    settle(%{state | running: running}, index, result)
  end

  defp died(state, reason) do
    text =
      "stub #{inspect(state.run.stub)}, program #{state.run.program}: the answer's process ended"

    {:error, Error.new(:internal, "#{text}: #{inspect(reason)}")}
  end

  defp late(%{limits: limits} = state) do
    text = "not finished within #{limits.item_timeout} ms"

    for {pid, {_index, ends}} <- state.running, Deadline.left(ends) == 0, reduce: state do
      state -> end_item(state, pid, text)
    end
  end

  defp over(state, waiting) do
    text = "within #{state.run.timeout} ms"
    state = Enum.reduce(Map.keys(state.running), state, &end_item(&2, &1, "not finished #{text}"))

    for {_item, index} <- waiting, reduce: state do
      state -> settle(state, index, {:error, Error.new(:timeout, "not started #{text}")})
    end
  end

  defp end_item(state, pid, text) do
    Process.exit(pid, :kill)
    ended(state, pid, {:error, Error.new(:timeout, text)})
  end

  defp settle(state, index, result) do
    {result, meta} =
      case result do
        {:ok, outputs, scored, meta} ->
          {Map.merge(scored, %{"success" => true, "result" => outputs}), meta}

        {:error, error} ->
          {error |> Reply.failure() |> Map.merge(failed(state.evaluation)), error.meta || %{}}
      end

    Context.stream(state.run, Map.put(result, "index", index))
    state = %{state | meta: sum(state.meta, Map.take(meta, @summed))}
    put_in(state.results[index], result)
  end

  # One that is not known makes the sum unknown.
  defp sum(one, other) when is_number(one) and is_number(other), do: one + other
  defp sum(one, other) when is_list(one) and is_list(other), do: one ++ other

  defp sum(one, other) when is_map(one) and is_map(other),
    do: Map.merge(one, other, fn _key, one, other -> sum(one, other) end)

  defp sum(_one, _other), do: nil

  defp failed(nil), do: %{"success" => false}
  defp failed(_evaluation), do: %{"success" => false, "score" => 0.0}
end
