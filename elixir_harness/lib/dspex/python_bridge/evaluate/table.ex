defmodule DSPex.PythonBridge.Evaluate.Table do
  @moduledoc false
  # The result of an evaluation as text: a summary, and its worst cases.

  @rows 10
  @column 34
  @head ["", "score", "inputs", "expected", "prediction"]

  @doc "At most some lines, each shorter than 160 characters."
  @spec text(map()) :: String.t()
  def text(%{results: results} = result) do
    worst = results |> Enum.sort_by(&{&1.score, &1.error == nil, &1.index}) |> Enum.take(@rows)
    more = length(results) - length(worst)
    last = if more > 0, do: ["… and #{more} more, with no lower scores"], else: []
    Enum.join([summary(result) | table(@head, Enum.map(worst, &row/1))] ++ last, "\n")
  end

  @doc "Results that had another score before: their table, of as many rows."
  @spec compared([{map(), before :: number()}]) :: String.t()
  def compared(pairs) do
    rows = for {item, before} <- pairs, do: item |> row() |> List.insert_at(2, number(before))
    @head |> List.insert_at(2, "before") |> table(rows) |> Enum.join("\n")
  end

  @doc "Milliseconds as seconds."
  @spec seconds(non_neg_integer()) :: String.t()
  def seconds(ms), do: :erlang.float_to_binary(ms / 1000, decimals: 1)

  @doc "A score."
  @spec number(number()) :: String.t()
  def number(score) when abs(score) < 1.0e6, do: :erlang.float_to_binary(score / 1, decimals: 3)
  def number(score), do: to_string(score)

  defp table(_head, []), do: []

  defp table(head, rows) do
    rows = [head | rows]
    columns = Enum.zip_with(rows, & &1)
    widths = for column <- columns, do: column |> Enum.map(&String.length/1) |> Enum.max()

    for row <- rows,
        do:
          row
          |> Enum.zip_with(widths, &String.pad_trailing/2)
          |> Enum.join("  ")
          |> String.trim_trailing()
  end

  defp summary(result) do
    score = if result.score, do: number(result.score), else: "none"
    calls = result.usage["lm_calls"] || 0
    counts = "#{length(result.results)} examples, #{result.failed} failed, #{calls} LM calls"
    "score #{score}, #{counts}, #{seconds(result.duration_ms)} s"
  end

  defp row(item) do
    got =
      cond do
        item.error -> "#{item.error.type}: #{item.error.message}"
        item.feedback -> "#{fields(item.prediction)} – #{item.feedback}"
        true -> fields(item.prediction)
      end

    ["#{item.index}", number(item.score), fields(item.inputs), fields(item.expected), got]
    |> Enum.map(&cut/1)
  end

  defp fields(nil), do: ""

  defp fields(%_module{} = struct), do: fields(Map.from_struct(struct))

  # Sorted: a map with atoms as keys has another order in each BEAM.
  defp fields(map) do
    map
    |> Enum.map(fn {name, value} -> {"#{name}", value} end)
    |> Enum.sort_by(&elem(&1, 0))
    |> Enum.map_join(", ", fn {name, value} -> "#{name}: #{shown(value)}" end)
  end

  defp shown(text) when is_binary(text), do: text
  defp shown(value), do: inspect(value, limit: 10, printable_limit: 100)

  @doc "A text on one line, of at most `most` characters."
  @spec cut(String.t(), pos_integer()) :: String.t()
  def cut(text, most \\ @column) do
    line = text |> String.slice(0, 4 * most) |> String.replace(~r/[[:space:][:cntrl:]]+/u, " ")
    if String.length(line) > most, do: String.slice(line, 0, most - 1) <> "…", else: line
  end
end
