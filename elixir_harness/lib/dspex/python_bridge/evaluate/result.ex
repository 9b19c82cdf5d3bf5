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

  # About the largest float.
  @most 1.0e308

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

  @doc false
  @spec new([item()], map(), non_neg_integer()) :: t()
  def new(items, usage, duration_ms) do
    %__MODULE__{
      score: items |> Enum.map(& &1.score) |> mean(),
      failed: Enum.count(items, & &1.error),
      results: items,
      usage: usage,
      duration_ms: duration_ms
    }
  end

  @doc false
  @spec mean([float()]) :: float() | nil
  def mean([]), do: nil

  def mean(scores) do
    Enum.sum(scores) / length(scores)
  rescue
    # Their sum may be more than a float holds.
    ArithmeticError -> scores |> Enum.map(&(&1 / length(scores))) |> Enum.sum()
  end

  @doc false
  @spec items([term()], term(), non_neg_integer()) :: {:ok, [item()]} | {:error, Error.t()}
  def items(examples, %{"results" => results}, before)
      when is_list(results) and length(results) == length(examples) do
    if Enum.all?(results, &valid?/1) do
      numbered = Enum.with_index(Enum.zip(examples, results), before)
      {:ok, for({{example, result}, index} <- numbered, do: item(example, result, index))}
    else
      invalid()
    end
  end

  def items(_examples, _other, _before), do: invalid()

  # A peer may send anything.
  defp invalid, do: {:error, Error.new(:internal, "the peer sent no valid results")}

  defp valid?(%{"score" => score} = result) do
    score?(score) and text?(result["feedback"]) and
      case result do
        %{"success" => true, "result" => %{}} -> true
        %{"success" => false, "error" => text} -> is_binary(text)
        _other -> false
      end
  end

  defp valid?(_other), do: false

  defp text?(feedback), do: feedback == nil or is_binary(feedback)

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
  @spec score?(term()) :: boolean()
  # A whole number may be more than a float holds.
  def score?(score), do: is_number(score) and abs(score) <= @most

  @doc false
  @spec count?(term()) :: boolean()
  def count?(count), do: is_integer(count) and count >= 0

  @doc false
  @spec add(map(), map()) :: map()
  def add(usage, meta) do
    meta
    |> Map.take(~w(lm_calls cache_hits cost_usd wait_ms lm_usage))
    |> Map.filter(fn {key, value} -> used?(key, value) end)
    |> Map.merge(usage, fn _key, one, other -> sum(one, other) end)
  end

  defp used?("lm_usage", value), do: is_map(value)
  defp used?("cost_usd", value), do: value == nil or score?(value)
  defp used?("wait_ms", value), do: score?(value)
  defp used?(_calls, value), do: count?(value)

  defp sum(one, other) when is_number(one) and is_number(other) do
    one + other
  rescue
    ArithmeticError -> nil
  end

  defp sum(one, other) when is_map(one) and is_map(other),
    do: Map.merge(one, other, fn _, a, b -> sum(a, b) end)

  defp sum(_one, _other), do: nil

  defimpl String.Chars do
    def to_string(result), do: Table.text(result)
  end

  defimpl Inspect do
    def inspect(result, _opts),
      do: "#DSPex.PythonBridge.Evaluate.Result<\n" <> Table.text(result) <> "\n>"
  end
end
