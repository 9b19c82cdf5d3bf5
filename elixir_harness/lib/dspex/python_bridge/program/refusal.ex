defmodule DSPex.PythonBridge.Program.Refusal do
  @moduledoc false
  # What is wrong with the definition of a module's program: thrown where it is found, an error text where the module is
  # compiled.

  alias DSPex.PythonBridge.Options.Table

  @doc "Refuses a definition. `where`: the place in it, such as `signature.outputs.team`."
  @spec refuse(String.t(), String.t()) :: no_return()
  def refuse(where, text), do: throw({__MODULE__, "#{where}: #{text}"})

  @doc """
  What a function returns, or the text of the refusal in it.

      iex> alias DSPex.PythonBridge.Program.Refusal
      iex> {Refusal.catching(fn -> 1 end), Refusal.catching(fn -> Refusal.refuse("id", "expected a string") end)}
      {{:ok, 1}, {:error, "id: expected a string"}}
  """
  @spec catching((-> result)) :: {:ok, result} | {:error, String.t()} when result: term()
  def catching(fun) do
    {:ok, fun.()}
  catch
    {__MODULE__, text} -> {:error, text}
  end

  @doc "Refuses what is not a keyword list of these names. `expected`: the end of a text such as `expected a keyword list`."
  @spec keyword!(term(), String.t(), [atom()] | :any, String.t()) :: :ok
  def keyword!(opts, where, known, expected \\ "a keyword list") do
    if not Keyword.keyword?(opts), do: refuse(where, "expected #{expected}, got #{shown(opts)}")

    for {key, _value} <- opts,
        known != :any and key not in known,
        do: refuse(where, Table.unknown(key, known))

    case Keyword.keys(opts) -- Enum.uniq(Keyword.keys(opts)) do
      [] -> :ok
      [twice | _] -> refuse("#{where}.#{twice}", "there twice; expected distinct names")
    end
  end

  @doc "A value of the definition for a text, cut short."
  @spec shown(term()) :: String.t()
  defdelegate shown(value), to: Table
end
