defmodule DSPex.PythonBridge.Client.Options do
  @moduledoc false
  # The options of one call: those of `DSPex.PythonBridge.Bridge.request/4`, of which `DSPex.PythonBridge.Bridge.stream/3`
  # takes all but `:on_chunk`.

  alias DSPex.PythonBridge.{Error, Options, Tools}

  @enforce_keys [:timeout, :on_chunk, :opts]
  defstruct [:timeout, :on_chunk, :opts]

  @typedoc "`opts`: those of `DSPex.PythonBridge.Client.Caller.exchange/5`, and `:tools`, if there are any."
  @type t :: %__MODULE__{
          timeout: timeout() | :default,
          on_chunk: (map() -> term()) | nil,
          opts: keyword()
        }

  @doc """
  Checks options; only the `allowed` ones are accepted. The error names the wrong one. The timeout is checked when
  the call is made.
  """
  @spec new(term(), [atom()]) :: {:ok, t()} | {:error, Error.t()}
  def new(opts, allowed) do
    with true <- Keyword.keyword?(opts),
         # If an option is given twice the first counts, as for Keyword.
         {:ok, opts} <- check(Enum.uniq_by(opts, &elem(&1, 0)), allowed) do
      {timeout, opts} = Keyword.pop(opts, :timeout, :default)
      {on_chunk, opts} = Keyword.pop(opts, :on_chunk)
      opts = [meta: true] ++ Keyword.reject(opts, &(&1 in [tools: %{}, traceparent: nil]))
      {:ok, %__MODULE__{timeout: timeout, on_chunk: on_chunk, opts: opts}}
    else
      false -> {:error, Error.new(:invalid_request, "options: expected a keyword list")}
      {:error, text} -> {:error, Error.new(:invalid_request, text)}
    end
  end

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
