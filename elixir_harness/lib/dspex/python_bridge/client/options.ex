defmodule DSPex.PythonBridge.Client.Options do
  @moduledoc false
  # The options of one call: those of `DSPex.PythonBridge.Bridge.request/4`, of which `DSPex.PythonBridge.Bridge.stream/3`
  # takes all but `:on_chunk`. Some of them are arguments of `execute_program` for the peer.

  alias DSPex.PythonBridge.{Error, Tools}
  alias DSPex.PythonBridge.Options.Table

  # Not for users. `:journal` has the entries of a run's journal, as peers have written them, the oldest first: no LM is asked
  # for their answers. `:keeper` is a `t:DSPex.PythonBridge.Client.StreamProxy.keeper/0`.
  @internal [:journal, :keeper]
  # They are arguments of execute_program on the wire.
  @arguments [:attempts, :budget, :max_concurrency, :item_timeout_ms]
  @absent [tools: %{}, history: false, traceparent: nil, telemetry_metadata: %{}]
  @traceparent "a W3C trace context, 00-<32 hex>-<16 hex>-<2 hex> in lower case, no id of zeros alone, or nil"

  @enforce_keys [:timeout, :on_chunk, :arguments, :opts]
  defstruct [:timeout, :on_chunk, :arguments, :opts]

  @typedoc """
  `arguments`: for `arguments/3`. `opts`: those of `DSPex.PythonBridge.Client.Caller.exchange/5`, and `:tools`, if there
  are any.
  """
  @type t :: %__MODULE__{
          timeout: timeout() | :default,
          on_chunk: (map() -> term()) | nil,
          arguments: keyword(),
          opts: keyword()
        }

  @doc "The options of `DSPex.PythonBridge.Bridge.stream/3`."
  @spec of_stream() :: [atom()]
  def of_stream,
    do: [:timeout, :retry, :tools, :history, :traceparent, :telemetry_metadata | @arguments]

  @doc """
  Checks options; only the `allowed` ones are accepted. The error names the wrong one. The timeout is checked when
  the call is made.
  """
  @spec new(term(), [atom()]) :: {:ok, t()} | {:error, Error.t()}
  def new(opts, allowed) do
    case Table.check(opts, Keyword.take(table(), @internal ++ allowed)) do
      {:ok, opts} ->
        {timeout, opts} = Keyword.pop(opts, :timeout, :default)
        {on_chunk, opts} = Keyword.pop(opts, :on_chunk)
        {arguments, opts} = Keyword.split(opts, @arguments)
        opts = [meta: true] ++ Keyword.reject(opts, &(&1 in @absent))
        {:ok, %__MODULE__{timeout: timeout, on_chunk: on_chunk, arguments: arguments, opts: opts}}

      {:error, text} ->
        {:error, Error.new(:invalid_request, text)}
    end
  end

  defp table do
    [
      # Checked when the call is made.
      timeout: :any,
      retry: :boolean,
      on_chunk: {:test, &is_function(&1, 1), "a function of one argument"},
      history: :boolean,
      telemetry_metadata: :map,
      journal: :any,
      keeper: :any,
      budget: Table.budget([:lm_calls, :tokens, :usd]),
      attempts: 1..10,
      max_concurrency: :positive,
      item_timeout_ms: :ms,
      tools: &Tools.Runner.functions/1,
      traceparent: {:test, &(&1 == nil or traceparent?(&1)), @traceparent}
    ]
  end

  @doc """
  The arguments of a command with those that were given as options. The error names an option that the command does not
  take, or that is among the arguments already.
  """
  @spec arguments(t(), term(), args) :: {:ok, args} | {:error, Error.t()} when args: term()
  def arguments(%__MODULE__{arguments: []}, _command, args), do: {:ok, args}

  def arguments(%__MODULE__{arguments: arguments}, command, args)
      when command in [:execute_program, "execute_program"] do
    given? = &(is_map_key(args, &1) or is_map_key(args, Atom.to_string(&1)))
    twice = is_map(args) && Enum.find(Keyword.keys(arguments), given?)

    cond do
      twice -> refused(twice, "there twice, as an option and as an argument")
      is_map(args) -> {:ok, Enum.into(arguments, args)}
      # It is refused when it is encoded.
      true -> {:ok, args}
    end
  end

  def arguments(%__MODULE__{arguments: [{key, _value} | _]}, _command, _args),
    do: refused(key, "only execute_program takes it")

  defp refused(key, text), do: {:error, Error.new(:invalid_request, "#{inspect(key)}: #{text}")}

  # https://www.w3.org/TR/trace-context/: later versions than 00 may have more fields.
  defp traceparent?(<<"00", _rest::binary>> = text) when byte_size(text) > 55, do: false

  defp traceparent?(text) when is_binary(text),
    do:
      text =~
        ~r/\A(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,199})?\z/

  defp traceparent?(_other), do: false
end
