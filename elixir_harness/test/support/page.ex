defmodule DSPex.Test.Page do
  @moduledoc "The code of a page, for a test that runs it."

  require ExUnit.Assertions

  @root Path.expand("../../..", __DIR__)

  @doc "The path of a page, given from the root of the project."
  def path(page), do: Path.join(@root, page)

  @doc "Its blocks of a language, in order."
  def blocks(page, language \\ "elixir") do
    ~r/^```#{language}\n(.*?)^```$/ms
    |> Regex.scan(File.read!(path(page)), capture: :all_but_first)
    |> List.flatten()
  end

  @doc """
  Its modules, compiled, with another name for its pool, as tests of other pages may run at the same time. They are gone when
  the tests of the calling test module are over. Gives the other blocks, with that name, too.
  """
  def compile(page, pool) do
    {modules, others} =
      page
      |> blocks()
      |> Enum.map(&String.replace(&1, "MyApp.Pool", inspect(pool)))
      |> Enum.split_with(&(&1 =~ ~r/^defmodule /m))

    {compiled, warnings} =
      Code.with_diagnostics([log: true], fn ->
        Enum.flat_map(modules, &Code.compile_string(&1, path(page)))
      end)

    ExUnit.Assertions.assert(warnings == [])

    ExUnit.Callbacks.on_exit(fn ->
      for {module, _code} <- compiled, do: :code.delete(module) && :code.purge(module)
    end)

    others
  end

  @doc "Runs one block, with these bindings."
  def run(code, page, binding \\ []) do
    {value, _binding} = Code.eval_string(code, binding, file: path(page))
    value
  end
end
