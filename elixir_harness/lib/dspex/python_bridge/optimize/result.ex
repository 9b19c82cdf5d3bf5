defmodule DSPex.PythonBridge.Optimize.Result do
  @moduledoc """
  What `DSPex.PythonBridge.Optimize.run/3` has found.

    * `definition` – the given definition with the new state, for `create_program`
    * `state` – the state alone, a map with a JSON form; nil if the caller has stopped before the first candidate, and the
      definition had none
    * `score` – of that state, the mean over the set on which candidates are scored; nil if it was not scored
    * `baseline` – the same of the program as it was; nil if the optimizer has not scored it
    * `candidates` – how many programs were scored on the whole set
    * `stopped` – nil, or what has ended the run early: `"lm_calls"`, `"tokens"` or `"seconds"` of the budget, or `"caller"`
    * `lm_calls`, `metric_calls` – how many there were; the latter is nil if the caller has stopped
    * `usage` – as in `DSPex.PythonBridge.Evaluate.Result`; empty if the caller has stopped
    * `duration_ms`

  `inspect/2`, `IO.inspect/1` and `IO.puts/1` show the scores, and of the state the instructions and how many demos there
  are.
  """

  alias DSPex.PythonBridge.Evaluate
  alias DSPex.PythonBridge.Optimize.{Definition, Summary}

  @enforce_keys [:definition, :state, :score, :baseline, :candidates, :stopped] ++
                  [:lm_calls, :metric_calls, :usage, :duration_ms]
  defstruct @enforce_keys

  @type t :: %__MODULE__{
          definition: map(),
          state: map() | nil,
          score: float() | nil,
          baseline: float() | nil,
          candidates: non_neg_integer(),
          stopped: String.t() | nil,
          lm_calls: non_neg_integer(),
          metric_calls: non_neg_integer() | nil,
          usage: map(),
          duration_ms: non_neg_integer()
        }

  @doc false
  # A peer may send anything.
  @spec valid?(term()) :: boolean()
  def valid?(%{"candidates" => candidates, "lm_calls" => lm_calls} = reply) do
    Enum.all?(["score", "baseline"], &(reply[&1] == nil or Evaluate.Result.score?(reply[&1]))) and
      Enum.all?([candidates, lm_calls, reply["metric_calls"] || 0], &Evaluate.Result.count?/1) and
      (reply["state"] == nil or is_map(reply["state"])) and
      (reply["stopped"] == nil or is_binary(reply["stopped"]))
  end

  def valid?(_other), do: false

  @doc false
  @spec new(map(), map(), Definition.t(), non_neg_integer()) :: t()
  def new(reply, meta, definition, duration_ms) do
    state = reply["state"]

    %__MODULE__{
      definition: if(state, do: Definition.with_state(definition, state), else: definition.given),
      state: state,
      score: float(reply["score"]),
      baseline: float(reply["baseline"]),
      candidates: reply["candidates"],
      stopped: reply["stopped"],
      lm_calls: reply["lm_calls"],
      metric_calls: reply["metric_calls"],
      usage: Evaluate.Result.add(%{}, meta),
      duration_ms: duration_ms
    }
  end

  defp float(score), do: if(score, do: score / 1)

  @doc false
  @spec figures(t()) :: map()
  def figures(%__MODULE__{} = result),
    do: Map.take(result, [:score, :baseline, :lm_calls, :metric_calls, :candidates])

  defimpl String.Chars do
    def to_string(result), do: Summary.text(result)
  end

  defimpl Inspect do
    def inspect(result, _opts),
      do: "#DSPex.PythonBridge.Optimize.Result<\n" <> Summary.text(result) <> "\n>"
  end
end
