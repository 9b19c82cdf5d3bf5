defmodule DSPex.PythonBridge.Optimize.Request do
  @moduledoc false
  # The options of an optimization, as arguments and options of its request. The peer checks what they hold.

  alias DSPex.PythonBridge.{Client, Error, Program}
  alias DSPex.PythonBridge.Evaluate.{Examples, Metric}
  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Protocol.Payload

  @passed [:tools, :retry, :traceparent, :telemetry_metadata]
  # Keys of the wire's `optimize`.
  @of_optimizer [:optimizer, :options, :num_threads, :seed, :budget] ++
                  [:prompt_lm, :teacher_lm, :reflection_lm]

  @enforce_keys [:args, :optimizer, :on_progress, :timeout, :opts]
  defstruct @enforce_keys

  @typedoc "`args`: of `execute_program`, but for the program. `opts`: the metric's function is among the tools."
  @type t :: %__MODULE__{
          args: map(),
          optimizer: String.t() | nil,
          on_progress: (term() -> term()),
          timeout: timeout(),
          opts: keyword()
        }

  @doc "Checks the options for a program, nil if it is not a module's; the error names the wrong one."
  @spec new(term(), Program.Spec.t() | nil) :: {:ok, t()} | {:error, Error.t()}
  def new(opts, spec) do
    with {:ok, opts} <- Table.check(opts, table()),
         {:ok, metric, passed} <- Metric.new(opts[:metric], Keyword.take(opts, @passed), spec),
         {:ok, checked} <- Client.Options.new(passed, @passed),
         {:ok, trainset} <- set(opts, :trainset, spec),
         {:ok, valset} <- set(opts, :valset, spec) do
      optimize = opts |> Keyword.take(@of_optimizer) |> Map.new(&plain/1)
      optimize = if valset, do: Map.put(optimize, :valset, valset), else: optimize
      lm = opts |> Keyword.take([:lm]) |> Map.new(&plain/1)

      {:ok,
       %__MODULE__{
         args: %{metric: metric, optimize: optimize} |> Map.merge(trainset) |> Map.merge(lm),
         optimizer: Payload.string(opts[:optimizer]),
         on_progress: opts[:on_progress],
         timeout: opts[:timeout],
         opts: checked.opts
       }}
    else
      {:error, %Error{} = error} -> {:error, error}
      {:error, text} -> {:error, Error.new(:invalid_request, text)}
    end
  end

  defp table do
    function = {:test, &is_function(&1, 1), "a function of one argument"}
    own = [timeout: {:timeout, :infinity}, on_progress: {function, fn _event -> :ok end}]
    budget = [budget: Table.budget([:lm_calls, :tokens, :seconds])]
    others = [:lm, :trainset, :valset, :metric] ++ @of_optimizer ++ @passed
    own ++ budget ++ for(key <- others -- [:budget], do: {key, :any})
  end

  # The keys of `execute_program`, and of `valset`.
  defp set(opts, name, spec) do
    with examples when examples != nil or name == :trainset <- opts[name],
         {:ok, examples, _none_left} <- Examples.take(Examples.reader(examples), 0),
         {:ok, inputs, expected} <- Examples.columns(examples, spec) do
      set = %{inputs: inputs}
      {:ok, if(expected, do: Map.put(set, :expected, expected), else: set)}
    else
      nil ->
        {:ok, nil}

      {:error, index} when is_integer(index) ->
        {:error, inspect(name) <> ": " <> Examples.refusal("examples", index)}

      {:error, text} ->
        {:error, "#{inspect(name)}: #{text}"}
    end
  end

  # A keyword list in the place of a map, the empty one too.
  defp plain({key, value}),
    do: {key, if(Keyword.keyword?(value), do: Map.new(value), else: value)}
end
