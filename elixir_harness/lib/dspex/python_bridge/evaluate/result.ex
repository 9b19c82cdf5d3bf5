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
  # `items`: newest first. `sum`: of all scores.
  @type tally :: %{
          items: [item()],
          usage: map(),
          done: integer(),
          failed: integer(),
          sum: float()
        }

  @doc false
  @spec tally() :: tally()
  def tally, do: %{items: [], usage: %{}, done: 0, failed: 0, sum: 0.0}

  @doc false
  @spec add(tally(), item(), meta :: map()) :: tally()
  def add(tally, item, meta) do
    %{
      items: [item | tally.items],
      usage: add_usage(tally.usage, meta),
      done: tally.done + 1,
      failed: tally.failed + if(item.error, do: 1, else: 0),
      sum: tally.sum + item.score
    }
  end

  @doc false
  @spec figures(tally(), total :: non_neg_integer() | nil) :: map()
  def figures(tally, total) do
    score = if tally.done > 0, do: tally.sum / tally.done

    %{done: tally.done, total: total, failed: tally.failed, score: score}
    |> Map.merge(Usage.measurements(tally.usage))
  end

  @doc false
  @spec mean([number()]) :: float() | nil
  def mean([]), do: nil
  def mean(scores), do: Enum.sum(scores) / length(scores)

  @doc false
  @spec new(tally(), non_neg_integer()) :: t()
  def new(tally, duration_ms) do
    results = Enum.sort_by(tally.items, & &1.index)

    %__MODULE__{
      score: results |> Enum.map(& &1.score) |> mean(),
      failed: tally.failed,
      results: results,
      usage: tally.usage,
      duration_ms: duration_ms
    }
  end

  @doc false
  @spec item(term(), term(), non_neg_integer()) :: {:ok, item()} | {:error, Error.t()}
  def item(example, %{"results" => [%{"score" => score} = result]}, index)
      when is_number(score) do
    {inputs, expected} = Examples.pair(example)

    {:ok,
     %{
       index: index,
       inputs: inputs,
       expected: expected,
       prediction: result["result"],
       error: error(result),
       score: score / 1,
       feedback: result["feedback"]
     }}
  end

  def item(_example, _other, _index),
    do: {:error, Error.new(:internal, "the peer sent no valid results")}

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
