defmodule DSPex.PythonBridge.Venv.WheelTest do
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers, only: [python: 0]

  alias DSPex.PythonBridge.Venv.{Source, Wheel}

  @moduletag :tmp_dir

  defp contents(wheel) do
    {:ok, files} = wheel |> to_charlist() |> :zip.extract([:memory])
    Map.new(files, fn {name, content} -> {to_string(name), content} end)
  end

  defp metadata(files) do
    [metadata] = for {name, text} <- files, Path.basename(name) == "METADATA", do: text
    [head | _description] = String.split(metadata, "\n\n")
    for line <- String.split(head, "\n"), line =~ ~r/^(Name|Version|Requires-\w+):/, do: line
  end

  test "it is what the build backend makes of the package, less what nobody installs it for", %{
    tmp_dir: dir
  } do
    {:ok, source} = Source.read(Application.app_dir(:dspex, "priv/python"), [])
    {:ok, wheel} = Wheel.write(source, dir)
    args = ["-m", "build", "--no-isolation", "--wheel", "--outdir", Path.join(dir, "built")]
    {_output, 0} = System.cmd(python(), args ++ [source.package], stderr_to_stdout: true)
    [built] = Path.wildcard(Path.join(dir, "built/*.whl"))
    assert Path.basename(wheel) == Path.basename(built)

    {ours, theirs} = {contents(wheel), contents(built)}
    modules = &Map.filter(&1, fn {name, _content} -> name =~ ~r/^dspy_bridge\// end)
    assert modules.(ours) == modules.(theirs)
    assert map_size(modules.(ours)) > 50

    # Those of the extras are not installed.
    needs = Enum.reject(metadata(theirs), &(&1 =~ "extra =="))
    assert Enum.sort(names(metadata(ours))) == Enum.sort(names(needs))

    [entry_points] = for {name, text} <- theirs, name =~ "entry_points.txt", do: text
    info = Enum.find(Map.keys(ours), &(&1 =~ "entry_points.txt"))
    assert String.trim(ours[info]) == String.trim(entry_points)

    record = ours[Path.join(Path.dirname(info), "RECORD")]
    assert Enum.sort(String.split(record, ",,\n", trim: true)) == Enum.sort(Map.keys(ours))
  end

  # One writes the parts of a specifier in another order.
  defp names(lines) do
    for line <- lines do
      [key, value] = String.split(line, ": ")
      {key, value |> String.split(~r/[, ]|(?=[<>=])(?<![<>=])/) |> Enum.sort()}
    end
  end
end
