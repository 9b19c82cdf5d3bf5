defmodule DSPex.PythonBridge.CallOptions do
  @moduledoc """
  The options of one call, checked: those of `DSPex.PythonBridge.Bridge.request/4`, of which
  `DSPex.PythonBridge.Bridge.stream/3` takes all but `:on_chunk`.
  """

  alias DSPex.PythonBridge.{Error, Tools}

  @enforce_keys [:timeout, :on_chunk, :opts]
  defstruct [:timeout, :on_chunk, :opts]

  @typedoc "`opts`: those of `DSPex.PythonBridge.Caller.exchange/5`."
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
         opts = Enum.uniq_by(opts, &elem(&1, 0)),
         nil <- Enum.find_value(opts, &refusal(&1, allowed)) do
      {timeout, opts} = Keyword.pop(opts, :timeout, :default)
      {on_chunk, opts} = Keyword.pop(opts, :on_chunk)
      opts = [meta: true] ++ Enum.map(opts, &checked/1)
      {:ok, %__MODULE__{timeout: timeout, on_chunk: on_chunk, opts: opts}}
    else
      false -> {:error, Error.new(:invalid_request, "options: expected a keyword list")}
      text -> {:error, Error.new(:invalid_request, text)}
    end
  end

  defp refusal({key, value}, allowed) do
    if key in allowed, do: refusal({key, value}), else: "#{inspect(key)}: there is no such option"
  end

  defp refusal({:timeout, _timeout}), do: nil
  defp refusal({:retry, retry}) when is_boolean(retry), do: nil
  defp refusal({:retry, _other}), do: ":retry: expected true or false"
  defp refusal({:on_chunk, fun}) when is_function(fun, 1), do: nil
  defp refusal({:on_chunk, _other}), do: ":on_chunk: expected a function of one argument"

  defp refusal({:tools, tools}) do
    case Tools.functions(tools) do
      {:ok, _tools} -> nil
      {:error, text} -> ":tools: #{text}"
    end
  end

  defp checked({:tools, tools}) do
    {:ok, functions} = Tools.functions(tools)
    {:tools, functions}
  end

  defp checked(option), do: option
end
