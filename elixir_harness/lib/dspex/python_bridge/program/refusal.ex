defmodule DSPex.PythonBridge.Program.Refusal do
  @moduledoc false
  # What is wrong with the definition of a module's program: thrown where it is found, an error text where the module is
  # compiled.

  alias DSPex.PythonBridge.Options.Table

  # A word that is less alike is not suggested.
  @alike 0.7

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

  @doc """
  The end of a text about an unknown word: the known one that is most alike, if any is.

      iex> DSPex.PythonBridge.Program.Refusal.meant(:strng, [:string, :integer])
      ", did you mean :string?"
      iex> DSPex.PythonBridge.Program.Refusal.meant(:owl, [:string, :integer])
      ""
  """
  @spec meant(atom() | String.t(), [atom() | String.t()]) :: String.t()
  def meant(word, known), do: Table.meant(word, known, @alike)

  @doc "A value of the definition for a text, cut short."
  @spec shown(term()) :: String.t()
  def shown(value), do: inspect(value, limit: 5, printable_limit: 80)
end
