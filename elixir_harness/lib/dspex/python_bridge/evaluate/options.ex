defmodule DSPex.PythonBridge.Evaluate.Options do
  @moduledoc false
  # The options of an evaluation. Those that are passed on to its requests are checked once, before the first of them.

  alias DSPex.PythonBridge.{Client, Error, Options, Program}
  alias DSPex.PythonBridge.Evaluate.Metric

  @passed [:item_timeout_ms, :attempts, :tools, :retry, :traceparent, :telemetry_metadata]
  @arguments [:lm, :config]
  @own [:metric, :max_concurrency, :timeout, :on_result]
  @known @own ++ @arguments ++ @passed
  @default_concurrency 64

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
    with true <- Keyword.keyword?(opts) || "options: expected a keyword list",
         nil <- Enum.find(Keyword.keys(opts), &(&1 not in @known)),
         {:ok, metric, tools} <- Metric.new(opts[:metric]),
         concurrency = Keyword.get(opts, :max_concurrency, @default_concurrency),
         true <-
           (is_integer(concurrency) and concurrency > 0) ||
             ":max_concurrency: expected 1 or more",
         {:ok, timeout} <- Client.Options.whole_timeout(opts),
         on_result = Keyword.get(opts, :on_result, &Function.identity/1),
         true <- is_function(on_result, 1) || ":on_result: expected a function of one argument",
         {:ok, passed} <- Metric.add_tools(Keyword.take(opts, @passed), tools),
         passed = Program.Tools.add(passed, functions),
         {:ok, _checked} <- Client.Options.new(passed, @passed) do
      {:ok,
       %__MODULE__{
         metric: metric,
         max_concurrency: concurrency,
         timeout: timeout,
         on_result: on_result,
         arguments: opts |> Keyword.take(@arguments) |> Map.new(),
         passed: passed
       }}
    else
      {:error, %Error{} = error} -> {:error, error}
      {:error, text} -> {:error, Error.new(:invalid_request, text)}
      text when is_binary(text) -> {:error, Error.new(:invalid_request, text)}
      unknown -> {:error, Error.new(:invalid_request, Options.unknown(unknown, @known))}
    end
  end
end
