defmodule DSPex.PythonBridge.Program.StringSignature do
  @moduledoc false
  # DSPy's string form of a signature, with the simple types of it: "question, context: list[str] -> answer: float".

  import DSPex.PythonBridge.Program.Refusal

  @names ~w(string integer float boolean map any date time datetime image audio file history)a
         |> Map.new(&{Atom.to_string(&1), &1})
         |> Map.merge(%{"str" => :string, "int" => :integer, "bool" => :boolean})
         |> Map.merge(%{"dict" => :map, "Any" => :any})

  @doc """
  The fields of a signature as a keyword list of `inputs` and `outputs`. Refuses other types, by the field's name.

      iex> DSPex.PythonBridge.Program.StringSignature.read("question -> answer: list[float], sure: Literal['yes', 'no']")
      [inputs: [question: :string], outputs: [answer: {:list, :float}, sure: {:enum, ["yes", "no"]}]]
  """
  @spec read(String.t()) :: [inputs: keyword(), outputs: keyword()]
  def read(text) do
    case String.split(text, "->") do
      [inputs, outputs] ->
        [inputs: side(inputs, "signature.inputs"), outputs: side(outputs, "signature.outputs")]

      _other ->
        refuse("signature", ~s(expected exactly one "->", as in "question -> answer"))
    end
  end

  defp side(text, where) do
    for field <- split(text), field = String.trim(field), field != "" do
      case Regex.run(~r/\A(\w+)\s*(?::\s*(.+))?\z/us, field, capture: :all_but_first) do
        [name] -> {String.to_atom(name), :string}
        [name, type] -> {String.to_atom(name), type(type, "#{where}.#{name}")}
        nil -> refuse(where, "#{shown(field)} is not a field; expected one such as answer: float")
      end
    end
  end

  @doc "Splits one side of a signature at the commas outside of brackets and quotes."
  @spec split(String.t()) :: [String.t()]
  def split(text) do
    ~r/(?:'[^']*'|"[^"]*"|\[(?:'[^']*'|"[^"]*"|[^\]\['"]|\[[^\]]*\])*\]|[^,])+/u
    |> Regex.scan(text)
    |> List.flatten()
  end

  defp type(text, where) do
    text = String.trim(text)

    case Regex.run(~r/\A(list|List|Optional|dict|Dict|Literal)\[(.*)\]\z/us, text) do
      [_, "Literal", values] -> {:enum, literals(values, text, where)}
      [_, "Optional", of] -> {:optional, type(of, where)}
      [_, dict, of] when dict in ["dict", "Dict"] -> {:map, value_type(of, text, where)}
      [_, _list, of] -> {:list, type(of, where)}
      nil -> Map.get(@names, text) || unreadable(text, where)
    end
  end

  defp value_type(text, whole, where) do
    case Regex.run(~r/\A\s*str\s*,(.*)\z/us, text) do
      [_, of] -> type(of, where)
      nil -> unreadable(whole, where)
    end
  end

  defp literals(text, whole, where) do
    for value <- split(text), value = String.trim(value) do
      case Regex.run(~r/\A(?:'([^'\\]*)'|"([^"\\]*)"|(-?\d+))\z/u, value) do
        [_, text] -> text
        [_, "", text] -> text
        [_, "", "", number] -> String.to_integer(number)
        nil -> unreadable(whole, where)
      end
    end
  end

  @spec unreadable(String.t(), String.t()) :: no_return()
  defp unreadable(text, where) do
    named = "str, int, float, bool, list[…], dict[str, …], Optional[…] and Literal[…]"
    refuse(where, "#{shown(text)} is not one of #{named}; write the signature as a keyword list")
  end
end
