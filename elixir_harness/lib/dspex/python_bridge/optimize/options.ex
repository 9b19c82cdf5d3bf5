defmodule DSPex.PythonBridge.Optimize.Options do
  @moduledoc false
  # The options of an optimization, as arguments of its request. What they hold is checked by the peer, but for what is
  # read here.

  alias DSPex.PythonBridge.{Client, Error, Protocol}
  alias DSPex.PythonBridge.Evaluate.{Examples, Metric}
  alias DSPex.PythonBridge.Optimize.Definition
  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Program
  alias DSPex.PythonBridge.Protocol.Payload

  @passed [:tools, :retry, :traceparent, :telemetry_metadata]
  # Keys of the wire's `optimize`.
  @lms [:prompt_lm, :teacher_lm, :reflection_lm]
  @of_optimizer [:optimizer, :options, :num_threads, :seed, :budget | @lms]

  @enforce_keys [:args, :optimizer, :on_progress, :timeout, :retry?, :request]
  defstruct @enforce_keys

  @typedoc """
  `args`: of `execute_program`, but for the program. `retry?`: whether the run is made again if its peer dies. `request`:
  the options of its request, the metric's function among its tools.
  """
  @type t :: %__MODULE__{
          args: map(),
          optimizer: String.t(),
          on_progress: (term() -> term()),
          timeout: timeout(),
          retry?: boolean(),
          request: keyword()
        }

  @doc "Checks them; the error names the wrong one."
  @spec new(term(), Definition.t()) :: {:ok, t()} | {:error, Error.t()}
  def new(opts, %Definition{} = definition) do
    with {:ok, opts} <- Table.check(opts, table()),
         {:ok, metric, tools} <- Metric.new(opts[:metric]),
         optimizer = Payload.string(opts[:optimizer]),
         true <- is_binary(optimizer) || ":optimizer: expected a name, such as :mipro_v2",
         {:ok, request} <- request(Keyword.take(opts, @passed), definition, tools),
         {:ok, trainset} <- set(opts, :trainset, definition.spec),
         {:ok, valset} <- set(opts, :valset, definition.spec),
         true <- trainset != nil || ":trainset: missing; expected examples, {inputs, expected}" do
      optimize = opts |> Keyword.take(@of_optimizer) |> Map.new(&plain/1)
      optimize = if valset, do: Map.put(optimize, :valset, valset), else: optimize
      args = opts |> Keyword.take([:lm]) |> Map.new(&plain/1) |> Map.merge(trainset)

      {:ok,
       %__MODULE__{
         args: Map.merge(args, %{metric: metric, optimize: optimize}),
         optimizer: optimizer,
         on_progress: opts[:on_progress],
         timeout: opts[:timeout],
         retry?: Keyword.get(request, :retry, true),
         request: request
       }}
    else
      {:error, %Error{} = error} -> {:error, error}
      {:error, text} -> refused(text)
      text when is_binary(text) -> refused(text)
    end
  end

  defp table do
    function = {:test, &is_function(&1, 1), "a function of one argument"}
    own = [timeout: {:timeout, :infinity}, on_progress: {function, fn _event -> :ok end}]
    others = [:lm, :trainset, :valset, :metric] ++ @of_optimizer ++ @passed
    own ++ for(key <- others, do: {key, :any})
  end

  defp refused(text), do: {:error, Error.new(:invalid_request, text)}

  # Functions of a module's program count as those of its runs do.
  defp request(opts, %Definition{spec: spec} = definition, metric) do
    functions = if spec, do: spec.functions, else: %{}

    with {:ok, opts} <- Metric.add_tools(opts, metric),
         {:ok, options} <- Client.Options.new(Program.Tools.add(opts, functions), @passed),
         :ok <- check_tools(definition, options.opts[:tools], metric),
         do: {:ok, options.opts}
  end

  defp check_tools(definition, tools, metric) do
    case Enum.sort(Map.keys(tools || %{}) -- (Map.keys(metric) ++ definition.tools)) do
      [] ->
        :ok

      unknown ->
        has = if definition.tools == [], do: "none", else: Enum.join(definition.tools, ", ")
        {:error, ":tools: the program has no tool #{Enum.join(unknown, ", ")}; it has #{has}"}
    end
  end

  # The keys of `execute_program`, and of `valset`.
  defp set(opts, name, spec) do
    with examples when examples != nil <- opts[name],
         {:ok, examples} <- Examples.stream(examples),
         {:ok, inputs, expected} <- Examples.columns(Enum.to_list(examples), spec) do
      set = %{inputs: inputs}
      {:ok, if(expected, do: Map.put(set, :expected, expected), else: set)}
    else
      nil -> {:ok, nil}
      {:error, text} when is_binary(text) -> {:error, "#{inspect(name)}: #{text}"}
      {:error, index} -> {:error, inspect(name) <> ": " <> Examples.refusal("examples", index)}
    end
  catch
    {Examples, text} -> {:error, "#{inspect(name)}: #{text}"}
  end

  # A keyword list in the place of a map, the empty one too.
  defp plain({key, value}),
    do: {key, if(Keyword.keyword?(value), do: Map.new(value), else: value)}

  @doc "The body of the request, for a program of this id. The error says where a value has no JSON form."
  @spec encode(t(), String.t(), keyword()) :: {:ok, binary()} | {:error, Error.t()}
  def encode(%__MODULE__{args: args}, program, opts) do
    args = Map.put(args, :program_id, program)
    Protocol.encode_body(:execute_program, args, [stream: true] ++ opts)
  end
end
