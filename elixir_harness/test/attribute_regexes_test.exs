defmodule DSPex.AttributeRegexesTest do
  @moduledoc "No regex in a module attribute: on OTP 28 such a module does not compile. Run by `make check` too."

  use ExUnit.Case, async: true

  test "there is none in any Elixir file" do
    files =
      Enum.flat_map(["*", "{lib,test}/**/*", "../tests/**/*"], &Path.wildcard(&1 <> ".{ex,exs}"))

    assert "lib/dspex/application.ex" in files

    # The compiler has to write the values of attributes and the defaults of structs into the module.
    found =
      for file <- files,
          {kind, meta, [value]} <- nodes(Code.string_to_quoted!(File.read!(file))),
          kind in [:@, :defstruct],
          {sigil, _meta, _parts} when sigil in [:sigil_r, :sigil_R] <- nodes(value),
          do: "#{file}:#{meta[:line]}: from OTP 28 on the regex has to be in a function"

    assert found == []
    planted = Code.string_to_quoted!("@a [{1, ~r/b/}]")
    assert [_regex] = for({:sigil_r, _, _} = node <- nodes(planted), do: node)
  end

  defp nodes(ast), do: ast |> Macro.prewalker() |> Enum.to_list()
end
