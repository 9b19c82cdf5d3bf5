defmodule DSPex.PythonBridge.Optimize.Progress do
  @moduledoc false
  # What an optimization has reported so far, in the caller's process.

  alias DSPex.PythonBridge.Telemetry.RunSpan

  @enforce_keys [:report, :span]
  defstruct [:report, :span, :done, :total, :score, :state, lm_calls: 0, candidates: 0]

  @typedoc """
  `report`: the caller's function. `score`, `state`: of the best candidate, over all peers that have had the run.
  """
  @type t :: %__MODULE__{
          report: (DSPex.PythonBridge.Optimize.event() -> term()),
          span: RunSpan.t(),
          done: non_neg_integer() | nil,
          total: non_neg_integer() | nil,
          score: float() | nil,
          state: map() | nil,
          lm_calls: non_neg_integer(),
          candidates: non_neg_integer()
        }

  @doc "Takes an item of the stream, and passes it on; `:stop` if the caller wants no more."
  @spec take(t(), map()) :: {:go_on | :stop, t()}
  def take(%__MODULE__{} = progress, %{"progress" => %{} = item}) do
    event = event(item, [:step, :done, :total, :lm_calls, :best])
    lm_calls = event.lm_calls || progress.lm_calls
    now = %{progress | done: event.done, total: event.total, lm_calls: lm_calls}
    report(now, :progress, %{event | best: progress.score || event.best})
  end

  def take(progress, %{"candidate" => %{} = item}) do
    event = event(item, [:number, :score, :of, :best, :state])
    better = better(%{progress | candidates: event.number}, event)
    # For a peer that has begun again, it may be the best for a second time.
    best? = better.state != progress.state
    report(better, :candidate, %{event | best: best?, state: if(best?, do: event.state)})
  end

  # Of a later version of the peer, or that a peer begins again.
  def take(progress, _other), do: {:go_on, progress}

  defp event(item, names), do: Map.new(names, &{&1, item[Atom.to_string(&1)]})

  # The program as it was wins ties.
  defp better(progress, %{best: true, score: score, state: %{} = state})
       when progress.score == nil or score >= progress.score,
       do: %{progress | score: score / 1, state: state}

  defp better(progress, _worse), do: progress

  defp report(progress, kind, event) do
    RunSpan.progress(progress.span, figures(progress))
    {if(progress.report.({kind, event}) == :stop, do: :stop, else: :go_on), progress}
  end

  @doc "The figures of its events."
  @spec figures(t()) :: RunSpan.figures()
  def figures(%__MODULE__{} = progress),
    do: Map.take(progress, [:done, :total, :score, :lm_calls, :candidates])
end
