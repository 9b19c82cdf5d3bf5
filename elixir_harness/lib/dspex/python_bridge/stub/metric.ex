defmodule DSPex.PythonBridge.Stub.Metric do
  @moduledoc false
  # The metric of a list of inputs: a function of the caller, which is a tool, or a field that is compared.

  alias DSPex.PythonBridge.Error

  @expected ~s(expected a number, a boolean or {"score": number, "feedback": text} as the score)

  @doc """
  The score of the outputs of one of the inputs, as keys of its result. `metric` and `expected` are those of the arguments;
  `call_tool` gets the name and the arguments of a tool.
  """
  @spec score(map(), map() | nil, map(), map(), (String.t(), map() -> {:ok | :error, term()})) ::
          {:ok, [{String.t(), term()}]} | {:error, Error.t()}
  def score(%{"tool" => tool}, expected, inputs, outputs, call_tool) do
    example = Map.merge(inputs, expected || %{})
    asked = %{"example" => example, "prediction" => outputs, "purpose" => "score"}

    with {:ok, value} <- call_tool.(tool, asked),
         {:ok, score} <- read(value) do
      {:ok, score}
    else
      {:error, text} -> {:error, Error.new(:tool_error, "#{tool}: #{text}")}
    end
  end

  def score(%{"field" => field, "match" => match}, expected, _inputs, outputs, _call_tool) do
    case expected do
      %{^field => wanted} -> {:ok, [{"score", compare(match, outputs[field], wanted) / 1}]}
      _no -> {:error, Error.new(:invalid_args, "expected: #{field} is missing: it is compared")}
    end
  end

  defp read(%{"score" => value, "feedback" => text}) when is_binary(text),
    do: with({:ok, score} <- read(value), do: {:ok, score ++ [{"feedback", text}]})

  defp read(%{"score" => value}), do: read(value)
  defp read(value) when is_boolean(value), do: read(if value, do: 1, else: 0)
  defp read(n) when is_number(n) and abs(n) < 1.0e308, do: {:ok, [{"score", n / 1}]}
  defp read(_other), do: {:error, @expected}

  defp compare("equals", got, wanted), do: if(got == wanted, do: 1, else: 0)
  defp compare(_match, nil, _wanted), do: 0

  defp compare("contains", got, wanted),
    do: if(String.contains?(text(got), text(wanted)), do: 1, else: 0)

  defp compare("exact_match", got, wanted), do: if(words(got) == words(wanted), do: 1, else: 0)

  defp compare("f1", got, wanted) do
    {got, wanted} = {words(got), words(wanted)}
    common = length(got) - length(got -- wanted)
    if common == 0, do: 0, else: 2 * common / (length(got) + length(wanted))
  end

  defp text(value), do: if(is_binary(value), do: value, else: JSON.encode!(value))

  # As DSPy compares text: without case, punctuation and articles.
  defp words(value) do
    text = value |> text() |> String.normalize(:nfd) |> String.downcase()
    words = String.split(Regex.replace(~r/[[:punct:]]/, text, ""))
    Enum.reject(words, &(&1 in ["a", "an", "the"]))
  end
end
