defmodule DSPex.TourTest do
  @moduledoc "Runs the cells of the Livebook, in order, without what installs."

  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import ExUnit.CaptureIO

  alias DSPex.PythonBridge.Pool
  alias DSPex.Test.Page

  @page "docs/guide/tour.livemd"
  @external_resource Page.path(@page)

  @tag :capture_log
  @tag timeout: 120_000
  test "the cells of the tour run as shown, one after the other" do
    put_config(:python_environment, [])
    put_config(:python_bridge, [])
    [install | cells] = Page.blocks(@page)

    assert {:ok, {{:., _, [{:__aliases__, _, [:Mix]}, :install]}, _, [[_dspex], _config]}} =
             Code.string_to_quoted(install)

    [relative] =
      Regex.run(~r/path: Path.expand\("(.+?)", __DIR__\)/, install, capture: :all_but_first)

    assert Path.expand(relative, Path.dirname(Page.path(@page))) == File.cwd!()

    on_exit(fn ->
      for module <- [Tour.Triage, Tour.Essay, Tour.Shop],
          do: :code.delete(module) && :code.purge(module)
    end)

    assert Code.ensure_loaded!(DSPex.PythonBridge.Venv).__info__(:functions)[:make]
    assert Enum.any?(cells, &(without_setup(&1) != &1))
    output = capture_io(fn -> run(cells) end)
    assert output =~ "inputs.reveiw: unknown field"
    assert output =~ "echo: Why owls turn their heads"
    assert output =~ "looking for: Any red shirts left?"
    assert output =~ "score 0.500, 2 examples"
  end

  defp run(cells) do
    Enum.reduce(cells, {[], Code.env_for_eval(file: Page.path(@page))}, fn cell, {binding, env} ->
      quoted = cell |> without_setup() |> Code.string_to_quoted!(file: Page.path(@page))
      {value, binding, env} = Code.eval_quoted_with_env(quoted, binding, env)
      # The pool lives as long as Livebook's runtime.
      if match?({:ok, pid} when is_pid(pid), value), do: on_exit(&stop/0)
      {binding, env}
    end)
  end

  # It takes a minute, and is tested elsewhere.
  defp without_setup(cell) do
    String.replace(
      cell,
      "DSPex.PythonBridge.Venv.make(folder, progress: &IO.puts/1)",
      inspect({:ok, python()})
    )
  end

  defp stop do
    if pid = Process.whereis(Pool), do: Supervisor.stop(pid)
  end
end
