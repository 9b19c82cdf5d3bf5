defmodule DSPex.PackageTest do
  use ExUnit.Case, async: true

  @harness File.cwd!()
  @checkout Path.dirname(@harness)

  defp listed do
    Mix.Project.config()[:package][:files]
    |> Enum.flat_map(&Path.wildcard(&1, match_dot: true))
    |> Enum.flat_map(&if(File.dir?(&1), do: Path.wildcard(&1 <> "/**/*"), else: [&1]))
    |> Enum.reject(&File.dir?/1)
  end

  test "the Hex package has all files that an application needs, and no other" do
    peer =
      for path <- Path.wildcard(@checkout <> "/dspy_bridge/**/*.{py,typed}"),
          do: Path.relative_to(path, @checkout)

    carried =
      for file <- ["pyproject.toml", "README.md", "LICENSE" | peer],
          do: "priv/python/package/" <> file

    ours =
      ["mix.exs", "usage-rules.md", ".formatter.exs"] ++
        Path.wildcard("lib/**/*") ++ Path.wildcard("priv/python/*")

    assert Enum.sort(listed()) == Enum.sort(Enum.filter(ours, &File.regular?/1) ++ carried)
  end

  test "the peer in priv is the checkout's" do
    for "priv/python/package/" <> file = path <- listed(),
        do: assert(File.read!(path) == File.read!(Path.join(@checkout, file)), file)
  end
end
