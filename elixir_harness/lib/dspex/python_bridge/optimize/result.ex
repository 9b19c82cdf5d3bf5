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

  alias DSPex.PythonBridge.{Error, Evaluate}
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.Evaluate.Table
  alias DSPex.PythonBridge.Optimize.Progress

  # What a state takes the place of.
  @replaced [:state, :state_path, :demos, "state", "state_path", "demos"]
  # Predictors, and characters of an instruction, in a text.
  @rows 10
  @most 100

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
  @spec new(:stopped | Caller.result(), Progress.t(), map(), non_neg_integer()) ::
          {:ok, t()} | {:error, Error.t()}
  def new(:stopped, progress, given, duration_ms) do
    reply = %{
      "state" => progress.state || given[:state] || given["state"],
      "score" => progress.score,
      "candidates" => progress.candidates,
      "stopped" => "caller",
      "lm_calls" => progress.lm_calls
    }

    {:ok, build(reply, %{}, given, duration_ms)}
  end

  def new({:ok, _id, %{"candidates" => _, "lm_calls" => _} = reply, meta}, _progress, given, ms),
    do: {:ok, build(reply, meta, given, ms)}

  def new({:error, error}, _progress, _given, _ms), do: {:error, error}

  def new({:ok, _id, _other, _meta}, _progress, _given, _ms),
    do: {:error, Error.new(:internal, "the peer sent no valid result")}

  defp build(reply, meta, given, duration_ms) do
    state = reply["state"]

    %__MODULE__{
      definition: if(state, do: with_state(given, state), else: given),
      state: state,
      score: float(reply["score"]),
      baseline: float(reply["baseline"]),
      candidates: reply["candidates"],
      stopped: reply["stopped"],
      lm_calls: reply["lm_calls"],
      metric_calls: reply["metric_calls"],
      usage: Evaluate.Result.add_usage(%{}, meta),
      duration_ms: duration_ms
    }
  end

  # The keys of a definition are atoms or strings, as that of its id is.
  defp with_state(given, state) do
    key = if is_map_key(given, :id), do: :state, else: "state"
    given |> Map.drop(@replaced) |> Map.put(key, state)
  end

  defp float(score), do: if(score, do: score / 1)

  @doc false
  @spec figures(t()) :: map()
  def figures(%__MODULE__{} = result),
    do: Map.take(result, [:score, :baseline, :lm_calls, :metric_calls, :candidates])

  @doc false
  @spec text(t()) :: String.t()
  def text(result) do
    predictors = predictors(result.state)
    more = length(predictors) - @rows
    last = if more > 0, do: ["… and #{more} more predictors"], else: []
    shown = for {name, saved} <- Enum.take(predictors, @rows), do: predictor(name, saved)
    Enum.join([summary(result) | shown] ++ last, "\n")
  end

  defp summary(result) do
    [
      "score #{if result.score, do: Table.number(result.score), else: "none"}",
      result.baseline && "before #{Table.number(result.baseline)}",
      "#{result.candidates} candidates",
      "#{result.lm_calls} LM calls",
      result.metric_calls && "#{result.metric_calls} metric calls",
      "#{Table.seconds(result.duration_ms)} s",
      result.stopped && "stopped by #{result.stopped}"
    ]
    |> Enum.filter(& &1)
    |> Enum.join(", ")
  end

  # DSPy writes a program of one predictor without its name.
  defp predictors(%{"signature" => %{}} = saved), do: [{"instructions", saved}]

  defp predictors(state),
    do: Enum.sort(for {name, %{"signature" => %{}} = saved} <- state || [], do: {name, saved})

  defp predictor(name, %{"signature" => signature} = saved) do
    demos = if is_list(saved["demos"]), do: length(saved["demos"]), else: 0
    instructions = signature["instructions"]
    instructions = if is_binary(instructions), do: instructions, else: ""
    "#{Table.cut(name, @most)}: #{Table.cut(instructions, @most)} (#{demos} demos)"
  end

  defimpl String.Chars do
    defdelegate to_string(result), to: DSPex.PythonBridge.Optimize.Result, as: :text
  end

  defimpl Inspect do
    def inspect(result, _opts), do: "#DSPex.PythonBridge.Optimize.Result<\n#{result}\n>"
  end
end
