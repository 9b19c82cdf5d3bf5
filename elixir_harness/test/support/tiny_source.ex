defmodule DSPex.Test.TinySource do
  @moduledoc """
  What `DSPex.PythonBridge.Venv` installs, in small: one distribution, `tiny`, with its hashes, another, `tuner`, for optimizers,
  and a package `dspy-bridge`. With
  the settings of `env/1` uv takes both from the folder, without a network, and pip takes `uv` from there: a script that runs
  the one of the tests' Python.
  """

  # Of each file in a wheel: the same wheel has the same hash.
  @time {{2025, 1, 1}, {0, 0, 0}}
  @stat %File.Stat{
    type: :regular,
    access: :read,
    mode: 0o100644,
    atime: @time,
    mtime: @time,
    ctime: @time,
    uid: 0,
    gid: 0
  }

  @doc "Makes it in `folder`, with `tiny` pinned to `version`."
  def make(folder, version \\ "1.0") do
    File.mkdir_p!(Path.join(folder, "wheels"))

    for name <- ["tiny", "tuner"],
        v <- ["1.0", "2.0"],
        do: wheel(folder, name, v, [{"#{name}.py", of_its_size("VERSION = '#{v}'\n")}])

    uv = Path.join(Path.dirname(DSPex.Test.Helpers.python()), "uv")

    wheel(folder, "uv", "0.0", [
      {"uv.py", "import os, sys\ndef main(): os.execv('#{uv}', ['uv'] + sys.argv[1:])\n"},
      {"uv-0.0.dist-info/entry_points.txt", "[console_scripts]\nuv = uv:main\n"}
    ])

    File.write!(Path.join(folder, "uv.txt"), pinned(folder, "uv", "0.0"))
    pin(folder, version)
    pin_optimizers(folder, "1.0")
    package(folder, "one")
    folder
  end

  @doc "Pins `tiny`. Of a version that there is no wheel of, the hash is made up."
  def pin(folder, version) do
    File.write!(Path.join(folder, "requirements.txt"), """
    # What is pinned for another system is not looked for here.
    elsewhere==1.0 ; sys_platform == 'no_such_system' \\
        --hash=sha256:#{String.duplicate("0", 64)}
    #{pinned(folder, "tiny", version)}
    """)
  end

  @doc "Pins `tuner`, which is for optimizers."
  def pin_optimizers(folder, version),
    do: File.write!(Path.join(folder, "optimizers.txt"), pinned(folder, "tuner", version))

  defp pinned(folder, name, version) do
    hash =
      case File.read(path(folder, name, version)) do
        {:ok, wheel} -> Base.encode16(:crypto.hash(:sha256, wheel), case: :lower)
        {:error, :enoent} -> String.duplicate("0", 64)
      end

    "#{name}==#{version} \\\n    --hash=sha256:#{hash}"
  end

  defp path(folder, name, version),
    do: Path.join(folder, "wheels/#{name}-#{version}-py3-none-any.whl")

  @doc "Changes a wheel after it was pinned, as somebody does who has taken over an index."
  def tamper(folder, name, version),
    do: wheel(folder, name, version, [{"#{name}.py", "VERSION = 'evil'\n"}])

  @doc "The package, whose program prints `says`."
  def package(folder, says) do
    package = Path.join(folder, "package")
    File.mkdir_p!(Path.join(package, "dspy_bridge"))
    File.write!(Path.join(package, "dspy_bridge/__init__.py"), ~s(__version__ = "0.1"\n))

    File.write!(
      Path.join(package, "dspy_bridge/__main__.py"),
      of_its_size("print(#{inspect(says)})\n")
    )
  end

  # Python takes bytecode for that of a file if the second and the size are the same: two versions may be installed in one.
  defp of_its_size(code), do: code <> String.duplicate("#", :erlang.phash2(code, 1_000)) <> "\n"

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

  @doc "What a set-up returns that reports its progress by `make`'s argument, and the lines that it has reported."
  def progress(make) do
    me = self()
    tag = make_ref()
    result = make.(&send(me, {tag, &1}))
    {result, lines(tag)}
  end

  defp lines(tag) do
    receive do
      {^tag, line} -> [line | lines(tag)]
    after
      0 -> []
    end
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

    path = path(folder, name, version)
    stat = &File.Stat.to_record(%{@stat | size: byte_size(&1)})
    entries = for {file, text} <- files, do: {to_charlist(file), text, stat.(text)}
    {:ok, _path} = :zip.create(to_charlist(path), entries)
  end
end
