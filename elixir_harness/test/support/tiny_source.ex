defmodule DSPex.Test.TinySource do
  @moduledoc """
  What `DSPex.PythonBridge.Venv` installs, in small: one distribution, `tiny`, and a package `dspy-bridge` that builds itself. With
  the settings of `env/1` uv takes both from the folder, without a network, and pip takes `uv` from there: a script that runs
  the one of the tests' Python.
  """

  @doc "Makes it in `folder`, with `tiny` pinned to `version`."
  def make(folder, version \\ "1.0") do
    File.mkdir_p!(Path.join(folder, "wheels"))
    for v <- ["1.0", "2.0"], do: wheel(folder, "tiny", v, [{"tiny.py", "VERSION = '#{v}'\n"}])
    uv = Path.join(Path.dirname(DSPex.Test.Helpers.python()), "uv")

    wheel(folder, "uv", "0.0", [
      {"uv.py", "import os, sys\ndef main(): os.execv('#{uv}', ['uv'] + sys.argv[1:])\n"},
      {"uv-0.0.dist-info/entry_points.txt", "[console_scripts]\nuv = uv:main\n"}
    ])

    pin(folder, version)
    package(folder, "one")
    folder
  end

  @doc "Pins `tiny`."
  def pin(folder, version) do
    File.write!(Path.join(folder, "requirements.txt"), """
    # What is pinned for another system is not looked for here.
    elsewhere==1.0 ; sys_platform == 'no_such_system'
    tiny==#{version}
    """)
  end

  @doc "The package, whose program prints `says`."
  def package(folder, says) do
    package = Path.join(folder, "package")
    File.mkdir_p!(Path.join(package, "dspy_bridge"))
    File.write!(Path.join(package, "dspy_bridge/__init__.py"), "")
    File.write!(Path.join(package, "dspy_bridge/__main__.py"), "print(#{inspect(says)})\n")

    File.write!(Path.join(package, "pyproject.toml"), """
    [build-system]
    requires = []
    build-backend = "backend"
    backend-path = ["."]
    [project]
    name = "dspy-bridge"
    version = "0.1"
    """)

    File.write!(Path.join(package, "backend.py"), """
    import glob, zipfile
    def build_wheel(directory, config_settings=None, metadata_directory=None):
        name = "dspy_bridge-0.1-py3-none-any.whl"
        info = "dspy_bridge-0.1.dist-info/"
        with zipfile.ZipFile(directory + "/" + name, "w") as wheel:
            for path in glob.glob("dspy_bridge/*.py"):
                wheel.write(path, path)
            wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: dspy-bridge\\nVersion: 0.1\\n")
            wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
            wheel.writestr(info + "RECORD", "")
        return name
    """)
  end

  @doc "Environment variables, for uv and pip."
  def env(folder) do
    %{
      "PIP_NO_INDEX" => "1",
      # It would be split at spaces.
      "PIP_FIND_LINKS" => url(Path.join(folder, "wheels")),
      "UV_NO_INDEX" => "1",
      "UV_FIND_LINKS" => url(Path.join(folder, "wheels")),
      "UV_NO_CACHE" => "1",
      "UV_NO_CONFIG" => "1",
      "PIP_CONSTRAINT" => nil,
      "PIP_CONFIG_FILE" => "/dev/null",
      # Whatever is wrong with what is tested, the Python of the machine stays as it is.
      "PIP_REQUIRE_VIRTUALENV" => "1"
    }
  end

  @doc "A path as an address."
  def url(path), do: "file://" <> URI.encode(path, &(&1 == ?/ or URI.char_unreserved?(&1)))

  defp wheel(folder, name, version, files) do
    info = "#{name}-#{version}.dist-info"

    files = [
      {"#{info}/METADATA", "Metadata-Version: 2.1\nName: #{name}\nVersion: #{version}\n"},
      {"#{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"},
      {"#{info}/RECORD", ""} | files
    ]

    path = Path.join(folder, "wheels/#{name}-#{version}-py3-none-any.whl")
    entries = for {file, text} <- files, do: {to_charlist(file), text}
    {:ok, _path} = :zip.create(to_charlist(path), entries)
  end
end
