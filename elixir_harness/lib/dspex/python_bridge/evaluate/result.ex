defmodule DSPex.PythonBridge.Evaluate.Result do
  @moduledoc """
  What `DSPex.PythonBridge.Evaluate.run/4` has measured.

    * `score` – the mean of all scores, of failed runs 0; nil without examples
    * `failed` – how many runs failed
    * `results` – in the order of the examples, maps of `index`, `inputs`, `expected`, `prediction` (the outputs, with string
      keys; nil if the run failed), `error` (nil, or a `DSPex.PythonBridge.Error`), `score` and `feedback` (nil, or text)
    * `usage` – the sums of `"lm_calls"`, `"cache_hits"`, `"cost_usd"` (nil if any is not known), `"wait_ms"` and, by model, `"lm_usage"`
    * `duration_ms`

  `inspect/2`, `IO.inspect/1` and `IO.puts/1` show a table with the worst results first, contents included.
  """

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Evaluate.{Examples, Table}
  alias DSPex.PythonBridge.Telemetry.Usage

  @enforce_keys [:score, :failed, :results, :usage, :duration_ms]
  defstruct @enforce_keys

  @type item :: %{
          index: non_neg_integer(),
          inputs: map() | keyword(),
          expected: map() | nil,
          prediction: map() | nil,
          error: Error.t() | nil,
          score: float(),
          feedback: String.t() | nil
        }
  @type t :: %__MODULE__{
          score: float() | nil,
          failed: non_neg_integer(),
          results: [item()],
          usage: map(),
          duration_ms: non_neg_integer()
        }

  @typedoc false
  # `lists`: of the results of each request, newest first. `sum`: of all scores.
  @type tally :: %{
          lists: [[item()]],
          usage: map(),
          done: non_neg_integer(),
          failed: non_neg_integer(),
          sum: float()
        }

  @doc false
  @spec tally() :: tally()
  def tally, do: %{lists: [], usage: %{}, done: 0, failed: 0, sum: 0.0}

  @doc false
  @spec add(tally(), [item()], meta :: map()) :: tally()
  def add(tally, items, meta) do
    %{
      lists: [items | tally.lists],
      usage: add_usage(tally.usage, meta),
      done: tally.done + length(items),
      failed: tally.failed + Enum.count(items, & &1.error),
      sum: tally.sum + Enum.sum_by(items, & &1.score)
    }
  end

  @doc false
  @spec figures(tally(), total :: non_neg_integer() | nil) :: map()
  def figures(tally, total) do
    %{done: tally.done, total: total, failed: tally.failed, score: score(tally)}
    |> Map.merge(Usage.measurements(tally.usage))
  end

  defp score(%{done: 0}), do: nil
  defp score(%{done: done, sum: sum}), do: sum / done

  @doc false
  @spec mean([number()]) :: float() | nil
  def mean([]), do: nil
  def mean(scores), do: Enum.sum(scores) / length(scores)

  @doc false
  @spec new(tally(), non_neg_integer()) :: t()
  def new(tally, duration_ms) do
    results = tally.lists |> Enum.sort_by(&hd(&1).index) |> Enum.concat()

    %__MODULE__{
      score: results |> Enum.map(& &1.score) |> mean(),
      failed: tally.failed,
      results: results,
      usage: tally.usage,
      duration_ms: duration_ms
    }
  end

  @doc false
  @spec items([term()], term(), non_neg_integer()) :: {:ok, [item()]} | {:error, Error.t()}
  def items(examples, %{"results" => results}, before)
      when length(results) == length(examples) do
    if Enum.all?(results, &match?(%{"score" => score} when is_number(score), &1)) do
      numbered = Enum.with_index(Enum.zip(examples, results), before)
      {:ok, for({{example, result}, index} <- numbered, do: item(example, result, index))}
    else
      invalid()
    end
  end

  def items(_examples, _other, _before), do: invalid()

  defp invalid, do: {:error, Error.new(:internal, "the peer sent no valid results")}

  defp item(example, result, index) do
    {inputs, expected} = Examples.pair(example)

    %{
      index: index,
      inputs: inputs,
      expected: expected,
      prediction: result["result"],
      error: error(result),
      score: result["score"] / 1,
      feedback: result["feedback"]
    }
  end

  defp error(%{"success" => true}), do: nil

  defp error(failure),
    do: Error.from_peer(failure["error_type"], failure["error"], failure["retryable"])

  @doc false
  @spec add_usage(map(), map()) :: map()
  def add_usage(usage, meta) do
    meta
    |> Map.take(~w(lm_calls cache_hits cost_usd wait_ms lm_usage))
    |> Map.merge(usage, fn _key, one, other -> sum(one, other) end)
  end

  defp sum(one, other) when is_number(one) and is_number(other), do: one + other

  defp sum(one, other) when is_map(one) and is_map(other),
    do: Map.merge(one, other, fn _key, one, other -> sum(one, other) end)

  # What is not known of one is not known of the sum.
  defp sum(_one, _other), do: nil

  defimpl String.Chars do
    def to_string(result), do: Table.text(result)
  end

  defimpl Inspect do
    def inspect(result, _opts),
      do: "#DSPex.PythonBridge.Evaluate.Result<\n" <> Table.text(result) <> "\n>"
  end
end
