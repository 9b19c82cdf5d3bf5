defmodule DSPex.PythonBridge.Client.Options do
  @moduledoc false
  # The options of one call: those of `DSPex.PythonBridge.Bridge.request/4`, of which `DSPex.PythonBridge.Bridge.stream/3`
  # takes all but `:on_chunk`. Some of them are arguments of `execute_program` for the peer.

  alias DSPex.PythonBridge.{Error, Options, Tools}

  # The longest timeout of `receive`.
  @max_timeout 4_294_967_295
  @max_attempts 10
  # They are arguments of execute_program on the wire.
  @arguments [:attempts, :max_concurrency, :item_timeout_ms]
  @always [meta: true]

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

  @doc "The timeout of a whole evaluation or optimization, by default `:infinity`; or the text that refuses it."
  @spec whole_timeout(keyword()) :: {:ok, timeout()} | {:error, String.t()}
  def whole_timeout(opts) do
    case Keyword.get(opts, :timeout, :infinity) do
      timeout when timeout == :infinity or timeout in 1..@max_timeout -> {:ok, timeout}
      _other -> {:error, ":timeout: expected 1 to #{@max_timeout} ms or :infinity"}
    end
  end

  @doc """
  Checks options; only the `allowed` ones are accepted. The error names the wrong one. The timeout is checked when
  the call is made.
  """
  @spec new(term(), [atom()]) :: {:ok, t()} | {:error, Error.t()}
  def new([], _allowed), do: {:ok, plain(:default)}
  def new([timeout: timeout], _allowed), do: {:ok, plain(timeout)}

  def new(opts, allowed) do
    with true <- Keyword.keyword?(opts),
         # If an option is given twice the first counts, as for Keyword.
         {:ok, opts} <- check(Enum.uniq_by(opts, &elem(&1, 0)), allowed) do
      {timeout, opts} = Keyword.pop(opts, :timeout, :default)
      {on_chunk, opts} = Keyword.pop(opts, :on_chunk)
      {arguments, opts} = Keyword.split(opts, @arguments)
      absent = [tools: %{}, history: false, traceparent: nil, telemetry_metadata: %{}]
      opts = @always ++ Keyword.reject(opts, &(&1 in absent))
      {:ok, %{plain(timeout) | on_chunk: on_chunk, arguments: arguments, opts: opts}}
    else
      false -> {:error, Error.new(:invalid_request, "options: expected a keyword list")}
      {:error, text} -> {:error, Error.new(:invalid_request, text)}
    end
  end

  defp plain(timeout),
    do: %__MODULE__{timeout: timeout, on_chunk: nil, arguments: [], opts: @always}

  @doc """
  The arguments of a command with those that were given as options. The error names an option that the command does not
  take, or that is among the arguments already.
  """
  @spec arguments(t(), term(), args) :: {:ok, args} | {:error, Error.t()} when args: term()
  def arguments(%__MODULE__{arguments: []}, _command, args), do: {:ok, args}

  def arguments(%__MODULE__{arguments: arguments}, command, %{} = args)
      when command in [:execute_program, "execute_program"] do
    given? = &(is_map_key(args, &1) or is_map_key(args, Atom.to_string(&1)))

    case Enum.find(Keyword.keys(arguments), given?) do
      nil -> {:ok, Enum.into(arguments, args)}
      key -> refused(key, "there twice, as an option and as an argument")
    end
  end

  # What is not a map is refused when it is encoded.
  def arguments(_options, command, args) when command in [:execute_program, "execute_program"],
    do: {:ok, args}

  def arguments(%__MODULE__{arguments: [{key, _value} | _]}, _command, _args),
    do: refused(key, "only execute_program takes it")

  defp refused(key, text), do: {:error, Error.new(:invalid_request, "#{inspect(key)}: #{text}")}

  defp check([], _allowed), do: {:ok, []}

  defp check([{key, value} | opts], allowed) do
    with true <- key in allowed,
         {:ok, value} <- checked(key, value),
         {:ok, opts} <- check(opts, allowed) do
      {:ok, [{key, value} | opts]}
    else
      false -> {:error, Options.unknown(key, allowed)}
      {:error, text} -> {:error, text}
    end
  end

  defp checked(:timeout, timeout), do: {:ok, timeout}
  defp checked(:retry, retry) when is_boolean(retry), do: {:ok, retry}
  defp checked(:retry, _other), do: {:error, ":retry: expected true or false"}
  defp checked(:on_chunk, fun) when is_function(fun, 1), do: {:ok, fun}
  defp checked(:on_chunk, _other), do: {:error, ":on_chunk: expected a function of one argument"}

  defp checked(:history, history) when is_boolean(history), do: {:ok, history}
  defp checked(:history, _other), do: {:error, ":history: expected true or false"}
  defp checked(:telemetry_metadata, map) when is_map(map) and not is_struct(map), do: {:ok, map}
  defp checked(:telemetry_metadata, _other), do: {:error, ":telemetry_metadata: expected a map"}
  defp checked(:attempts, n) when n in 1..@max_attempts, do: {:ok, n}
  defp checked(:attempts, _other), do: {:error, ":attempts: expected 1 to #{@max_attempts}"}
  defp checked(:max_concurrency, n) when is_integer(n) and n > 0, do: {:ok, n}
  defp checked(:max_concurrency, _other), do: {:error, ":max_concurrency: expected 1 or more"}
  defp checked(:item_timeout_ms, ms) when ms in 1..@max_timeout, do: {:ok, ms}

  defp checked(:item_timeout_ms, _other),
    do: {:error, ":item_timeout_ms: expected 1 to #{@max_timeout} ms"}

  defp checked(:tools, tools) do
    with {:error, text} <- Tools.Runner.functions(tools), do: {:error, ":tools: #{text}"}
  end

  defp checked(:traceparent, nil), do: {:ok, nil}

  defp checked(:traceparent, value) do
    expected = "expected a W3C trace context, 00-<32 hex>-<16 hex>-<2 hex> in lower case"

    if traceparent?(value),
      do: {:ok, value},
      else: {:error, ":traceparent: #{expected}, no id of zeros alone, or nil"}
  end

  # https://www.w3.org/TR/trace-context/: later versions than 00 may have more fields.
  defp traceparent?(<<"00", _rest::binary>> = text) when byte_size(text) > 55, do: false

  defp traceparent?(text) when is_binary(text),
    do:
      text =~
        ~r/\A(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,199})?\z/

  defp traceparent?(_other), do: false
end
