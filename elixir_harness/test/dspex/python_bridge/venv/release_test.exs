defmodule DSPex.PythonBridge.Venv.ReleaseTest do
  # Real environments, by uv; with DSPy and in a real release in tests/install.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Venv
  alias DSPex.Test.TinySource

  @moduletag :tmp_dir

  setup %{tmp_dir: dir} do
    on_exit(fn -> File.rm_rf!(dir) end)
    source = TinySource.make(Path.join(dir, "source"))
    for {name, value} <- TinySource.env(source), do: put_system_env(name, value)
    put_system_env("PYTHON_EXECUTABLE", python())
    put_system_env("PYTHONPATH", nil)
    put_system_env("PATH", "#{Path.dirname(python())}:/usr/bin:/bin")
    release = Path.join(dir, "rel [1]")
    peer = Path.join(release, "lib/dspex-0.1.0/priv/python/package/dspy_bridge")
    File.mkdir_p!(peer)
    File.write!(Path.join(peer, "a.py"), "")
    %{venv: Path.join(release, "dspex_venv"), source: source, peer: peer}
  end

  defp make(venv, source, opts \\ []),
    do: TinySource.progress(&Venv.release(venv, [source: source, progress: &1] ++ opts))

  defp says(venv, code, opts \\ []) do
    {output, 0} = System.cmd(Path.join(venv, "bin/python3"), ["-c", code], opts)
    String.trim(output)
  end

  defp minor, do: base("'%d.%d' % sys.version_info[:2]")
  defp prefix, do: base("os.path.realpath(sys.base_prefix)")

  defp base(expression) do
    {output, 0} = System.cmd(python(), ["-c", "import os, sys; print(#{expression})"])
    String.trim(output)
  end

  # Links stay links; the times of files are others, as some ways to copy a release give them.
  defp moved(venv, away) do
    File.mkdir_p!(Path.dirname(away))
    File.cp_r!(venv, away)
    File.rm_rf!(Path.dirname(venv))
    away
  end

  defp files(folder),
    do:
      Enum.sort(:filelib.fold_files(to_charlist(folder), ~c".*", true, &[to_string(&1) | &2], []))

  # How the bytecode is checked: 1 is not at all, 3 by a hash of the source.
  defp flags(path) do
    <<_magic::4-bytes, flags, _rest::bytes>> = File.read!(path)
    flags
  end

  test "of a Python that stays where it is: it runs after it was moved, and writes nothing", %{
    venv: first,
    source: source,
    peer: peer,
    tmp_dir: dir
  } do
    assert {{:ok, python}, lines} = make(first, source)
    assert python == Path.join(first, "bin/python3")

    assert List.last(lines) =~
             ~r{\Ait needs the Python #{prefix()}/bin/python3\S*, 3\.\S+, at this}

    [compiled] = File.ls!(Path.join(peer, "__pycache__"))
    assert flags(Path.join([peer, "__pycache__", compiled])) == 3

    venv = moved(first, Path.join(dir, "mo;v'ed"))
    before = files(venv)
    assert says(venv, "import tiny; print(tiny.VERSION)") == "1.0"
    assert {"one\n", 0} = System.cmd(Path.join(venv, "bin/python"), ["-m", "dspy_bridge"])
    assert flags(says(venv, "import tiny; print(tiny.__cached__)")) == 1
    assert files(venv) == before

    for file <- files(Path.join(venv, "bin")),
        not (Path.basename(file) =~ ~r/^(python|activate)/),
        do: refute(File.read!(file) =~ first, file)
  end

  # An interpreter that was made to be moved, of the tests' own: a copy of its program, links to its library, and the mark.
  defp standalone(dir) do
    [bin, lib] = [Path.join(dir, "own/bin"), Path.join(dir, "own/lib/python#{minor()}")]
    for folder <- [bin, Path.join(lib, "site-packages")], do: File.mkdir_p!(folder)
    program = Path.join(bin, "python#{minor()}")
    File.cp!("#{prefix()}/bin/python#{minor()}", program)

    for name <- ["python3", "python"],
        do: File.ln_s!(Path.basename(program), Path.join(bin, name))

    File.write!(Path.join(bin, "pip"), "#!#{program}\n")
    library = base("os.path.dirname(os.__file__)")

    for name <- File.ls!(library) -- ~w(site-packages __pycache__ sitecustomize.py) do
      path = Path.join(library, name)

      if name =~ ~r/^_sysconfigdata.*\.py$/,
        do:
          File.write!(
            Path.join(lib, name),
            File.read!(path) <> "\nbuild_time_vars['PYTHON_BUILD_STANDALONE'] = 1\n"
          ),
        else: File.ln_s!(path, Path.join(lib, name))
    end

    # That of Debian has another name for it.
    File.write!(Path.join(lib, "sitecustomize.py"), """
    import os, site
    site.addsitedir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "site-packages"))
    """)

    program
  end

  test "of a Python that was made to be moved: it has a copy, and runs without the first", %{
    venv: venv,
    source: source,
    tmp_dir: dir
  } do
    program = standalone(dir)
    {{:ok, python}, lines} = make(venv, source, python: program)
    assert python == Path.join(venv, "bin/python3")
    assert List.last(lines) =~ ~r/\Ait has its own Python, #{minor()}\.\d+\z/

    assert Enum.sort(File.ls!("#{venv}/bin")) ==
             Enum.sort(["python", "python#{minor()}", "python3"])

    File.rm_rf!(Path.join(dir, "own"))
    venv = moved(venv, Path.join(dir, "mo;v'ed/dspex_venv"))
    code = "import sys, tiny; print(tiny.VERSION, sys.prefix)"
    assert says(venv, code, env: [{"PATH", "/none"}]) == "1.0 " <> venv
  end

  test "a second run does what is left to do, and makes it anew for another Python", %{
    venv: venv,
    source: source,
    tmp_dir: dir
  } do
    {{:ok, python}, _lines} = make(venv, source, with: ["optimizers"])
    File.touch!(Path.join(venv, "lib/mark"))
    {{:ok, ^python}, lines} = make(venv, source)
    assert "#{venv} keeps its optimizers" in lines and "#{venv} has all that it needs" in lines

    TinySource.pin(source, "2.0")
    {{:ok, ^python}, _lines} = make(venv, source)
    assert says(venv, "import tiny, tuner; print(tiny.VERSION, tuner.VERSION)") == "2.0 1.0"
    assert File.exists?(Path.join(venv, "lib/mark"))

    {{:ok, ^python}, [_kept, anew | _]} = make(venv, source, python: standalone(dir))
    assert anew == "making #{venv} anew: it is of another Python"
    refute File.exists?(Path.join(venv, "lib/mark"))

    TinySource.tamper(source, "tiny", "2.0")
    File.rm_rf!(venv)
    {{:error, text}, _lines} = make(venv, source)
    assert text =~ "The package index gave another file for tiny==2.0"
    refute File.exists?(venv)
  end
end
