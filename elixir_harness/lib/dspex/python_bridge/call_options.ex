defmodule DSPex.PythonBridge.CallOptions do
  @moduledoc """
  The options of one call, checked: those of `DSPex.PythonBridge.Bridge.request/4`, of which
  `DSPex.PythonBridge.Bridge.stream/3` takes all but `:on_chunk`.
  """

  alias DSPex.PythonBridge.{Error, Options, Tools}

  @enforce_keys [:timeout, :on_chunk, :opts]
  defstruct [:timeout, :on_chunk, :opts]

  @typedoc "`opts`: those of `DSPex.PythonBridge.Caller.exchange/5`, and `:tools`, if there are any."
  @type t :: %__MODULE__{
          timeout: timeout() | :default,
          on_chunk: (map() -> term()) | nil,
          opts: keyword()
        }

  @doc """
  Checks options, of which only the `allowed` are there. The error names the one that cannot be right.
  The timeout is checked when the call is made.
  """
  @spec new(term(), [atom()]) :: {:ok, t()} | {:error, Error.t()}
  def new(opts, allowed) do
    with true <- Keyword.keyword?(opts),
         # Of an option given twice the first counts, as Keyword has it.
         {:ok, opts} <- check(Enum.uniq_by(opts, &elem(&1, 0)), allowed) do
      {timeout, opts} = Keyword.pop(opts, :timeout, :default)
      {on_chunk, opts} = Keyword.pop(opts, :on_chunk)
      opts = [meta: true] ++ Keyword.reject(opts, &(&1 == {:tools, %{}}))
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
    with {:error, text} <- Tools.functions(tools), do: {:error, ":tools: #{text}"}
  end
end
