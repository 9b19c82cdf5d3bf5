defmodule Mix.DSPex.OptimizationProgress do
  @moduledoc false
  # How far an optimization is, on standard error: a bar where that is a terminal, elsewhere a line for each better
  # candidate, and one now and then.

  alias DSPex.PythonBridge.Evaluate.Table
  alias DSPex.PythonBridge.Optimize
  alias DSPex.PythonBridge.OTP.Deadline
  alias Mix.DSPex.Progress

  # Without a terminal, something is printed so often.
  @every_ms 30_000

  @enforce_keys [:columns, :printed]
  defstruct [:columns, :printed, candidates: 0]

  @typedoc "`columns`: of the terminal; nil if there is none. `printed`: when the last line was."
  @type t :: %__MODULE__{
          columns: pos_integer() | nil,
          printed: integer(),
          candidates: non_neg_integer()
        }

  @doc "Nothing is known yet."
  @spec new() :: t()
  def new, do: %__MODULE__{columns: Progress.columns(), printed: Deadline.now()}

  @doc "Shows an event; `path`: the file that has the state of the best candidate."
  @spec show(t(), Optimize.event(), Path.t()) :: t()
  def show(progress, {:candidate, %{best: true} = candidate}, path) do
    Progress.clear(progress.columns)
    score = Table.number(candidate.score)

    line(
      progress,
      "candidate #{candidate.number}: #{score} on #{candidate.of} examples, in #{path}"
    )
    |> Map.put(:candidates, candidate.number)
  end

  def show(progress, {:candidate, candidate}, _path),
    do: %{progress | candidates: candidate.number}

  def show(%{columns: nil, printed: printed} = progress, {:progress, event}, _path) do
    if Deadline.now() - printed >= @every_ms,
      do: line(progress, "#{done(event)}#{text(progress, event)}"),
      else: progress
  end

  def show(%{columns: columns} = progress, {:progress, event}, _path) do
    Progress.bar(columns, event.done || 0, max(event.total || 1, 1), text(progress, event))
    progress
  end

  @doc "Nothing more comes."
  @spec finish(t()) :: :ok
  def finish(%__MODULE__{columns: columns}), do: Progress.clear(columns)

  defp line(progress, text) do
    IO.puts(:stderr, text)
    %{progress | printed: Deadline.now()}
  end

  defp done(%{total: nil}), do: ""
  defp done(event), do: "#{event.done}/#{event.total}, "

  defp text(progress, event) do
    best = if event.best, do: ", best #{Table.number(event.best)}", else: ""
    "#{event.step}, #{progress.candidates} candidates, #{event.lm_calls} LM calls#{best}"
  end
end
