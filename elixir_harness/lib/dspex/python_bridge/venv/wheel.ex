defmodule DSPex.PythonBridge.Venv.Wheel do
  @moduledoc false
  # The peer's package as a wheel. It is made here: a build backend would be downloaded and run without a hash.

  alias DSPex.PythonBridge.Venv.Source

  @doc "Writes the wheel of the source's package into `folder`, and returns its path."
  @spec write(Source.t(), Path.t()) :: {:ok, Path.t()} | {:error, String.t()}
  def write(%Source{package: package}, folder) do
    project = File.read!(Path.join(package, "pyproject.toml"))
    version = version(package)
    info = "dspy_bridge-#{version}.dist-info"

    files =
      modules(package) ++
        [
          {"#{info}/METADATA", metadata(project, version)},
          {"#{info}/WHEEL",
           "Wheel-Version: 1.0\nGenerator: dspex.setup\nRoot-Is-Purelib: true\nTag: py3-none-any\n"},
          {"#{info}/entry_points.txt", entry_points(project)}
        ]

    wheel = Path.join(folder, "dspy_bridge-#{version}-py3-none-any.whl")

    entries =
      for {name, content} <- files ++ [record(files, info)], do: {to_charlist(name), content}

    case :zip.create(to_charlist(wheel), entries) do
      {:ok, _path} -> {:ok, wheel}
      {:error, reason} -> {:error, "#{wheel} cannot be written: #{inspect(reason)}"}
    end
  end

  defp modules(package) do
    for path <- Source.files(Path.join(package, "dspy_bridge")),
        Path.extname(path) in [".py", ".typed"],
        do: {Path.relative_to(path, package), File.read!(path)}
  end

  defp version(package) do
    init = File.read!(Path.join(package, "dspy_bridge/__init__.py"))
    [_all, version] = Regex.run(~r/^__version__ = "([^"]+)"/m, init)
    version
  end

  defp metadata(project, version) do
    [_all, python] = Regex.run(~r/^requires-python = "([^"]+)"/m, project)
    [_all, dependencies] = Regex.run(~r/^dependencies = \[(.*?)^\]/ms, project)
    needs = Regex.scan(~r/^\s*"([^"]+)"/m, dependencies, capture: :all_but_first)

    Enum.join([
      "Metadata-Version: 2.1\nName: dspy-bridge\nVersion: #{version}\nRequires-Python: #{python}\n"
      | for([need] <- needs, do: "Requires-Dist: #{need}\n")
    ])
  end

  defp entry_points(project) do
    [_all, scripts] = Regex.run(~r/^\[project\.scripts\]\n((?:[^\[\n].*\n)*)/m, project)
    "[console_scripts]\n" <> String.replace(scripts, "\"", "")
  end

  # The names alone: what was installed is compared by `Source.stamp`.
  defp record(files, info) do
    record = "#{info}/RECORD"
    {record, Enum.map_join(files ++ [{record, ""}], fn {name, _content} -> "#{name},,\n" end)}
  end
end
