defmodule DSPex.PythonBridge.Stub.Signature do
  @moduledoc false
  # Reads a signature, in DSPy's string form or as an object, with the peer's rules for its form and names. What a type
  # may be is not checked.

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Program.Names
  alias DSPex.PythonBridge.Stub.Arguments

  @signature ~w(inputs outputs instructions name description)
  @field ~w(name type description desc)
  @rules Names.rules()
  @keywords Enum.map(@rules.keywords, &Atom.to_string/1)
  @attributes Enum.map(@rules.attributes, &Atom.to_string/1)
  @not_as_input Enum.map(@rules.not_as_input, &Atom.to_string/1)

  @typedoc "`type`: a string, or a JSON Schema."
  @type field :: {String.t(), type :: String.t() | map() | nil}

  @doc "The fields of a signature, each with its name and its type, which is nil by default."
  @spec read(term()) :: {:ok, inputs :: [field()], outputs :: [field()]} | {:error, Error.t()}
  def read(signature) do
    with {:ok, inputs, outputs} <- sides(signature),
         :ok <- check(inputs, outputs),
         do: {:ok, Enum.map(inputs, &field/1), Enum.map(outputs, &field/1)}
  end

  defp field({name, type, _where}), do: {name, type}

  ## From its two forms: {name, type, where}

  defp sides(text) when is_binary(text) do
    case String.split(text, "->") do
      [inputs, outputs] ->
        {:ok, side(inputs, "signature.inputs"), side(outputs, "signature.outputs")}

      _others ->
        refuse(~s(signature: expected exactly one "->", as in "question -> answer"))
    end
  end

  defp sides(%{} = signature) do
    with :ok <- Arguments.known(signature, @signature, "signature"),
         {:ok, inputs} <- fields(signature["inputs"], "signature.inputs"),
         {:ok, outputs} <- fields(signature["outputs"], "signature.outputs"),
         do: {:ok, inputs, outputs}
  end

  defp sides(_other) do
    refuse(
      ~s(signature: expected text \("question -> answer"\) or an object with inputs and outputs)
    )
  end

  defp side(text, where) do
    for field <- split(text), String.trim(field) != "" do
      case String.split(field, ":", parts: 2) do
        [name] -> {String.trim(name), nil, where}
        [name, type] -> {String.trim(name), String.trim(type), where}
      end
    end
  end

  # At the commas outside of brackets and quotes.
  defp split(text), do: split(String.graphemes(text), 0, nil, "", [])

  defp split([], _depth, _quote, field, fields), do: Enum.reverse([field | fields])

  defp split([char | rest], depth, nil, field, fields) do
    cond do
      char == "," and depth == 0 -> split(rest, 0, nil, "", [field | fields])
      char in ["[", "(", "<", "{"] -> split(rest, depth + 1, nil, field <> char, fields)
      char in ["]", ")", ">", "}"] -> split(rest, depth - 1, nil, field <> char, fields)
      char in ["\"", "'"] -> split(rest, depth, char, field <> char, fields)
      true -> split(rest, depth, nil, field <> char, fields)
    end
  end

  defp split([char | rest], depth, quote, field, fields),
    do: split(rest, depth, if(char != quote, do: quote), field <> char, fields)

  defp fields(list, where) when is_list(list) do
    list
    |> Enum.with_index()
    |> Enum.reduce_while({:ok, []}, fn {field, index}, {:ok, fields} ->
      here = "#{where}[#{index}]"

      with :ok <- field_object(field, here),
           :ok <- Arguments.known(field, @field, here) do
        {:cont, {:ok, fields ++ [{field["name"], field["type"], here}]}}
      else
        error -> {:halt, error}
      end
    end)
  end

  defp fields(_other, where), do: refuse("#{where}: expected a list of fields")

  defp field_object(%{}, _where), do: :ok

  defp field_object(_other, where) do
    refuse(~s(#{where}: expected an object such as {"name": "question", "type": "str"}))
  end

  ## Names

  defp check(_inputs, []), do: refuse("signature.outputs: expected at least one field")

  defp check(inputs, outputs) do
    all = for field <- inputs, do: {field, @not_as_input}
    all = all ++ for field <- outputs, do: {field, []}
    names = Enum.map(all, fn {{name, _type, _where}, _reserved} -> name end)

    all
    |> Enum.with_index()
    |> Enum.find_value(:ok, fn {{{name, _type, where}, reserved}, index} ->
      cond do
        text = wrong_name(name) ->
          refuse("#{where}.name: #{text}")

        name in Enum.take(names, index) ->
          refuse("#{where}.name: '#{name}' is used twice; expected distinct names")

        name in reserved ->
          refuse("#{where}.name: '#{name}' is reserved by DSPy; choose another name")

        true ->
          nil
      end
    end)
  end

  defp wrong_name(name) when not is_binary(name) or name == "", do: "expected text"

  defp wrong_name(name) do
    cond do
      not (name =~ ~r/\A\p{L}[\p{L}\p{N}_]*\z/u) or name in @keywords ->
        "'#{name}' is not a field name; expected letters, digits and _, not a keyword"

      String.starts_with?(name, "dspy_") ->
        "'#{name}': DSPy hides fields that start with dspy_; choose another name"

      name in @attributes ->
        "'#{name}' is an attribute of every DSPy signature; choose another name"

      true ->
        nil
    end
  end

  defp refuse(text), do: Arguments.refuse(text)
end
