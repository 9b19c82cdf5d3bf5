defmodule DSPex.AttributeRegexesTest do
  @moduledoc "No regex in a module attribute: on OTP 28 such a module does not compile. Run by `make check` too."

  use ExUnit.Case, async: true

  alias DSPex.Test.AttributeRegexes

  @root Path.expand("../..", __DIR__)

  test "there is none in any Elixir file" do
    files =
      for pattern <- ["elixir_harness/*", "elixir_harness/{lib,test,config}/**/*", "tests/**/*"],
          file <- Path.wildcard(Path.join(@root, pattern <> ".{ex,exs}")),
          do: Path.relative_to(file, @root)

    # What it looks through is there.
    assert ["elixir_harness/mix.exs", "elixir_harness/lib/dspex/application.ex"] -- files == []

    found =
      for file <- files,
          {line, what} <- AttributeRegexes.find(File.read!(Path.join(@root, file))),
          do: "#{file}:#{line}: a regex in #{what}; from OTP 28 on it has to be in a function"

    assert found == []
  end

  test "all ways to have one are found, with their lines" do
    source = """
    defmodule M do
      @one ~r/a/
      @two ~r{b}i
      @three [
        %{key: {1, ~r/c/}},
        ~r/d/
      ]
      @four Regex.compile!("e")
      @tag pattern: ~r/f/
      @five for word <- ["g"], do: ~r/\#{word}/
      defstruct name: nil, pattern: ~r/h/
    end
    """

    assert Enum.sort(AttributeRegexes.find(source)) == [
             {2, "@one"},
             {3, "@two"},
             {5, "@three"},
             {6, "@three"},
             {8, "@four"},
             {9, "@tag"},
             {10, "@five"},
             {11, "defstruct"}
           ]
  end

  test "those in functions, in strings and of other sigils do not count" do
    source = """
    defmodule M do
      @doc "Not ~r/a/ but `~r/b/`"
      @words ~w(a b)
      @spec f(Regex.t()) :: boolean()
      def f(regex \\\\ ~r/c/), do: @words =~ ~r/d/ and regex != Regex.compile!("e")
      def key, do: ~r/f/
    end
    """

    assert AttributeRegexes.find(source) == []
  end
end
