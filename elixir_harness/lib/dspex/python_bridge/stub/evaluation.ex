defmodule DSPex.PythonBridge.Stub.Evaluation do
  @moduledoc false
  # The metric of a list of inputs, by the peer's rules and with its words, but without the types of outputs; text is
  # compared as DSPy compares it.

  alias DSPex.PythonBridge.{Error, Evaluate}
  alias DSPex.PythonBridge.Stub.{Arguments, Context, Definition}

  @matches ~w(equals exact_match f1 contains)
  @wanted ~s(expected {"tool": name} or {"field": name, "match": one of #{Enum.join(@matches, ", ")}})
  @score ~s(expected a number, a boolean or {"score": number, "feedback": text} as the score)
  @max_float 1.7976931348623157e308
  # The peer's text of an LM error begins with them if the LM has refused the key or the account.
  @refused ["LMAuthError", "LMBillingError"]

  @typedoc "The arguments `metric` and `expected`."
  @type given :: {map(), [term()] | nil}
  @typedoc "The metric, and what it gets of each of the inputs: them, and what is expected."
  @type t :: %{metric: map(), examples: %{non_neg_integer() => map()}}

  @doc "The arguments of an evaluation among those of an `execute_program`, if it is one."
  @spec read(map()) :: {:ok, given() | nil} | {:error, Error.t()}
  def read(%{"inputs" => inputs} = args) do
    metric = args["metric"]
    expected = args["expected"]

    cond do
      is_map(inputs) and metric != nil ->
        refuse("metric: only for a list of inputs")

      is_map(inputs) and expected != nil ->
        refuse("expected: only for a list of inputs")

      metric == nil and expected != nil ->
        refuse("expected: only with a metric, which compares with it")

      metric == nil ->
        {:ok, nil}

      not is_map(metric) ->
        refuse("metric: expected an object with tool, or with field and match")

      expected != nil and not is_list(expected) ->
        refuse("expected: expected a list of objects, one for each of the inputs")

      expected != nil and length(expected) != length(inputs) ->
        counts = "#{length(inputs)} objects, one for each of the inputs, got #{length(expected)}"
        refuse("expected: expected #{counts}")

      true ->
        {:ok, {metric, expected}}
    end
  end

  @doc "Checks them against the fields of the program, as far as its definition is known."
  @spec prepare(given(), Definition.fields() | nil, [term()]) :: {:ok, t()} | {:error, Error.t()}
  def prepare({metric, expected}, fields, inputs) do
    with :ok <- metric(metric, fields && fields.outputs),
         {:ok, wanted} <- wanted(metric, expected, fields, length(inputs)) do
      examples =
        for {{item, wanted}, index} <- Enum.with_index(Enum.zip(inputs, wanted)),
            into: %{},
            do: {index, Map.merge(if(is_map(item), do: item, else: %{}), wanted)}

      {:ok, %{metric: metric, examples: examples}}
    end
  end

  defp metric(%{"tool" => tool} = metric, _outputs) when map_size(metric) == 1 do
    if is_binary(tool) and tool != "",
      do: :ok,
      else: refuse("metric.tool: expected the name of a tool")
  end

  defp metric(%{"field" => field, "match" => match} = metric, outputs)
       when map_size(metric) == 2 do
    cond do
      outputs != nil and field not in outputs ->
        refuse("metric.field: expected one of #{Enum.join(outputs, ", ")}")

      match not in @matches ->
        refuse("metric.match: expected one of #{Enum.join(@matches, ", ")}")

      true ->
        :ok
    end
  end

  defp metric(_other, _outputs), do: refuse("metric: #{@wanted}")

  defp wanted(%{"field" => field}, nil, _fields, _count),
    do: refuse("expected: missing; the metric compares #{field} with it")

  defp wanted(_metric, nil, _fields, count), do: {:ok, List.duplicate(%{}, count)}

  defp wanted(metric, expected, fields, _count) do
    wrong =
      expected
      |> Enum.with_index()
      |> Enum.find_value(fn {wanted, index} ->
        wrong(wanted, "expected[#{index}]", metric, fields)
      end)

    cond do
      wrong -> refuse(wrong)
      field = metric["field"] -> {:ok, Enum.map(expected, &Map.take(&1, [field]))}
      true -> {:ok, expected}
    end
  end

  defp wrong(wanted, where, _metric, _fields) when not is_map(wanted),
    do: "#{where}: expected an object of output fields, and what else the metric needs"

  defp wrong(wanted, where, metric, fields) do
    inputs = if fields, do: Enum.map(fields.inputs, &elem(&1, 0)), else: []
    field = metric["field"]

    cond do
      name = Enum.find(Map.keys(wanted), &(&1 in inputs)) ->
        "#{where}.#{name}: an input; expected output fields, and what else the metric needs"

      field != nil and not is_map_key(wanted, field) ->
        "#{where}.#{field}: missing; the metric compares with it"

      true ->
        nil
    end
  end

  defp refuse(text), do: Arguments.refuse(text)

  ## Scores

  @doc "The score of the outputs of an item, as keys of its result. Only in the process of the item."
  @spec score(t(), non_neg_integer(), map()) :: {:ok, map()} | {:error, Error.t()}
  def score(%{metric: %{"tool" => tool}, examples: examples}, index, outputs) do
    asked = %{"example" => examples[index], "prediction" => outputs, "purpose" => "score"}

    with {:ok, value} <- Context.call_tool(tool, asked),
         {score, feedback} <- read_score(value) do
      scored = %{"score" => score}
      {:ok, if(feedback, do: Map.put(scored, "feedback", feedback), else: scored)}
    else
      {:error, text} -> {:error, Error.new(:tool_error, "#{tool}: #{text}")}
      nil -> {:error, Error.new(:tool_error, "#{tool}: #{@score}")}
    end
  end

  def score(%{metric: %{"field" => field, "match" => match}, examples: examples}, index, outputs),
    do: {:ok, %{"score" => compare(match, outputs[field], examples[index][field]) / 1}}

  defp read_score(%{"score" => value} = given) do
    feedback = given["feedback"]
    known? = Map.keys(given) -- ["score", "feedback"] == []
    number = number(value)

    if known? and number != nil and (feedback == nil or is_binary(feedback)),
      do: {number, feedback}
  end

  defp read_score(value), do: with(number when number != nil <- number(value), do: {number, nil})

  defp number(true), do: 1.0
  defp number(false), do: 0.0
  defp number(n) when is_number(n) and abs(n) <= @max_float, do: n / 1
  defp number(_other), do: nil

  # JSON has one kind of numbers.
  defp compare("equals", got, wanted), do: if(got == wanted, do: 1, else: 0)
  defp compare(_match, nil, _wanted), do: 0
  defp compare(match, got, wanted), do: compare_text(match, text(got), text(wanted))

  defp compare_text("contains", got, wanted),
    do: if(String.contains?(got, wanted), do: 1, else: 0)

  defp compare_text("exact_match", got, wanted),
    do: if(words(got) == words(wanted), do: 1, else: 0)

  defp compare_text("f1", got, wanted) do
    {got, wanted} = {words(got), words(wanted)}
    common = length(got) - length(got -- wanted)

    if common == 0 do
      0
    else
      {precision, recall} = {common / length(got), common / length(wanted)}
      2 * precision * recall / (precision + recall)
    end
  end

  defp text(value), do: if(is_binary(value), do: value, else: JSON.encode!(value))

  # DSPy's normalization, with what Python takes for a part of a word, and for white space.
  defp words(text) do
    text
    |> String.normalize(:nfd)
    |> String.downcase(:greek)
    |> String.replace(~r/[!-\/:-@\[-`{-~]/, "")
    |> String.replace(~r/(?<![\p{L}\p{N}])(a|an|the)(?![\p{L}\p{N}])/u, " ")
    |> String.split(
      ~r/[\t-\r\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]+/u,
      trim: true
    )
  end

  @doc "Whether an error of one item would be that of all others, too, and ends the evaluation."
  @spec hits_all?(Error.t()) :: boolean()
  def hits_all?(%Error{type: :lm_error, message: text}),
    do: String.starts_with?(text, @refused)

  def hits_all?(%Error{type: type}), do: type in [:lm_not_configured, :program_not_found]

  @doc "The result of the whole, of those of its items."
  @spec result([map()]) :: map()
  def result(results) do
    %{
      "score" => results |> Enum.map(& &1["score"]) |> Evaluate.Result.mean(),
      "failed" => Enum.count(results, &(not &1["success"])),
      "results" => results
    }
  end
end
