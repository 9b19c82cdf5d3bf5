defmodule DSPex.PythonBridge.Venv.VenvTest do
  # Real environments, by uv; where uv has to fail or wait it is a script.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{OS, Venv}
  alias DSPex.Test.TinySource

  @moduletag :tmp_dir
  @without_uv "/usr/bin:/bin"

  setup %{tmp_dir: dir} do
    on_exit(fn -> File.rm_rf!(dir) end)
    source = TinySource.make(Path.join(dir, "so;ur[ce], and more"))
    for {name, value} <- TinySource.env(source), do: put_system_env(name, value)
    put_system_env("PYTHON_EXECUTABLE", python())
    put_system_env("PATH", "#{Path.dirname(python())}:#{@without_uv}")
    %{venv: Path.join(dir, "venv"), source: source, bin: Path.join(dir, "bin")}
  end

  # What it gives, and its progress lines.
  defp make(venv, source, opts \\ []),
    do: TinySource.progress(&Venv.make(venv, [source: source, progress: &1] ++ opts))

  defp made(venv, source, opts \\ []) do
    assert {{:ok, _python}, lines} = make(venv, source, opts)
    lines
  end

  defp refusal(venv, source, opts \\ []) do
    {{:error, text}, _lines} = make(venv, source, opts)
    text
  end

  defp says(venv, args) do
    {output, 0} = System.cmd(Path.join(venv, "bin/python"), args)
    String.trim(output)
  end

  defp tiny(venv), do: says(venv, ["-c", "import tiny; print(tiny.VERSION)"])
  defp tuner(venv), do: says(venv, ["-c", "import tuner; print(tuner.VERSION)"])
  defp peer(venv), do: says(venv, ["-m", "dspy_bridge"])

  # A program that is a shell script, before all others of its name.
  defp program(bin, name, script) do
    File.mkdir_p!(bin)
    path = Path.join(bin, name)
    File.write!(path, "#!/bin/sh\n" <> script)
    File.chmod!(path, 0o755)
    put_system_env("PATH", "#{bin}:#{System.get_env("PATH")}")
    path
  end

  @tag :slow
  test "without uv on the PATH pip installs the pinned one, and no other", %{
    venv: venv,
    source: source
  } do
    put_system_env("PATH", @without_uv)
    assert ["installing uv with pip" <> _, "making " <> _ | _] = made(venv, source)
    assert {tiny(venv), peer(venv)} == {"1.0", "one"}

    File.rm_rf!(venv)
    TinySource.tamper(source, "uv", "0.0")
    assert refusal(venv, source) =~ "The package index gave another file for uv==0.0"
    refute File.exists?(venv)
  end

  test "it is made, and complete at once; then brought up to date, and repaired", %{
    venv: venv,
    source: source
  } do
    all = "#{venv} has all that it needs"
    python = Path.join(venv, "bin/python3")
    assert {{:ok, ^python}, lines} = make(Path.relative_to_cwd(venv), source)
    assert ["making " <> making, "installing the packages with uv" <> _] = lines
    assert making =~ "#{venv} with uv from #{python()}, Python 3."
    assert {tiny(venv), peer(venv)} == {"1.0", "one"}
    assert List.last(made(venv, source)) == all

    # The version of the package stays: its files are compared.
    TinySource.package(source, "two")
    TinySource.pin(source, "2.0")
    refute all in made(venv, source)
    assert {tiny(venv), peer(venv)} == {"2.0", "two"}

    # Somebody has removed it by hand.
    for path <- Path.wildcard("#{venv}/lib/*/site-packages/tiny*"), do: File.rm_rf!(path)
    refute all in made(venv, source)
    assert tiny(venv) == "2.0"
  end

  test "optimizers are added, and kept by a run that does not ask for them", %{
    venv: venv,
    source: source
  } do
    assert refusal(venv, source, with: ["optimizers", "optimisers"]) ==
             "--with optimisers is not known; what may be added: optimizers"

    refute File.exists?(venv)
    made(venv, source)
    made(venv, source, with: ["optimizers"])
    assert {tiny(venv), tuner(venv)} == {"1.0", "1.0"}

    TinySource.pin_optimizers(source, "2.0")
    assert hd(made(venv, source)) == "#{venv} keeps its optimizers"
    assert tuner(venv) == "2.0"
  end

  describe "a package that is not the pinned one" do
    test "is not installed: a new environment is removed, one that was there stays", %{
      venv: venv,
      source: source
    } do
      unpinned = "The package index gave another file for tiny==2.0 than the one that is pinned"
      made(venv, source)
      TinySource.pin(source, "2.0")
      TinySource.tamper(source, "tiny", "2.0")
      text = refusal(venv, source)
      assert text =~ "/uv failed (exit status 1):\n  " and text =~ unpinned
      assert {tiny(venv), peer(venv)} == {"1.0", "one"}

      File.rm_rf!(venv)
      assert refusal(venv, source) =~ unpinned
      refute File.exists?(venv)
    end

    test "nor is one without a hash, or that would have to be built", %{
      venv: venv,
      source: source
    } do
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
  end

  describe "one of ours" do
    test "that is half made, or whose Python is gone, is made anew, with its extras", %{
      venv: venv,
      source: source
    } do
      made(venv, source, with: ["optimizers"])
      manifest = Path.join(venv, "dspex_setup.json")
      whole = File.read!(manifest)
      File.write!(manifest, String.replace(whole, ~s("complete":true), ~s("complete":false)))
      File.write!(Path.join(venv, "lib/half"), "x")
      assert [kept, anew | _making] = made(venv, source)

      assert {kept, anew} ==
               {"#{venv} keeps its optimizers", "making #{venv} anew: it is half made"}

      refute File.exists?(Path.join(venv, "lib/half"))
      assert tuner(venv) == "1.0"

      File.rm!(Path.join(venv, "bin/python"))
      File.ln_s!("/no/such/python3.9", Path.join(venv, "bin/python"))
      File.write!(Path.join(venv, "thesis.txt"), "x")

      assert refusal(venv, source) ==
               "#{venv} has to be made anew, since its Python, /no/such/python3.9, is gone, but holds what dspex.setup " <>
                 "did not make (thesis.txt): remove it yourself, or name another with --path"

      File.rm!(Path.join(venv, "thesis.txt"))
      assert [_kept, anew | _making] = made(venv, source)
      assert anew == "making #{venv} anew: its Python, /no/such/python3.9, is gone"
    end

    test "that has lost its pyvenv.cfg: nothing goes into the Python that it was made of", %{
      venv: venv,
      source: source
    } do
      made(venv, source)
      File.rm!(Path.join(venv, "pyvenv.cfg"))
      TinySource.pin(source, "2.0")
      assert refusal(venv, source) =~ "#{venv} is not a virtual environment any more: remove it"
      assert File.exists?(Path.join(venv, "bin/python"))
    end

    test "of another Python than the one that is named is refused", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      made(venv, source)
      program(bin, "python3.99", ~S(echo 'DSPEX {"version": "3.99.0", "found": {}}'))
      text = refusal(venv, source, python: "python3.99")
      assert text =~ ~r/\A#{venv} is of Python 3\.\d+\.\d+, not 3\.99\.0: remove it, or name/
      assert tiny(venv) == "1.0"
    end
  end

  test "two at one folder do not run at once; one that was killed leaves it free", %{
    venv: venv,
    source: source
  } do
    lock = Path.join(venv, ".dspex_setup.lock")
    sleeper = Port.open({:spawn_executable, "/bin/sleep"}, args: ["600"])
    {:os_pid, os_pid} = Port.info(sleeper, :os_pid)
    File.mkdir_p!(venv)
    File.ln_s!("#{os_pid} #{OS.Process.start_time(os_pid)}", lock)

    assert refusal(venv, source) ==
             "another dspex.setup (process #{os_pid}) is working on #{venv}"

    assert File.ls!(venv) == [".dspex_setup.lock"]

    # Its number is another's by now.
    File.rm!(lock)
    File.ln_s!("#{os_pid} 1", lock)
    made(venv, source)
    assert {:error, :enoent} = File.read_link(lock)
    kill(os_pid)
  end

  test "what dspex.setup did not make stays as it is", %{venv: venv, source: source} do
    File.mkdir_p!(venv)
    File.write!(Path.join(venv, "thesis.txt"), "x")

    assert refusal(venv, source) ==
             "#{venv} is not empty, and was not made by dspex.setup; it stays as it is: name another with --path"

    assert File.ls!(venv) == ["thesis.txt"]
    file = Path.join(venv, "thesis.txt")
    assert refusal(file, source) =~ "#{file} is not a folder"
    assert refusal(Path.join(file, "below"), source) =~ "#{file}/below is not a folder"
    File.write!(Path.join(venv, "dspex_setup.json"), "{}")
    assert refusal(venv, source) =~ "#{venv}/dspex_setup.json is not what dspex.setup wrote"
  end

  test "an interpreter that is missing or too old: one line, and nothing is left", %{
    venv: venv,
    source: source,
    bin: bin
  } do
    assert refusal(venv, source, python: "/no/python") =~
             "--python names /no/python, which is not"

    File.mkdir_p!(venv)
    put_system_env("PYTHON_EXECUTABLE", "/no/such/python")
    assert refusal(venv, source) =~ ~r/\Ano Python found: .*\z/
    assert File.ls!(venv) == []

    old = program(bin, "python3.8", ~S(echo 'DSPEX {"version": "3.8.1", "found": {}}'))
    text = refusal(venv, source, python: "python3.8")
    assert text =~ "Python too old: #{old} is 3.8.1, needed is 3.10 or newer; name another"

    put_system_env("PYTHON_EXECUTABLE", nil)
    put_system_env("PATH", Path.join(bin, "none"))
    assert refusal(venv, source) =~ "install Python 3.10 or newer, or uv, which brings one"
    assert File.ls!(venv) == []
  end

  test "a uv that fails: the end of its output, without secrets", %{
    venv: venv,
    source: source,
    bin: bin
  } do
    put_system_env("UV_INDEX_PASSWORD", "another-s3cr3t")
    says = "seq 1 40; echo https://joe:s3c@r3t@host/simple and $UV_INDEX_PASSWORD >&2; exit 2"
    program(bin, "uv", says)
    text = refusal(venv, source)
    assert text =~ "#{bin}/uv failed (exit status 2):\n  27\n"
    assert String.ends_with?(text, "\n  https://[redacted]@host/simple and [redacted]")
  end

  test "a dependency that was not compiled: what to do", %{venv: venv, source: source} do
    File.rm_rf!(Path.join(source, "package"))
    assert refusal(venv, source) =~ "#{source} lacks package/dspy_bridge: compile"
  end
end
