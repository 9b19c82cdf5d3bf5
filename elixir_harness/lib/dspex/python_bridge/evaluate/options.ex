defmodule DSPex.PythonBridge.Evaluate.Options do
  @moduledoc false
  # The options of an evaluation. Those that are passed on to its requests are checked once, before the first of them.

  alias DSPex.PythonBridge.{Client, Error, Program}
  alias DSPex.PythonBridge.Evaluate.Metric
  alias DSPex.PythonBridge.Options.Table

  @passed [:item_timeout_ms, :attempts, :tools, :retry, :traceparent, :telemetry_metadata]
  @arguments [:lm, :config]

  @enforce_keys [:metric, :max_concurrency, :timeout, :on_result, :arguments, :passed]
  defstruct @enforce_keys

  @typedoc "`metric`, `arguments`: for the peer. `passed`: options of each request, the metric's function among its tools."
  @type t :: %__MODULE__{
          metric: map(),
          max_concurrency: pos_integer(),
          timeout: timeout(),
          on_result: (map() -> term()),
          arguments: map(),
          passed: keyword()
        }

  @doc "Checks them; the error names the wrong one. `functions`: for the program's tools, by their names."
  @spec new(term(), %{String.t() => term()}) :: {:ok, t()} | {:error, Error.t()}
  def new(opts, functions \\ %{}) do
    with {:ok, opts} <- Table.check(opts, table()),
         {:ok, metric, tools} <- Metric.new(opts[:metric]),
         {:ok, passed} <- Metric.add_tools(Keyword.take(opts, @passed), tools),
         passed = Program.Tools.add(passed, functions),
         {:ok, _checked} <- Client.Options.new(passed, @passed) do
      {:ok,
       %__MODULE__{
         metric: metric,
         max_concurrency: opts[:max_concurrency],
         timeout: opts[:timeout],
         on_result: opts[:on_result],
         arguments: opts |> Keyword.take(@arguments) |> Map.new(),
         passed: passed
       }}
    else
      {:error, %Error{} = error} -> {:error, error}
      {:error, text} -> {:error, Error.new(:invalid_request, text)}
    end
  end

  defp table do
    function = {:test, &is_function(&1, 1), "a function of one argument"}
    own = [max_concurrency: {:positive, 64}, on_result: {function, &Function.identity/1}]

    [timeout: {:timeout, :infinity}] ++
      own ++ for(key <- [:metric | @arguments ++ @passed], do: {key, :any})
  end
end
