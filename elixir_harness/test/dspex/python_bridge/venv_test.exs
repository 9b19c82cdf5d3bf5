defmodule DSPex.PythonBridge.VenvTest do
  @moduledoc "Real environments, by uv; with DSPy and in a real release in tests/install."

  # They set the environment of this BEAM.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Venv
  alias DSPex.Test.TinySource

  @moduletag :tmp_dir
  @without_uv "/usr/bin:/bin"

  setup %{tmp_dir: dir} do
    on_exit(fn -> File.rm_rf!(dir) end)
    source = TinySource.make(Path.join(dir, "so;ur[ce], and more"))
    for {name, value} <- TinySource.env(source), do: put_system_env(name, value)
    put_system_env("PYTHON_EXECUTABLE", python())
    put_system_env("PYTHONPATH", nil)
    put_system_env("PATH", "#{Path.dirname(python())}:#{@without_uv}")
    %{venv: Path.join(dir, "rel [1]/dspex_venv"), source: source}
  end

  # What it gives, and its progress lines.
  defp made(venv, source, opts \\ [], make \\ :make) do
    run = &apply(Venv, make, [venv, [source: source, progress: &1] ++ opts])
    assert {{:ok, python}, lines} = TinySource.progress(run)
    assert python == Path.join(venv, "bin/python3")
    lines
  end

  defp refusal(venv, source, opts \\ []) do
    assert {:error, text} = Venv.make(venv, [source: source] ++ opts)
    text
  end

  defp says(venv, args, opts \\ []) do
    {output, 0} = System.cmd(Path.join(venv, "bin/python3"), args, opts)
    String.trim(output)
  end

  defp version(venv, name), do: says(venv, ["-c", "import #{name}; print(#{name}.VERSION)"])
  defp peer(venv), do: says(venv, ["-m", "dspy_bridge"])

  @tag :slow
  test "without uv on the PATH pip installs the pinned one, and no other", context do
    %{venv: venv, source: source} = context
    put_system_env("PATH", @without_uv)
    assert ["installing uv with pip" <> _, "making " <> _ | _] = made(venv, source)
    refute File.exists?(Path.join(venv, ".uv"))
    assert {version(venv, "tiny"), peer(venv)} == {"1.0", "one"}

    File.rm_rf!(venv)
    TinySource.tamper(source, "uv", "0.0")
    assert refusal(venv, source) =~ "uv==0.0"
    refute File.exists?(venv)
  end

  test "it is made, and complete at once; then brought up to date, with its extras", context do
    %{venv: venv, source: source} = context
    all = "#{venv} has all that it needs"
    assert ["making " <> making, "installing the packages" <> _] = made(venv, source)
    assert making =~ "#{venv} with uv from #{python()}, Python 3."
    assert {version(venv, "tiny"), peer(venv)} == {"1.0", "one"}
    assert List.last(made(venv, source)) == all

    made(venv, source, with: ["optimizers"])
    assert version(venv, "tuner") == "1.0"
    TinySource.pin_optimizers(source, "2.0")
    TinySource.package(source, "two")
    TinySource.pin(source, "2.0")
    lines = made(venv, source)
    assert hd(lines) == "#{venv} keeps its optimizers" and all not in lines
    assert {version(venv, "tiny"), version(venv, "tuner"), peer(venv)} == {"2.0", "2.0", "two"}
    assert refusal(venv, source, with: ["optimisers"]) =~ "what may be added: litellm, optimizers"
  end

  test "a file with another hash is not installed", %{venv: venv, source: source} do
    made(venv, source)
    TinySource.pin(source, "2.0")
    TinySource.tamper(source, "tiny", "2.0")
    assert refusal(venv, source) =~ ~r{/uv failed \(exit status 1\):\n.*tiny==2\.0}s
    assert {version(venv, "tiny"), peer(venv)} == {"1.0", "one"}

    File.rm_rf!(venv)
    assert refusal(venv, source) =~ "tiny==2.0"
    refute File.exists?(venv)
  end

  test "nor is one without a hash, or that would have to be built", context do
    %{venv: venv, source: source} = context
    requirements = Path.join(source, "requirements.txt")
    File.write!(requirements, "tiny==1.0\n")
    assert refusal(venv, source) =~ "all requirements must have a hash"

    File.rm!(Path.join(source, "wheels/tiny-1.0-py3-none-any.whl"))
    sdist = Path.join(source, "wheels/tiny-1.0.tar.gz")
    ran = Path.join(source, "ran")
    files = [{~c"tiny-1.0/setup.py", "open('#{ran}', 'w')\n"}, {~c"tiny-1.0/PKG-INFO", "x"}]
    :ok = :erl_tar.create(to_charlist(sdist), files, [:compressed])
    hash = Base.encode16(:crypto.hash(:sha256, File.read!(sdist)), case: :lower)
    File.write!(requirements, "tiny==1.0 --hash=sha256:#{hash}\n")
    assert refusal(venv, source) =~ "tiny"
    refute File.exists?(ran) or File.exists?(venv)
  end

  test "one of ours whose Python is gone is made anew; what else is there stays", context do
    %{venv: venv, source: source} = context
    made(venv, source, with: ["optimizers"])
    File.rm!(Path.join(venv, "bin/python"))
    File.ln_s!("/no/such/python3.9", Path.join(venv, "bin/python"))
    File.write!(Path.join(venv, "thesis.txt"), "x")
    assert [_keeps, anew | _] = made(venv, source)
    assert anew == "making #{venv} anew: it is of another Python, or of none"
    assert version(venv, "tuner") == "1.0"
    assert File.exists?(Path.join(venv, "thesis.txt"))
  end

  test "one of ours of another Python than the one that is named is refused", context do
    %{venv: venv, source: source, tmp_dir: dir} = context
    made(venv, source)
    other = interpreter(dir, ~S(echo 'DSPEX {"version": "3.99.0", "found": {}}'))
    text = ~r/\A#{Regex.escape(venv)} is of Python 3\.\d+\.\d+, not 3\.99\.0: remove it, or name/
    assert refusal(venv, source, python: other) =~ text
    assert version(venv, "tiny") == "1.0"
  end

  test "a folder that it did not make stays as it is", %{venv: venv, source: source} do
    File.mkdir_p!(venv)
    file = Path.join(venv, "thesis.txt")
    File.write!(file, "x")
    assert refusal(venv, source) =~ "#{venv} is not empty, and was not made by dspex.setup"
    assert File.ls!(venv) == ["thesis.txt"]
    assert refusal(file, source) =~ "#{file} cannot be used: not a directory"
  end

  test "an interpreter that is missing or too old: one line, and nothing is left", context do
    %{venv: venv, source: source, tmp_dir: dir} = context

    assert refusal(venv, source, python: "/no/python") =~
             "--python names /no/python, which is not"

    put_system_env("PYTHON_EXECUTABLE", "/no/such/python")
    assert refusal(venv, source) =~ ~r/\Ano Python found: .*\z/
    old = interpreter(dir, ~S(echo 'DSPEX {"version": "3.8.1", "found": {}}'))
    text = refusal(venv, source, python: old)
    assert text =~ "Python too old: #{old} is 3.8.1, needed is 3.10 or newer; name another"
    refute File.exists?(venv)
  end

  describe "of a release" do
    defp base(expression) do
      {output, 0} = System.cmd(python(), ["-c", "import os, sys; print(#{expression})"])
      String.trim(output)
    end

    defp minor, do: base("'%d.%d' % sys.version_info[:2]")
    defp prefix, do: base("os.path.realpath(sys.base_prefix)")

    # Links stay links; the times of files are others, as some ways to copy a release give them.
    defp moved(venv, dir) do
      away = Path.join(dir, "mo;v'ed")
      File.cp_r!(venv, away)
      File.rm_rf!(Path.dirname(venv))
      away
    end

    defp files(folder),
      do: Enum.sort(:filelib.fold_files(to_charlist(folder), ~c".*", true, &[&1 | &2], []))

    # How the bytecode is checked: 1 is not at all, 3 by a hash of the source.
    defp flags(path) do
      <<_magic::4-bytes, flags, _rest::bytes>> = File.read!(path)
      flags
    end

    test "with a Python that stays, it may be moved", %{venv: first, source: source, tmp_dir: dir} do
      peer = Path.join(Path.dirname(first), "lib/dspex-0.1.0/priv/python/package/dspy_bridge")
      File.mkdir_p!(peer)
      File.write!(Path.join(peer, "a.py"), "")
      needs = List.last(made(first, source, [], :release))
      assert needs =~ ~r{\Ait needs the Python #{prefix()}/bin/python3\S*, 3\.\S+, at this}
      [compiled] = File.ls!(Path.join(peer, "__pycache__"))
      assert flags(Path.join([peer, "__pycache__", compiled])) == 3
      assert "#{first} has all that it needs" in made(first, source, [], :release)

      venv = moved(first, dir)
      before = files(venv)
      assert {version(venv, "tiny"), peer(venv)} == {"1.0", "one"}
      assert flags(says(venv, ["-c", "import tiny; print(tiny.__cached__)"])) == 1
      assert files(venv) == before
    end

    # An interpreter that was made to be moved, of the tests' own: a copy of its program, links to its library, and the mark.
    defp standalone(dir) do
      [bin, lib] = [Path.join(dir, "own/bin"), Path.join(dir, "own/lib/python#{minor()}")]
      for folder <- [bin, Path.join(lib, "site-packages")], do: File.mkdir_p!(folder)
      program = Path.join(bin, "python#{minor()}")
      File.cp!("#{prefix()}/bin/python#{minor()}", program)
      File.ln_s!(Path.basename(program), Path.join(bin, "python3"))
      File.ln_s!(Path.basename(program), Path.join(bin, "python"))
      File.write!(Path.join(bin, "pip"), "#!#{program}\n")
      library = base("os.path.dirname(os.__file__)")

      for name <- File.ls!(library) -- ~w(site-packages __pycache__ sitecustomize.py),
          do: File.ln_s!(Path.join(library, name), Path.join(lib, name))

      for "_sysconfigdata" <> _ = name <- File.ls!(library), Path.extname(name) == ".py" do
        mark = "\nbuild_time_vars['PYTHON_BUILD_STANDALONE'] = 1\n"
        text = File.read!(Path.join(library, name))
        File.rm!(Path.join(lib, name))
        File.write!(Path.join(lib, name), text <> mark)
      end

      # That of Debian has another name for it.
      File.write!(Path.join(lib, "sitecustomize.py"), """
      import os, site
      site.addsitedir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "site-packages"))
      """)

      program
    end

    test "with a Python that may be moved it has a copy", %{
      venv: venv,
      source: source,
      tmp_dir: dir
    } do
      made(venv, source, [], :release)
      program = standalone(dir)
      # It is another Python than the one before.
      lines = made(venv, source, [python: program], :release)
      assert hd(lines) =~ "making #{venv} anew: "
      assert List.last(lines) =~ ~r/\Ait has its own Python, #{minor()}\.\d+\z/
      names = ["python", "python#{minor()}", "python3"]
      assert Enum.sort(File.ls!("#{venv}/bin")) == Enum.sort(names)

      File.rm_rf!(Path.join(dir, "own"))
      venv = moved(venv, dir)
      code = "import sys, tiny; print(tiny.VERSION, sys.prefix)"
      assert says(venv, ["-c", code], env: [{"PATH", "/none"}]) == "1.0 " <> venv
    end
  end
end
