defmodule DSPex.PythonBridge.Evaluate.Metric do
  @moduledoc false
  # A metric, of an evaluation or an optimization: what the peer gets of it, and the caller's function as a tool.

  alias DSPex.PythonBridge.Protocol.Payload

  @matches [:equals, :exact_match, :f1, :contains]
  # A tool of a program cannot have this name.
  @tool "metric:score"
  @expected "expected a function of two or three arguments, or {:field, name, match}"

  @type t :: DSPex.PythonBridge.Evaluate.metric()
  @typedoc "Functions by name, as the option `:tools` has them."
  @type tools :: %{(atom() | String.t()) => term()}

  @doc """
  The argument `metric` of the wire, and the tools with which the peer asks for scores; or the text that refuses it.

      iex> alias DSPex.PythonBridge.Evaluate.Metric
      iex> Metric.new({:field, :answer, :f1})
      {:ok, %{field: "answer", match: :f1}, %{}}
      iex> {:ok, %{tool: name}, tools} = Metric.new(fn _example, _prediction, purpose -> {1, inspect(purpose)} end)
      iex> tools[name].(%{"example" => %{}, "prediction" => %{}, "purpose" => "bootstrap"})
      %{score: 1, feedback: ":bootstrap"}
  """
  @spec new(term()) :: {:ok, map(), tools()} | {:error, String.t()}
  def new(score) when is_function(score, 2) or is_function(score, 3),
    do: {:ok, %{tool: @tool}, %{@tool => tool(score)}}

  def new({:field, field, match}) when match in @matches do
    case Payload.string(field) do
      nil -> {:error, ":metric: expected the name of an output field"}
      name -> {:ok, %{field: name, match: match}, %{}}
    end
  end

  def new({:field, _field, _match}) do
    matches = Enum.map_join(@matches, ", ", &inspect/1)
    {:error, ":metric: expected {:field, name, match} with #{matches}"}
  end

  def new(nil), do: {:error, ":metric: missing; #{@expected}"}
  def new(_other), do: {:error, ":metric: #{@expected}"}

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

  @doc """
  The options of a request with the metric's function among its `:tools`; or the text that refuses these.
  """
  @spec add_tools(keyword(), tools()) :: {:ok, keyword()} | {:error, String.t()}
  def add_tools(opts, tools) do
    case Keyword.get(opts, :tools, %{}) do
      given when is_map(given) -> {:ok, Keyword.put(opts, :tools, Map.merge(given, tools))}
      _other -> {:error, ":tools: expected a map of names to functions"}
    end
  end
end
