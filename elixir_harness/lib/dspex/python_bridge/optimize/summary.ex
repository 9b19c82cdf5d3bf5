defmodule DSPex.PythonBridge.Optimize.Summary do
  @moduledoc false
  # The result of an optimization as text: the scores, and what the state has for each predictor.

  alias DSPex.PythonBridge.Evaluate.Table

  # Predictors, and characters of an instruction.
  @rows 10
  @most 100

  @doc "Some lines, each shorter than 200 characters."
  @spec text(map()) :: String.t()
  def text(result) do
    predictors = predictors(result.state)
    more = length(predictors) - @rows
    last = if more > 0, do: ["… and #{more} more predictors"], else: []
    shown = for {name, saved} <- Enum.take(predictors, @rows), do: predictor(name, saved)
    Enum.join([summary(result) | shown] ++ last, "\n")
  end

  defp summary(result) do
    [
      "score #{score(result.score)}",
      result.baseline && "before #{score(result.baseline)}",
      "#{result.candidates} candidates",
      "#{result.lm_calls} LM calls",
      result.metric_calls && "#{result.metric_calls} metric calls",
      "#{:erlang.float_to_binary(result.duration_ms / 1000, decimals: 1)} s",
      result.stopped && "stopped by #{result.stopped}"
    ]
    |> Enum.filter(& &1)
    |> Enum.join(", ")
  end

  defp score(nil), do: "none"
  defp score(score), do: Table.number(score)

  # DSPy writes a program of one predictor without its name.
  defp predictors(nil), do: []
  defp predictors(%{"signature" => %{}} = saved), do: [{"instructions", saved}]

  defp predictors(state),
    do: Enum.sort(for {name, %{"signature" => %{}} = saved} <- state, do: {name, saved})

  defp predictor(name, %{"signature" => signature} = saved) do
    demos = if is_list(saved["demos"]), do: length(saved["demos"]), else: 0
    instructions = signature["instructions"]
    instructions = if is_binary(instructions), do: instructions, else: ""
    "#{cut(name)}: #{cut(instructions)} (#{demos} demos)"
  end

  defp cut(text) do
    line = text |> String.slice(0, 4 * @most) |> String.replace(~r/[[:space:][:cntrl:]]+/u, " ")
    if String.length(line) > @most, do: String.slice(line, 0, @most - 1) <> "…", else: line
  end
end
