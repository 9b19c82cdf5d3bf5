defmodule DSPex.PythonBridge.Venv.VenvTest do
  # Real environments, by the interpreter's own venv, pip and uv; elsewhere uv is a script, which logs its arguments, and
  # makes environments whose interpreter is a script, too.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{OS, Venv}
  alias DSPex.PythonBridge.Venv.{Installer, Lock, Source}
  alias DSPex.Test.TinySource

  @moduletag :tmp_dir

  # One by pip takes a second to make: those that only use it have a copy.
  setup_all do
    dir = Path.join(System.tmp_dir!(), "dspex_venv_test_#{System.pid()}")
    on_exit(fn -> File.rm_rf!(dir) end)
    source = TinySource.make(Path.join(dir, "source"))
    venv = Path.join(dir, "venv")
    before = System.get_env()
    System.put_env(Map.merge(TinySource.env(source), %{"PATH" => "/usr/bin:/bin"}))
    python = with_pip(dir)
    made = make(venv, source, python: python)
    System.put_env(Map.merge(Map.new(TinySource.env(source), fn {k, _} -> {k, nil} end), before))

    {version, 0} =
      System.cmd(python(), ["-c", "import platform; print(platform.python_version())"])

    %{by_pip: {venv, source, made}, with_pip: python, version: String.trim(version)}
  end

  setup %{tmp_dir: dir, version: version} do
    on_exit(fn -> File.rm_rf!(dir) end)
    Process.put(:version, version)
    source = TinySource.make(Path.join(dir, "so;ur[ce], and more"))
    for {name, value} <- TinySource.env(source), do: put_system_env(name, value)
    put_system_env("PYTHON_EXECUTABLE", python())
    # The programs of the system, without a uv.
    put_system_env("PATH", "/usr/bin:/bin")
    %{venv: Path.join(dir, "venv"), source: source, bin: Path.join(dir, "bin")}
  end

  # What it gives, and its progress lines.
  defp make(venv, source, opts \\ []),
    do: TinySource.progress(&Venv.make(venv, [source: source, progress: &1] ++ opts))

  defp refusal(venv, source, opts \\ []) do
    {{:error, text}, _lines} = make(venv, source, opts)
    text
  end

  defp python_says(venv, args) do
    {output, 0} = System.cmd(Path.join(venv, "bin/python"), args)
    String.trim(output)
  end

  defp tiny(venv), do: python_says(venv, ["-c", "import tiny; print(tiny.VERSION)"])
  defp tuner(venv), do: python_says(venv, ["-c", "import tuner; print(tuner.VERSION)"])
  defp peer(venv), do: python_says(venv, ["-m", "dspy_bridge"])

  # A program that is a shell script, before all others of its name.
  defp program(bin, name, script) do
    File.mkdir_p!(bin)
    path = Path.join(bin, name)
    File.write!(path, "#!/bin/sh\n" <> script)
    File.chmod!(path, 0o755)
    put_system_env("PATH", "#{bin}:/usr/bin:/bin")
    path
  end

  defp number(file) do
    eventually(fn ->
      with {:ok, line} <- File.read(file),
           [os_pid, ""] <- String.split(line, "\n"),
           do: os_pid,
           else: (_not_yet -> nil)
    end)
  end

  # What was made by pip, in another place.
  defp copy({venv, source, _made}, dir) do
    File.cp_r!(source, Path.join(dir, "source"))
    {_, 0} = System.cmd("cp", ["-R", venv, Path.join(dir, "copy")])
    {Path.join(dir, "copy"), Path.join(dir, "source")}
  end

  # One of ours whose files by uv are marked by `file`.
  defp by_uv(venv, source, bin, file, interpreter \\ :reports) do
    uv(bin, source, "", interpreter)
    {{:ok, python}, _lines} = make(venv, source)
    File.write!(Path.join(venv, file), "x")
    python
  end

  defp killed_at(file, work) do
    killed = spawn(work)
    os_pid = number(file)
    Process.exit(killed, :kill)
    eventually(fn -> not alive?(os_pid) end)
  end

  # An interpreter that makes environments with its own pip: to unpack the one of Python's library takes it seconds.
  defp with_pip(dir) do
    code = "import os, pip; print(os.path.dirname(pip.__file__))"
    {pip, 0} = System.cmd(python(), ["-c", code])
    alone = Path.join(dir, "pip")
    File.mkdir_p!(alone)
    File.ln_s!(String.trim(pip), Path.join(alone, "pip"))

    interpreter(dir, """
    [ "$1 $2" = "-m venv" ] || exec #{python()} "$@"
    #{python()} -m venv --without-pip "$3"
    echo #{alone} > $(echo "$3"/lib/*/site-packages)/pip.pth
    """)
  end

  defp installs(bin), do: length(Regex.scan(~r/^pip install/m, File.read!("#{bin}/log")))

  # It makes environments, without pip; the rest is the script's. The interpreter in them only reports its version and
  # folder, unless the test needs a real one.
  defp uv(bin, source, script, interpreter \\ :reports) do
    program(bin, "uv", """
    echo "$@" >> #{bin}/log
    if [ "$1" = venv ]; then
      for folder; do :; done
      #{if interpreter == :real, do: ~s(#{python()} -m venv --without-pip "$folder"), else: made_of(reports(bin))}
      exit
    fi
    #{script}
    """)

    source
  end

  defp made_of(python) do
    ~s(mkdir -p "$folder/bin" "$folder/lib" && touch "$folder/pyvenv.cfg" && rm -f "$folder"/bin/python*\n) <>
      ~s(cp #{python} "$folder/bin/python" && ln -s python "$folder/bin/python3")
  end

  defp reports(bin) do
    answer = ~s(DSPEX {"version": "%s", "prefix": "%s", "found": {}}\\n)

    program(bin, "reports", """
    cd "$(dirname "$0")/.." && printf '#{answer}' #{Process.get(:version)} "$(pwd -P)"
    """)
  end

  describe "without uv on the PATH" do
    @tag :slow
    test "it is made by the venv and the pip of the library of Python", %{
      venv: venv,
      source: source
    } do
      assert {{:ok, _python}, lines} = make(venv, source, python: python())
      assert Enum.any?(lines, &(&1 == "installing uv with pip"))
      assert {tiny(venv), peer(venv)} == {"1.0", "one"}
    end

    test "it is made, and complete at once", %{
      by_pip: {venv, source, {result, lines}},
      with_pip: python
    } do
      assert result == {:ok, Path.join(venv, "bin/python3")}
      assert [making, uv, installing, peer] = Enum.reject(lines, &(&1 =~ "still at it"))
      assert making =~ "making #{venv} from #{python}, Python 3."
      assert uv == "installing uv with pip"
      assert installing =~ "installing 2 packages with uv"
      assert peer =~ "dspy_bridge"
      assert {tiny(venv), peer(venv)} == {"1.0", "one"}

      assert {{:ok, _python}, [line]} = make(venv, source)
      assert line == "#{venv} has all that it needs"
    end

    test "it is updated: pins, the peer under the same version, missing packages",
         %{by_pip: by_pip, tmp_dir: dir} do
      {venv, source} = copy(by_pip, dir)
      # The version of the package stays: its files are compared.
      {:ok, %{stamp: stamp}} = Source.read(source, [])
      TinySource.package(source, "two")
      {:ok, %{stamp: another}} = Source.read(source, [])
      assert another != stamp

      TinySource.pin(source, "2.0")

      assert {{:ok, _python}, ["installing 2" <> _, "installing the peer" <> _]} =
               make(venv, source)

      assert {tiny(venv), peer(venv)} == {"2.0", "two"}

      # Somebody has removed it by hand.
      for path <- Path.wildcard("#{venv}/lib/*/site-packages/tiny*"), do: File.rm_rf!(path)
      assert {{:ok, _python}, ["installing" <> _ | _]} = make(venv, source)
      assert tiny(venv) == "2.0"
    end

    @tag :slow
    test "pip cannot install it: nothing is left", %{
      with_pip: python,
      venv: venv,
      source: source
    } do
      for uv <- Path.wildcard("#{Path.dirname(source)}/*/wheels/uv*"), do: File.rm!(uv)
      text = refusal(venv, source, python: python)
      assert text =~ "#{venv}/bin/python3 failed (exit status 1):\n  "
      assert text =~ "No matching distribution found for uv"
      refute File.exists?(venv)
    end

    test "nor a uv that is not the pinned one: its code does not run, and nothing is left", %{
      with_pip: python,
      venv: venv,
      source: source
    } do
      TinySource.tamper(source, "uv", "0.0")
      text = refusal(venv, source, python: python)
      assert text =~ "The package index gave another file for uv==0.0 than the one that is pinned"
      refute File.exists?(venv)
    end

    test "nor in an environment that one on the PATH has made: what to do", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      by_uv(venv, source, bin, "lib/old")
      TinySource.pin(source, "2.0")
      File.rm!(Path.join(bin, "uv"))
      assert refusal(venv, source) =~ "there is no uv, neither on the PATH nor in #{venv}"
      assert File.exists?(Path.join(venv, "lib/old"))
    end

    test "when uv fails: what was there stays as it was", %{by_pip: by_pip, tmp_dir: dir} do
      {venv, source} = copy(by_pip, dir)
      TinySource.pin(source, "3.0")
      text = refusal(venv, source)
      assert text =~ "#{venv}/bin/uv failed (exit status 1):\n  "
      assert text =~ "tiny==3.0"
      assert tiny(venv) == "1.0"

      TinySource.pin(source, "1.0")
      assert {{:ok, _python}, [_has_all]} = make(venv, source)
    end
  end

  describe "optimizers" do
    test "are added, kept by a run that does not ask for them, updated and repaired", %{
      by_pip: by_pip,
      tmp_dir: dir
    } do
      {venv, source} = copy(by_pip, dir)
      # As a setup wrote it that knew of no extras.
      file = Path.join(venv, "dspex_setup.json")
      %{"made" => true, "installed" => stamp} = JSON.decode!(File.read!(file))
      File.write!(file, JSON.encode!(%{made: true, installed: stamp}))
      all = "#{venv} has all that it needs"
      assert {{:ok, _python}, [^all]} = make(venv, source)

      # What cannot be installed is not remembered.
      wrong = "tuner==1.0 --hash=sha256:#{String.duplicate("0", 64)}"
      File.write!(Path.join(source, "optimizers.txt"), wrong)

      assert refusal(venv, source, with: ["optimizers"]) =~
               "The package index gave another file for tuner==1.0 than the one that is pinned"

      assert {{:ok, _python}, [^all]} = make(venv, source)

      TinySource.pin_optimizers(source, "1.0")

      assert {{:ok, _python}, ["installing 3" <> _, "installing the peer" <> _]} =
               make(venv, source, with: ["optimizers"])

      assert {tiny(venv), tuner(venv)} == {"1.0", "1.0"}
      kept = "#{venv} keeps its optimizers"
      assert {{:ok, _python}, [^kept, ^all]} = make(venv, source)
      assert {{:ok, _python}, [^all]} = make(venv, source, with: ["optimizers"])

      TinySource.pin_optimizers(source, "2.0")
      assert {{:ok, _python}, [^kept, "installing 3" <> _, _peer]} = make(venv, source)
      assert tuner(venv) == "2.0"

      for path <- Path.wildcard("#{venv}/lib/*/site-packages/tuner*"), do: File.rm_rf!(path)
      assert {{:ok, _python}, [^kept, "installing 3" <> _, _peer]} = make(venv, source)
      assert tuner(venv) == "2.0"
    end

    test "by another name: refused, with the known one", %{venv: venv, source: source} do
      assert refusal(venv, source, with: ["optimizers", "optimisers"]) ==
               "--with optimisers is not known; what may be added: optimizers"

      refute File.exists?(venv)
    end
  end

  describe "a package that is not the pinned one" do
    setup %{source: source} do
      put_system_env("PATH", "#{Path.dirname(python())}:/usr/bin:/bin")
      TinySource.tamper(source, "tiny", "1.0")
      %{unpinned: "The package index gave another file for tiny==1.0 than the one that is pinned"}
    end

    test "is not installed, and no environment is left", %{
      venv: venv,
      source: source,
      unpinned: unpinned
    } do
      text = refusal(venv, source)
      assert text =~ "/uv failed (exit status 1):\n  "
      assert text =~ unpinned
      assert text =~ "so nothing was installed"
      refute File.exists?(venv)

      # A folder that was there stays.
      File.mkdir_p!(venv)
      assert refusal(venv, source) =~ unpinned
      assert File.ls!(venv) == []
    end

    test "leaves an environment as it was", %{venv: venv, source: source, unpinned: unpinned} do
      TinySource.pin(source, "2.0")
      assert {{:ok, _python}, _lines} = make(venv, source)
      next = Path.join(Path.dirname(source), "next")
      File.cp_r!(source, next)

      File.write!(Path.join(next, "requirements.txt"), """
      tiny==1.0 --hash=sha256:#{String.duplicate("0", 64)}
      """)

      assert refusal(venv, next) =~ unpinned
      assert {tiny(venv), peer(venv)} == {"2.0", "one"}
      assert {{:ok, _python}, [_has_all]} = make(venv, source)
    end

    test "nor is one without a hash", %{venv: venv, source: source} do
      File.write!(Path.join(source, "requirements.txt"), "tiny==1.0\n")
      assert refusal(venv, source) =~ "all requirements must have a hash"
      refute File.exists?(venv)
    end

    test "nor one that would have to be built", %{venv: venv, source: source} do
      File.rm!(Path.join(source, "wheels/tiny-1.0-py3-none-any.whl"))
      sdist = Path.join(source, "wheels/tiny-1.0.tar.gz")
      ran = Path.join(source, "ran")
      files = [{~c"tiny-1.0/setup.py", "open('#{ran}', 'w')\n"}, {~c"tiny-1.0/PKG-INFO", "x"}]
      :ok = :erl_tar.create(to_charlist(sdist), files, [:compressed])
      hash = Base.encode16(:crypto.hash(:sha256, File.read!(sdist)), case: :lower)
      File.write!(Path.join(source, "requirements.txt"), "tiny==1.0 --hash=sha256:#{hash}\n")
      assert refusal(venv, source) =~ "tiny"
      refute File.exists?(ran) or File.exists?(venv)
    end
  end

  describe "one of ours" do
    test "that is half made, as it was killed at its first step, is made anew, with its extras",
         %{
           venv: venv,
           source: source,
           bin: bin
         } do
      script = ~s(case "$2" in venv\) echo $$ > #{bin}/pid; sleep 600;; esac\n)
      hangs = program(bin, "python3", script <> ~s(exec #{python()} "$@"\n))
      opts = [source: source, python: hangs, with: ["optimizers"]]
      killed_at("#{bin}/pid", fn -> Venv.make(venv, opts) end)
      File.mkdir_p!(Path.join(venv, "lib/half"))

      uv(bin, source, "")
      assert {{:ok, _python}, [kept, "making " <> anew | _]} = make(venv, source)
      assert kept == "#{venv} keeps its optimizers"
      assert anew == "#{venv} anew: it is half made"
      assert File.read!("#{bin}/log") =~ " -r #{source}/optimizers.txt\n"
      refute File.exists?(Path.join(venv, "lib/half"))
    end

    test "whose Python is gone, by way of a link to a link, is made anew", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      python = by_uv(venv, source, bin, "lib/old")
      for name <- ["bin/python", "bin/python3"], do: File.rm(Path.join(venv, name))
      File.ln_s!("python3.9", python)
      File.ln_s!("/no/such/python3.9", Path.join(venv, "bin/python3.9"))
      assert {{:ok, ^python}, ["making " <> anew | _]} = make(venv, source)
      assert anew == "#{venv} anew: its Python, /no/such/python3.9, is gone"
      refute File.exists?(Path.join(venv, "lib/old"))
    end

    test "whose installation a signal has ended is made anew", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      uv(bin, source, "kill -9 $$")
      assert refusal(venv, source) =~ "uv failed (exit status 137):"
      uv(bin, source, "")
      {{:ok, python}, _lines} = make(venv, source)
      File.write!(Path.join(venv, "lib/old"), "x")

      # With what another version needs.
      TinySource.pin(source, "2.0")
      uv(bin, source, "kill -9 $$")
      assert refusal(venv, source) =~ "uv failed (exit status 137):"
      uv(bin, source, "")
      assert {{:ok, ^python}, ["making " <> anew | _]} = make(venv, source)
      assert anew == "#{venv} anew: it is half made"
      refute File.exists?(Path.join(venv, "lib/old"))
    end

    test "that has to be made anew, but has other files in it, is refused and stays", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      by_uv(venv, source, bin, "thesis.txt")
      File.mkdir_p!(Path.join(venv, "src"))
      for name <- ["bin/python", "bin/python3"], do: File.rm(Path.join(venv, name))
      File.ln_s!("/no/such/python3.9", Path.join(venv, "bin/python"))
      names = File.ls!(venv)

      assert refusal(venv, source) ==
               "#{venv} has to be made anew, since its Python, /no/such/python3.9, is gone, but holds what dspex.setup " <>
                 "did not make (src, thesis.txt): remove it yourself, or name another with --path"

      assert File.ls!(venv) == names
    end

    test "whose Python cannot be run, or is missing, stays: that may pass", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      python = by_uv(venv, source, bin, "lib/old")
      installs = installs(bin)
      File.rm!(python)
      File.write!(python, "#!/bin/sh\necho no libpython >&2; exit 1\n")
      File.chmod!(python, 0o755)

      assert refusal(venv, source) ==
               "#{python} cannot be run: exit status 1: no libpython"

      for name <- ["bin/python", "bin/python3"], do: File.rm(Path.join(venv, name))
      assert refusal(venv, source) =~ "#{venv} has no bin/python: remove it yourself"
      assert File.exists?(Path.join(venv, "lib/old"))
      assert installs(bin) == installs
    end

    test "whose Python is too old", %{venv: venv, source: source, bin: bin} do
      python = by_uv(venv, source, bin, "lib/old")
      File.rm!(python)
      File.write!(python, ~s(#!/bin/sh\necho 'DSPEX {"version": "3.8.1", "found": {}}'\n))
      File.chmod!(python, 0o755)

      assert refusal(venv, source) =~
               "Python too old: #{python} is 3.8.1, needed is 3.10: remove it"

      assert File.exists?(Path.join(venv, "lib/old"))
    end

    test "that has lost its pyvenv.cfg: nothing goes into the Python that it was made of", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      by_uv(venv, source, bin, "lib/old", :real)
      installs = installs(bin)
      File.rm!(Path.join(venv, "pyvenv.cfg"))
      text = refusal(venv, source)

      assert text =~
               "#{venv} is not a virtual environment any more, its Python would install into /"

      refute text =~ "install into #{venv}"
      assert text =~ "remove it yourself, or name another with --path"
      assert installs(bin) == installs
      assert File.exists?(Path.join(venv, "lib/old"))
    end

    test "that loses its pyvenv.cfg between two steps: the next is not made", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      uv(bin, source, "rm #{venv}/pyvenv.cfg", :real)
      assert refusal(venv, source) =~ "#{venv} is not a virtual environment any more"
      assert installs(bin) == 1
    end

    test "that is reached by way of a link is the same", %{venv: venv, source: source, bin: bin} do
      uv(bin, source, "")
      {{:ok, _python}, _lines} = make(venv, source)
      File.ln_s!(venv, venv <> "_link")
      assert {{:ok, _python}, _lines} = make(venv <> "_link", source)
      assert installs(bin) == 4
    end
  end

  describe "two at one folder" do
    test "do not run at once, and one that was killed leaves it free", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      uv(bin, source, "echo $$ > #{bin}/pid; sleep 600")
      first = spawn(fn -> Venv.make(venv, source: source) end)
      os_pid = number("#{bin}/pid")

      assert refusal(venv, source) ==
               "another dspex.setup (process #{System.pid()}) is working on #{venv}"

      assert alive?(os_pid) and installs(bin) == 1
      Process.exit(first, :kill)
      eventually(fn -> not alive?(os_pid) end)
      uv(bin, source, "")
      assert {{:ok, _python}, ["making" <> _ | _]} = make(venv, source)
    end

    test "a lock of a process that has ended is taken over, that of a running one is not", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      uv(bin, source, "")
      lock = Path.join(venv, ".dspex_setup.lock")
      sleeper = Port.open({:spawn_executable, "/bin/sleep"}, args: ["600"])
      {:os_pid, os_pid} = Port.info(sleeper, :os_pid)
      File.mkdir_p!(venv)

      File.ln_s!("#{os_pid} #{OS.Process.start_time(os_pid)} <0.1.0>", lock)
      text = "another dspex.setup (process #{os_pid}) is working on #{venv}"
      assert refusal(venv, source) == text
      assert File.ls!(venv) == [".dspex_setup.lock"]

      # Its number is another's by now; or nobody's.
      for started <- ["1", ""] do
        if started == "", do: kill(os_pid)
        if started == "", do: eventually(fn -> not alive?(os_pid) end)
        File.rm(lock)
        File.ln_s!("#{os_pid} #{started} <0.1.0>", lock)
        assert {{:ok, _python}, _lines} = make(venv, source)
        assert {:error, :enoent} = File.read_link(lock)
      end
    end

    test "a lock of another kind is not removed", %{venv: venv, source: source, bin: bin} do
      uv(bin, source, "")
      File.mkdir_p!(venv)
      lock = Path.join(venv, ".dspex_setup.lock")
      File.ln_s!("elsewhere", lock)
      assert refusal(venv, source) == "#{lock} is not what dspex.setup made: remove it yourself"
    end
  end

  describe "one of somebody else's" do
    test "is refused and stays as it is", %{venv: venv, source: source} do
      {_, 0} = System.cmd(python(), ["-m", "venv", "--without-pip", venv])
      names = File.ls!(venv)

      assert refusal(venv, source) ==
               "#{venv} is not empty, and was not made by dspex.setup; it stays as it is: name another with --path"

      assert File.ls!(venv) == names
    end
  end

  describe "a folder that is something else" do
    test "is refused and stays as it is", %{venv: venv, source: source} do
      File.mkdir_p!(venv)
      File.write!(Path.join(venv, "thesis.txt"), "x")
      assert refusal(venv, source) =~ "#{venv} is not empty, and was not made by dspex.setup"
      assert File.ls!(venv) == ["thesis.txt"]
    end

    test "a missing or empty one stays so if nothing could be made", %{
      venv: venv,
      source: source
    } do
      put_system_env("PYTHON_EXECUTABLE", "/no/such/python")
      assert refusal(venv, source) =~ "no Python found"
      refute File.exists?(venv)
      File.mkdir_p!(venv)
      assert refusal(venv, source) =~ "no Python found"
      assert File.ls!(venv) == []
    end

    test "one that is read-only may be read, a missing one in it is an error" do
      # Of both systems the one that even root cannot write to.
      read_only = Enum.find(["/sys", "/System"], &File.dir?/1)
      assert Lock.hold(read_only, fn -> :ran end) == :ran
      assert {:error, text} = Lock.hold("#{read_only}/venv", fn -> :ran end)
      assert text =~ "#{read_only}/venv cannot be written to: "
    end

    test "a file, or a path below a file", %{venv: venv, source: source} do
      File.write!(venv, "x")
      assert refusal(venv, source) =~ "#{venv} is not a folder"
      assert refusal(Path.join(venv, "below"), source) =~ "#{venv}/below is not a folder"
    end

    test "one whose manifest somebody else wrote", %{venv: venv, source: source} do
      File.mkdir_p!(venv)
      File.write!(Path.join(venv, "dspex_setup.json"), "{}")
      assert refusal(venv, source) =~ "#{venv}/dspex_setup.json is not what dspex.setup wrote"
    end
  end

  describe "the interpreter" do
    test "none, too old, or without venv: one line with what to do", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      put_system_env("PYTHON_EXECUTABLE", nil)
      put_system_env("PATH", bin)
      text = refusal(venv, source)
      assert text =~ "no Python found" and text =~ "install Python 3.10 or newer, or uv"

      assert refusal(venv, source, python: "/no/python") =~
               "--python names /no/python, which is not"

      program(bin, "python3", ~S(echo 'DSPEX {"version": "3.8.1", "found": {}}'))
      text = refusal(venv, source)
      assert text =~ "Python too old: #{bin}/python3 is 3.8.1, needed is 3.10 or newer; install"

      program(
        bin,
        "python3",
        ~S(echo 'DSPEX {"version": "3.11.1", "found": {}, "modules": ["venv"]}')
      )

      text = refusal(venv, source)

      assert text =~
               "#{bin}/python3 can make no virtual environments, as it lacks the module ensurepip"

      assert text =~ "python3-venv"
      for text <- [text], do: refute(text =~ "\n")
      refute File.exists?(venv)
    end

    test "that is named differs from that of the environment: refused", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      by_uv(venv, source, bin, "lib/old")
      assert {{:ok, _python}, [_installing, _peer]} = make(venv, source, python: python())

      another = program(bin, "python3.99", ~S(echo 'DSPEX {"version": "3.99.0", "found": {}}'))
      text = refusal(venv, source, python: "python3.99")

      assert text =~
               ~r/\A#{venv} is of Python 3\.\d+\.\d+, not 3\.99\.0: remove it, or name another/

      assert File.exists?(Path.join(venv, "lib/old"))

      # A variable of the shell's has another purpose.
      put_system_env("PYTHON_EXECUTABLE", another)
      assert {{:ok, _python}, [_installing, _peer]} = make(venv, source)
    end

    test "that is named is passed to uv", %{venv: venv, source: source, bin: bin} do
      another = program(bin, "python3.99", ~S(echo 'DSPEX {"version": "3.99.0", "found": {}}'))
      uv(bin, source, "")
      refusal(venv, source, python: "python3.99")
      assert File.read!("#{bin}/log") =~ "--python #{another} #{venv}\n"
    end
  end

  describe "with uv on the PATH" do
    test "it makes and installs, with the Python that it chooses", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      put_system_env("PYTHON_EXECUTABLE", nil)
      uv(bin, source, "")
      # From anywhere.
      {{:ok, python}, lines} = make(Path.relative_to_cwd(venv), source)
      assert ["making " <> making, "installing 2 packages with uv" <> _, _peer] = lines
      assert making == "#{venv} with uv"

      assert [making, packages, peer] = String.split(File.read!("#{bin}/log"), "\n", trim: true)
      assert making == "venv --quiet --allow-existing --python >=3.10 #{venv}"
      install = "pip install --quiet --compile-bytecode --python #{python}"
      hashed = "--no-build --require-hashes -r #{source}/requirements.txt"
      assert packages == "#{install} #{hashed}"

      # Nothing that is downloaded builds the peer.
      wheel = "dspy-bridge @ #{TinySource.url(venv)}/lib/dspy_bridge-0.1-py3-none-any.whl"
      assert peer == "#{install} --no-deps --no-index --reinstall #{wheel}"
      assert Path.wildcard("#{venv}/lib/*.whl") == []

      # All in one step, so that they fit together.
      {{:ok, _python}, ["installing 3 packages" <> _, _peer]} =
        make(venv, source, with: ["optimizers"])

      assert File.read!("#{bin}/log") =~ "\n#{packages} -r #{source}/optimizers.txt\n"
    end

    test "it ignores the working directory, and pip may only install into environments",
         %{
           venv: venv,
           source: source,
           bin: bin
         } do
      put_system_env("PIP_REQUIRE_VIRTUALENV", nil)
      uv(bin, source, "echo $(pwd) $PIP_REQUIRE_VIRTUALENV >> #{bin}/pwd")
      {{:ok, _python}, _lines} = make(venv, source)
      assert File.read!("#{bin}/pwd") == "/ 1\n/ 1\n"
    end

    test "a long step reports that it is still running", %{venv: venv, source: source, bin: bin} do
      uv =
        program(
          uv(bin, source, "") && bin,
          "slow_uv",
          "until test -e #{bin}/go; do sleep 0.01; done"
        )

      me = self()

      progress = fn line ->
        send(me, line)
        if line =~ "still at it", do: File.touch!("#{bin}/go")
      end

      installer = %Installer{progress: progress, uv: uv, sign_of_life_ms: 20}
      assert Installer.create(installer, venv, Source.read(source, []) |> elem(1), nil) == :ok
      assert_received "  still at it after 0 s"
      assert Installer.new(progress).sign_of_life_ms == 10_000
    end

    test "when it fails: the end of its output, without secrets", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      put_system_env("UV_INDEX_PASSWORD", "another-s3cr3t")

      uv(
        bin,
        source,
        "seq 1 40; echo https://joe:s3c@r3t@host/simple and $UV_INDEX_PASSWORD >&2; exit 2"
      )

      text = refusal(venv, source)
      assert text =~ "#{bin}/uv failed (exit status 2):\n  27\n"
      assert String.ends_with?(text, "\n  https://[redacted]@host/simple and [redacted]")
    end
  end

  test "a dependency that was not compiled: what to do", %{venv: venv, source: source} do
    File.rm_rf!(Path.join(source, "package"))
    assert refusal(venv, source) =~ "#{source} lacks package/pyproject.toml: compile"
  end
end
