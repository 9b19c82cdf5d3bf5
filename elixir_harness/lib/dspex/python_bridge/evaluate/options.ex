defmodule DSPex.PythonBridge.Evaluate.Options do
  @moduledoc false
  # The options of an evaluation. Those that are passed on to its requests are checked once, before the first of them.

  alias DSPex.PythonBridge.{Client, Error, Program}
  alias DSPex.PythonBridge.Evaluate.Metric
  alias DSPex.PythonBridge.Options.Table

  @passed [:item_timeout_ms, :attempts, :tools, :retry, :traceparent, :telemetry_metadata]
  @arguments [:lm, :config]

  @enforce_keys [:args, :passed, :max_concurrency, :timeout, :on_result]
  defstruct @enforce_keys

  @typedoc "`args`: of `execute_program`. `passed`: options of each request, the metric's function among its tools."
  @type t :: %__MODULE__{
          args: map(),
          passed: keyword(),
          max_concurrency: pos_integer(),
          timeout: timeout(),
          on_result: (map() -> term())
        }

  @doc "Checks them for a program, nil if it is not a module's; the error names the wrong one."
  @spec new(term(), Program.Spec.t() | nil) :: {:ok, t()} | {:error, Error.t()}
  def new(opts, spec \\ nil) do
    with {:ok, opts} <- Table.check(opts, table()),
         {:ok, metric, passed} <- Metric.new(opts[:metric], Keyword.take(opts, @passed), spec),
         {:ok, _checked} <- Client.Options.new(passed, @passed) do
      args = opts |> Keyword.take(@arguments) |> Map.new() |> Map.put(:metric, metric)
      own = Keyword.take(opts, [:max_concurrency, :timeout, :on_result])
      {:ok, struct!(__MODULE__, [args: args, passed: passed] ++ own)}
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
