defmodule DSPex.PythonBridge.Stub.Metric do
  @moduledoc false
  # The metric of a list of inputs: a function of the caller, which is a tool, or a field that is compared.

  alias DSPex.PythonBridge.Error

  @expected ~s(expected a number, a boolean or {"score": number, "feedback": text} as the score)

  @doc """
  The score of the outputs of one of the inputs, and the feedback, as keys of its result; none without a metric. An error ends
  the evaluation. `call_tool` gets the name and the arguments of a tool.
  """
  @spec score(map() | nil, map() | nil, map(), map(), call_tool) ::
          {:ok, %{String.t() => float() | String.t()}} | {:over, Error.t()}
        when call_tool: (String.t(), map() -> {:ok | :error, term()})
  def score(nil, _expected, _inputs, _outputs, _call_tool), do: {:ok, %{}}

  def score(%{"tool" => tool}, expected, inputs, outputs, call_tool) do
    example = Map.merge(inputs, expected || %{})
    asked = %{"example" => example, "prediction" => outputs, "purpose" => "score"}

    with {:ok, value} <- call_tool.(tool, asked),
         {:ok, scored} <- read(value),
         do: {:ok, scored},
         else: ({:error, text} -> {:over, Error.new(:tool_error, "#{tool}: #{text}")})
  end

  def score(%{"field" => field, "match" => match}, expected, _inputs, outputs, _call_tool) do
    case expected do
      %{^field => wanted} -> read(compare(match, outputs[field], wanted))
      _no -> {:over, Error.new(:invalid_args, "expected: #{field} is missing: it is compared")}
    end
  end

  defp read(%{"score" => value} = scored),
    do: with({:ok, score} <- read(value), do: {:ok, Map.merge(scored, score)})

  defp read(value) when is_boolean(value), do: read(if value, do: 1, else: 0)
  defp read(n) when is_number(n), do: {:ok, %{"score" => n / 1}}
  defp read(_other), do: {:error, @expected}

  defp compare("equals", got, wanted), do: got == wanted
  defp compare(_match, nil, _wanted), do: false
  defp compare("contains", got, wanted), do: String.contains?(text(got), text(wanted))
  defp compare("exact_match", got, wanted), do: words(got) == words(wanted)

  defp compare("f1", got, wanted) do
    {got, wanted} = {words(got), words(wanted)}
    common = length(got) - length(got -- wanted)
    common != 0 and 2 * common / (length(got) + length(wanted))
  end

  defp text(value), do: if(is_binary(value), do: value, else: JSON.encode!(value))

  # As DSPy compares text: without case, punctuation and articles.
  defp words(value) do
    text = value |> text() |> String.normalize(:nfd) |> String.downcase()
    words = text |> String.replace(~r/[[:punct:]]/, "") |> String.split()
    Enum.reject(words, &(&1 in ["a", "an", "the"]))
  end
end
