defmodule DSPex.PythonBridge.Venv.ReleaseTest do
  # Real environments, by uv; with DSPy and in a real release in tests/install.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Venv
  alias DSPex.Test.TinySource

  @moduletag :tmp_dir

  # One by uv, which has been moved since: those that only use it do so, or have a copy.
  setup_all do
    dir = Path.join(System.tmp_dir!(), "dspex_release_test_#{System.pid()}")
    on_exit(fn -> File.rm_rf!(dir) end)
    source = TinySource.make(Path.join(dir, "source"))
    first = Path.join(dir, "first [1]/dspex_venv")
    File.mkdir_p!(Path.dirname(first))
    before = System.get_env()
    System.put_env(env(source))
    {result, lines} = make(first, source)
    System.put_env(Map.merge(Map.new(env(source), fn {name, _value} -> {name, nil} end), before))
    %{first: first, made: moved(first, Path.join(dir, "mo;v'ed")), result: result, lines: lines}
  end

  setup %{tmp_dir: dir} do
    on_exit(fn -> File.rm_rf!(dir) end)
    source = TinySource.make(Path.join(dir, "source"))
    for {name, value} <- env(source), do: put_system_env(name, value)
    release = Path.join(dir, "rel [1]")
    File.mkdir_p!(release)
    %{release: release, venv: Path.join(release, "dspex_venv"), source: source}
  end

  defp env(source) do
    Map.merge(TinySource.env(source), %{
      "PYTHON_EXECUTABLE" => python(),
      "PYTHONPATH" => nil,
      "PATH" => "#{Path.dirname(python())}:/usr/bin:/bin"
    })
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

  defp moved(venv, away) do
    # With other times, as some ways to copy a release give them.
    File.mkdir_p!(Path.dirname(away))
    File.cp_r!(venv, away)
    File.rm_rf!(Path.dirname(venv))
    away
  end

  defp copy(made, venv) do
    File.cp_r!(made, venv)
    Path.join(venv, "bin/python3")
  end

  defp files(folder),
    do:
      Enum.sort(:filelib.fold_files(to_charlist(folder), ~c".*", true, &[to_string(&1) | &2], []))

  describe "of a Python that stays where it is" do
    test "it runs after it was moved, and writes nothing", %{
      first: first,
      result: result,
      lines: lines,
      made: venv
    } do
      assert result == {:ok, Path.join(first, "bin/python3")}

      assert List.last(lines) ==
               "it needs a Python #{minor()} where it runs: python#{minor()} on the PATH"

      refute File.exists?(first)
      before = files(venv)
      assert Enum.any?(before, &String.ends_with?(&1, ".pyc"))
      assert says(venv, "import tiny; print(tiny.VERSION)") == "1.0"
      {"one\n", 0} = System.cmd(Path.join(venv, "bin/python"), ["-m", "dspy_bridge"])
      # The bytecode that came with it is used.
      code = "import tiny, sys; sys.stdout.write(open(tiny.__cached__, 'rb').read()[4:5].hex())"
      assert says(venv, code) == "01"
      assert files(venv) == before
    end

    test "nothing in it has a path of where it was made", %{first: first, made: venv} do
      assert Enum.sort(File.ls!(Path.join(venv, "bin"))) == ["python", "python3"]
      refute File.exists?(Path.join(venv, "pyvenv.cfg"))
      assert File.read_link!(Path.join(venv, "bin/python")) == "python3"

      for file <- files(venv),
          Path.extname(file) != ".pyc" and Path.basename(file) != "direct_url.json",
          do: refute(File.read!(file) =~ first, file)
    end

    test "it is called by way of a link, from its own folder, and with a PYTHONPATH", %{
      made: venv,
      tmp_dir: dir
    } do
      python = Path.join(venv, "bin/python3")
      link = Path.join(dir, "link")
      File.ln_s!(python, link)
      code = "import tiny; print(tiny.VERSION)"
      assert {"1.0\n", 0} = System.cmd(link, ["-c", code])
      cd = [cd: Path.join(venv, "bin")]
      assert {"1.0\n", 0} = System.cmd("sh", ["-c", "./python3 -c '#{code}'"], cd)

      File.write!(Path.join(dir, "mine.py"), "")
      code = "import mine, tiny, sys, subprocess; print(tiny.VERSION)"
      assert says(venv, code, env: [{"PYTHONPATH", dir}]) == "1.0"
      # As does what it starts.
      code =
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import tiny; print(1)'])"

      assert says(venv, code) == "1"
    end

    test "that is elsewhere: the one on the PATH; with none, what to install", %{
      made: made,
      venv: venv,
      tmp_dir: dir
    } do
      python = copy(made, venv)
      File.write!(python, String.replace(File.read!(python), "'#{prefix()}/bin/", "'/no/such/"))
      bin = Path.join(dir, "bin")
      File.mkdir_p!(bin)
      text = "no python#{minor()} on the PATH, which the packages in #{venv} need: install it\n"
      opts = [env: [{"PATH", bin}], stderr_to_stdout: true]
      assert System.cmd(python, ["-c", ""], opts) == {text, 127}

      File.ln_s!("#{prefix()}/bin/python#{minor()}", Path.join(bin, "python#{minor()}"))
      assert says(venv, "import tiny; print(tiny.VERSION)", opts) == "1.0"
    end
  end

  describe "of a Python that was made to be moved" do
    # The tests' own: a copy of its program, links to its library, and the mark.
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

    test "it has a copy of it, and runs after it was moved without the first", %{
      venv: venv,
      source: source,
      tmp_dir: dir
    } do
      program = standalone(dir)
      {{:ok, python}, lines} = make(venv, source, python: program)
      assert python == Path.join(venv, "bin/python3")
      assert List.last(lines) =~ ~r/\Ait has its own Python, #{minor()}\.\d+\z/

      assert Enum.sort(File.ls!("#{venv}/bin")) ==
               ["python", "python#{minor()}", "python3"] |> Enum.sort()

      File.rm_rf!(Path.join(dir, "own"))
      venv = moved(venv, Path.join(dir, "mo;v'ed/dspex_venv"))

      code = "import sys, tiny; print(tiny.VERSION, sys.prefix)"
      assert says(venv, code, env: [{"PATH", "/none"}]) == "1.0 " <> venv
    end
  end

  describe "a second run" do
    test "does nothing; with other packages it makes it anew; both keep the optimizers", %{
      venv: venv,
      source: source
    } do
      {{:ok, python}, _lines} = make(venv, source, with: ["optimizers"])
      File.touch!(Path.join(venv, "lib/mark"))
      kept = "#{venv} keeps its optimizers"
      all = "#{venv} has all that it needs"
      assert {{:ok, ^python}, [^kept, ^all, "it needs" <> _]} = make(venv, source)
      assert File.exists?(Path.join(venv, "lib/mark"))

      TinySource.pin(source, "2.0")
      {{:ok, ^python}, [^kept, "making " <> _ | _]} = make(venv, source)
      assert says(venv, "import tiny, tuner; print(tiny.VERSION, tuner.VERSION)") == "2.0 1.0"
      refute File.exists?(Path.join(venv, "lib/mark"))
    end

    test "of a damaged one says so", %{made: made, venv: venv, source: source} do
      python = copy(made, venv)

      for path <- Path.wildcard("#{Path.dirname(source)}/*/dspex_venv/lib/*/site-packages/tiny*"),
          do: File.rm_rf!(path)

      assert {{:error, text}, _lines} = make(venv, source)

      assert text ==
               "#{python} does not find all packages of #{venv}: remove it and run this again"
    end

    test "keeps what it did not make", %{made: made, venv: venv, source: source} do
      copy(made, venv)
      File.write!(Path.join(venv, "thesis.txt"), "x")
      TinySource.pin(source, "2.0")
      {{:error, text}, _lines} = make(venv, source)
      assert text =~ "#{venv} has to be made anew, since it is out of date, but holds what"
      assert File.exists?(Path.join(venv, "thesis.txt"))

      File.rm_rf!(venv)
      File.mkdir_p!(venv)
      File.write!(Path.join(venv, "thesis.txt"), "x")
      assert {{:error, text}, _lines} = make(venv, source)
      assert text =~ "#{venv} is not empty, and was not made by dspex.setup"
    end
  end

  test "one that cannot be completed is removed", %{venv: venv, source: source, release: release} do
    TinySource.tamper(source, "tiny", "1.0")
    {{:error, text}, _lines} = make(venv, source)
    assert text =~ "The package index gave another file for tiny==1.0"
    assert File.ls!(release) == []
  end

  test "the peer in the release is compiled, for files of any time", %{
    made: made,
    release: release,
    venv: venv,
    source: source
  } do
    copy(made, venv)
    peer = Path.join(release, "lib/dspex-0.1.0/priv/python/package/dspy_bridge")
    File.mkdir_p!(peer)
    File.write!(Path.join(peer, "a.py"), "")
    {{:ok, _python}, _lines} = make(venv, source)
    assert [pyc] = File.ls!(Path.join(peer, "__pycache__"))
    # Hash-based, and checked.
    assert <<_magic::4-bytes, 3, _rest::bytes>> =
             File.read!(Path.join([peer, "__pycache__", pyc]))
  end
end
