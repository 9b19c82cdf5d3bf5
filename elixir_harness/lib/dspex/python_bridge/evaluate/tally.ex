defmodule DSPex.PythonBridge.Evaluate.Tally do
  @moduledoc false
  # What an evaluation has measured so far.

  alias DSPex.PythonBridge.Evaluate.Result
  alias DSPex.PythonBridge.Telemetry.Usage

  defstruct lists: [], usage: %{}, done: 0, failed: 0, score: nil

  @typedoc "`lists`: of the results of each request, newest first. `score`: the mean; nil without results."
  @type t :: %__MODULE__{
          lists: [[Result.item()]],
          usage: map(),
          done: non_neg_integer(),
          failed: non_neg_integer(),
          score: float() | nil
        }

  @doc "Adds the results of a request, and what they have used."
  @spec add(t(), [Result.item()], map()) :: t()
  def add(%__MODULE__{} = tally, items, meta) do
    tally = Enum.reduce(items, tally, &one(&2, &1))
    %{tally | lists: [items | tally.lists], usage: Result.add(tally.usage, meta)}
  end

  defp one(tally, %{score: score, error: error}) do
    done = tally.done + 1
    failed = if error, do: tally.failed + 1, else: tally.failed
    %{tally | done: done, failed: failed, score: mean(tally.score || 0.0, score, done)}
  end

  # The sum of all may be more than a float holds.
  defp mean(before, score, count), do: before + (score / count - before / count)

  @doc "All results in the order of the examples."
  @spec items(t()) :: [Result.item()]
  def items(%__MODULE__{lists: lists}),
    do: lists |> Enum.sort_by(&hd(&1).index) |> Enum.concat()

  @doc "What the events of an evaluation measure."
  @spec figures(t(), total :: non_neg_integer() | nil) :: map()
  def figures(%__MODULE__{} = tally, total) do
    %{done: tally.done, total: total, failed: tally.failed, score: tally.score}
    |> Map.merge(Usage.measurements(tally.usage))
  end
end
