defmodule DSPex.Test.AttributeRegexes do
  @moduledoc """
  Finds regexes where the compiler has to write a value into a module: in attributes and the defaults of
  structs. From OTP 28 on a compiled regex has a reference in it, which cannot be written: Elixir then
  refuses the module, or warns. In a function they are fine.
  """

  @doc "The lines of `source` that have such a regex, as `{line, what}`: `{7, \"@key\"}`."
  @spec find(String.t()) :: [{pos_integer(), String.t()}]
  def find(source) do
    {_ast, found} = source |> Code.string_to_quoted!() |> Macro.prewalk([], &collect/2)
    Enum.reverse(found)
  end

  defp collect({:@, _, [{name, _, [value]}]} = node, found) when is_atom(name),
    do: {node, lines(value, "@#{name}") ++ found}

  defp collect({:defstruct, _, [fields]} = node, found),
    do: {node, lines(fields, "defstruct") ++ found}

  defp collect(node, found), do: {node, found}

  defp lines(value, what) do
    {_ast, lines} =
      Macro.prewalk(value, [], &if(regex?(&1), do: {&1, [line(&1) | &2]}, else: {&1, &2}))

    for line <- lines, do: {line, what}
  end

  defp regex?({sigil, _, [_source, _modifiers]}) when sigil in [:sigil_r, :sigil_R], do: true

  defp regex?({{:., _, [{:__aliases__, _, [:Regex]}, function]}, _, _args}),
    do: function in [:compile, :compile!, :recompile, :recompile!]

  defp regex?(_node), do: false

  defp line({_, meta, _}), do: Keyword.fetch!(meta, :line)
end
