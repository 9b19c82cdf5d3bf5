defmodule DSPex.PythonBridge.Evaluate.Metric do
  @moduledoc false
  # A metric, of an evaluation or an optimization: what the peer gets of it, and the caller's function as a tool.

  alias DSPex.PythonBridge.Program
  alias DSPex.PythonBridge.Protocol.Payload

  @matches [:equals, :exact_match, :f1, :contains]
  # A tool of a program cannot have this name.
  @tool "metric:score"
  @expected "expected a function of two or three arguments, or {:field, name, match}"

  @doc """
  The argument `metric` of the wire, and options of the request with the functions of a module's program and of the metric
  among its `:tools`; or the text that refuses them.

      iex> alias DSPex.PythonBridge.Evaluate.Metric
      iex> Metric.new({:field, :answer, :f1}, [], nil)
      {:ok, %{field: "answer", match: :f1}, [tools: %{}]}
      iex> {:ok, %{tool: name}, opts} = Metric.new(fn _, _, purpose -> {1, inspect(purpose)} end, [], nil)
      iex> opts[:tools][name].(%{"example" => %{}, "prediction" => %{}, "purpose" => "bootstrap"})
      %{score: 1, feedback: ":bootstrap"}
  """
  @spec new(term(), keyword(), Program.Spec.t() | nil) ::
          {:ok, map(), keyword()} | {:error, String.t()}
  def new(metric, opts, spec) do
    with {:ok, metric, score} <- read(metric) do
      case Keyword.get(opts, :tools, %{}) do
        given when is_map(given) ->
          opts = Keyword.put(opts, :tools, Map.merge(given, score))
          {:ok, metric, Program.Tools.add(opts, if(spec, do: spec.functions, else: %{}))}

        _other ->
          {:error, ":tools: expected a map of names to functions"}
      end
    end
  end

  defp read(score) when is_function(score, 2) or is_function(score, 3),
    do: {:ok, %{tool: @tool}, %{@tool => tool(score)}}

  defp read({:field, field, match}) when match in @matches do
    case Payload.string(field) do
      nil -> {:error, ":metric: expected the name of an output field"}
      name -> {:ok, %{field: name, match: match}, %{}}
    end
  end

  defp read({:field, _field, _match}) do
    matches = Enum.map_join(@matches, ", ", &inspect/1)
    {:error, ":metric: expected {:field, name, match} with #{matches}"}
  end

  defp read(nil), do: {:error, ":metric: missing; #{@expected}"}
  defp read(_other), do: {:error, ":metric: #{@expected}"}

  defp tool(score) do
    fn %{"example" => example, "prediction" => prediction} = asked ->
      case apply_to(score, example, prediction, asked) do
        {:error, reason} -> {:error, reason}
        {value, feedback} when value != :ok -> %{score: value, feedback: feedback}
        value -> value
      end
    end
  end

  defp apply_to(score, example, prediction, _asked) when is_function(score, 2),
    do: score.(example, prediction)

  defp apply_to(score, example, prediction, asked),
    do: score.(example, prediction, purpose(asked))

  defp purpose(%{"purpose" => "bootstrap"}), do: :bootstrap

  defp purpose(%{"purpose" => "feedback"} = asked) do
    predictor = Map.get(asked, "predictor") || %{}
    {:feedback, Map.new([:name, :inputs, :outputs], &{&1, predictor[Atom.to_string(&1)]})}
  end

  defp purpose(_score), do: :score
end
