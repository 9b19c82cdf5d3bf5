defmodule Mix.DSPex.EvaluationReport do
  @moduledoc false
  # What `mix dspex.eval` says about a result: whether it is good enough, as text and as JSON.

  alias DSPex.PythonBridge.Evaluate
  alias DSPex.PythonBridge.Evaluate.{Result, Table}
  alias Mix.DSPex.Baseline

  # Means of the same scores may differ by less, if they are added in another order.
  @same 1.0e-9

  @enforce_keys [:program, :ids, :result, :min, :tolerance, :baseline, :change]
  defstruct @enforce_keys

  @typedoc "`min`, `baseline` (the path) and `change`: nil without."
  @type t :: %__MODULE__{
          program: String.t(),
          ids: [Baseline.id()],
          result: Result.t(),
          min: float() | nil,
          tolerance: float(),
          baseline: Path.t() | nil,
          change: Baseline.change() | nil
        }

  @doc "Why the result is not good enough; an empty list if it is."
  @spec reasons(t()) :: [{String.t(), String.t()}]
  def reasons(%__MODULE__{result: %{score: score}, min: min, change: change} = report) do
    low =
      if min && score < min - @same,
        do: [{"below_min", "the score #{Table.number(score)} is below --min #{min}"}],
        else: []

    lower =
      if change && change.change < -report.tolerance - @same,
        do: [
          {"regression",
           "the score has changed by #{signed(change.change)}: a regression beyond --tolerance #{report.tolerance}"}
        ],
        else: []

    low ++ lower
  end

  @doc "The result, its change, and what got worse."
  @spec text(t()) :: String.t()
  def text(%__MODULE__{result: result, change: nil}), do: Table.text(result)

  def text(%__MODULE__{result: result, change: change, baseline: path}) do
    shared =
      "#{path}: #{Table.number(change.before)} → #{Table.number(change.now)} (#{signed(change.change)}) " <>
        "on the #{change.shared} examples that it has; #{change.new} new, #{change.gone} gone"

    Enum.join([Table.text(result), "", shared | worse(change)], "\n")
  end

  defp worse(%{worse: 0}), do: ["nothing got worse"]

  defp worse(%{worse: count, worst: worst}) do
    more = count - length(worst)
    pairs = for {_id, item, before} <- worst, do: {item, before}
    last = if more > 0, do: ["… and #{more} more, which have lost no more"], else: []
    ["#{count} got worse:", Table.compared(pairs) | last]
  end

  defp signed(change) do
    text = Table.number(change)
    if String.starts_with?(text, "-"), do: text, else: "+" <> text
  end

  @doc "A JSON object, with one line for each result: a baseline is kept under version control."
  @spec json(t()) :: iodata()
  def json(%__MODULE__{result: result} = report) do
    reasons = for {reason, _text} <- reasons(report), do: reason

    head = %{
      "version" => Baseline.version(),
      "ok" => reasons == [],
      "reasons" => reasons,
      "program" => report.program,
      "score" => result.score,
      "examples" => length(result.results),
      "failed" => result.failed,
      "min" => report.min,
      "tolerance" => report.tolerance,
      "baseline" => change(report.change),
      "usage" => result.usage,
      "duration_ms" => result.duration_ms
    }

    results =
      for {id, item} <- Enum.zip(report.ids, result.results),
          do: Baseline.sorted_json(entry(id, item))

    [_close | open] = head |> Baseline.sorted_json() |> Enum.reverse()
    [Enum.reverse(open), ",\"results\":[\n", Enum.intersperse(results, ",\n"), "\n]}"]
  end

  defp entry(id, item) do
    %{
      "id" => id,
      "score" => item.score,
      "error" => if(item.error, do: Atom.to_string(item.error.type))
    }
  end

  defp change(nil), do: nil

  defp change(change) do
    worst =
      for {id, item, before} <- change.worst,
          do: %{"id" => id, "index" => item.index, "before" => before, "score" => item.score}

    change
    |> Map.take([:before, :now, :change, :shared, :new, :gone, :worse])
    |> Map.new(fn {key, value} -> {Atom.to_string(key), value} end)
    |> Map.put("worst", worst)
  end

  @doc """
  The error of an evaluation that has measured nothing: all runs failed, and not by what the LM has answered. It is the
  first one's.
  """
  @spec nothing_measured(Result.t()) :: Evaluate.Result.item() | nil
  def nothing_measured(%Result{results: [first | _rest] = results}) do
    if Enum.all?(results, &(&1.error && &1.error.type != :output_invalid)), do: first
  end
end
