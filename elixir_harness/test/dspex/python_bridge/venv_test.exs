defmodule DSPex.PythonBridge.VenvTest do
  # Real environments, by the interpreter's own venv and pip; uv is a script here, which tells what it was given.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Venv
  alias DSPex.Test.TinySource

  @moduletag :tmp_dir

  setup %{tmp_dir: dir} do
    # Some 50 MB.
    on_exit(fn -> File.rm_rf!(dir) end)
    source = TinySource.make(Path.join(dir, "so;ur[ce], and more"))
    for {name, value} <- TinySource.env(source), do: put_system_env(name, value)
    put_system_env("PYTHON_EXECUTABLE", python())
    # The programs of the system, without a uv.
    put_system_env("PATH", "/usr/bin:/bin")
    %{venv: Path.join(dir, "venv"), source: source, bin: Path.join(dir, "bin")}
  end

  # What it gives, and the lines that it told meanwhile.
  defp make(venv, source, opts \\ []) do
    me = self()
    tag = make_ref()
    result = Venv.make(venv, [source: source, progress: &send(me, {tag, &1})] ++ opts)
    {result, lines(tag)}
  end

  defp lines(tag) do
    receive do
      {^tag, line} -> [line | lines(tag)]
    after
      0 -> []
    end
  end

  defp refusal(venv, source, opts \\ []) do
    {{:error, text}, _lines} = make(venv, source, opts)
    text
  end

  defp python_says(venv, args) do
    {output, 0} = System.cmd(Path.join(venv, "bin/python"), args)
    String.trim(output)
  end

  defp tiny(venv), do: python_says(venv, ["-c", "import tiny; print(tiny.VERSION)"])
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
      with {:ok, os_pid} when os_pid != "" <- File.read(file), do: os_pid, else: (_none -> nil)
    end)
  end

  # It makes environments, without pip; the rest is the script's.
  defp uv(bin, source, script) do
    program(bin, "uv", """
    echo "$@" >> #{bin}/log
    if [ "$1" = venv ]; then
      for folder; do :; done
      #{python()} -m venv --without-pip "$folder"
      exit
    fi
    #{script}
    """)

    source
  end

  describe "with venv and pip" do
    test "made, complete at once, brought up to date: pins, and the peer under the same version",
         %{
           venv: venv,
           source: source
         } do
      {result, lines} = make(venv, source)
      assert result == {:ok, Path.join(venv, "bin/python3")}
      assert [making, installing, peer] = Enum.reject(lines, &(&1 =~ "still at it"))
      assert making =~ "making #{venv} from #{python()}, Python 3."
      assert installing =~ "installing 2 packages with pip"
      assert peer =~ "dspy_bridge"
      assert {tiny(venv), peer(venv)} == {"1.0", "one"}

      assert {{:ok, _python}, [line]} = make(venv, source)
      assert line == "#{venv} has all that it needs"

      TinySource.pin(source, "2.0")
      TinySource.package(source, "two")

      assert {{:ok, _python}, ["installing 2" <> _, "installing the peer" <> _]} =
               make(venv, source)

      assert {tiny(venv), peer(venv)} == {"2.0", "two"}

      # Its version is the same.
      TinySource.package(source, "three")
      assert {{:ok, _python}, ["installing" <> _ | _]} = make(venv, source)
      assert {tiny(venv), peer(venv)} == {"2.0", "three"}

      # What somebody removed by hand is missed.
      python_says(venv, ["-m", "pip", "uninstall", "--yes", "tiny"])
      assert {{:ok, _python}, ["installing" <> _ | _]} = make(venv, source)
      assert tiny(venv) == "2.0"
    end

    test "one of ours that is half made, or whose Python is gone, is made anew", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      # Killed at its first step.
      hangs =
        program(
          bin,
          "python3",
          ~s(case "$2" in venv\) echo $$ > #{bin}/pid; sleep 600;; esac\n) <>
            ~s(exec #{python()} "$@"\n)
        )

      killed = spawn(fn -> Venv.make(venv, source: source, python: hangs) end)

      os_pid = number("#{bin}/pid")
      Process.exit(killed, :kill)
      eventually(fn -> not alive?(os_pid) end)
      File.mkdir_p!(Path.join(venv, "lib/half"))

      assert {{:ok, _python}, ["making " <> anew | _]} = make(venv, source)
      assert anew == "#{venv} anew: it is half made"
      refute File.exists?(Path.join(venv, "lib/half"))
      assert tiny(venv) == "1.0"

      for name <- ["bin/python", "bin/python3"], do: File.rm(Path.join(venv, name))
      File.ln_s!("/no/such/python3.9", Path.join(venv, "bin/python"))
      assert {{:ok, _python}, ["making " <> anew | _]} = make(venv, source)
      assert anew == "#{venv} anew: its Python, /no/such/python3.9, is gone"
      assert tiny(venv) == "1.0"
    end

    test "one that somebody else made is added to; what was in it stays", %{
      venv: venv,
      source: source
    } do
      {_, 0} = System.cmd(python(), ["-m", "venv", "--without-pip", venv])
      File.write!(Path.join(venv, "theirs.txt"), "x")
      assert {{:ok, _python}, [pip | _]} = make(venv, source)
      assert pip == "installing pip"
      assert {tiny(venv), peer(venv)} == {"1.0", "one"}
      assert {{:ok, _python}, [_has_all]} = make(venv, source)

      # Its Python goes: it is not ours to remove.
      for name <- ["bin/python", "bin/python3"], do: File.rm(Path.join(venv, name))

      assert refusal(venv, source) ==
               "#{venv} was not made by dspex.setup, and it has no bin/python: remove it yourself, or name another with --path"

      assert File.read!(Path.join(venv, "theirs.txt")) == "x"
    end

    test "when pip fails: what it said, without passwords; what was there stays as it was", %{
      venv: venv,
      source: source
    } do
      {{:ok, _python}, _lines} = make(venv, source)
      TinySource.pin(source, "3.0")

      put_system_env(
        "PIP_FIND_LINKS",
        "#{System.get_env("PIP_FIND_LINKS")} http://joe:s3cr3t@127.0.0.1:9/simple"
      )

      put_system_env("PIP_RETRIES", "0")
      text = refusal(venv, source)
      assert text =~ "#{venv}/bin/python3 failed (exit status 1):\n  "
      assert text =~ "No matching distribution found for tiny==3.0"
      refute text =~ "s3cr3t"
      assert tiny(venv) == "1.0"

      TinySource.pin(source, "1.0")
      assert {{:ok, _python}, [_has_all]} = make(venv, source)
    end
  end

  describe "a folder that is something else" do
    test "is refused and stays as it is", %{venv: venv, source: source} do
      File.mkdir_p!(venv)
      File.write!(Path.join(venv, "thesis.txt"), "x")
      assert refusal(venv, source) =~ "#{venv} is not empty, and no virtual environment"
      assert File.ls!(venv) == ["thesis.txt"]
    end

    test "a file, a place that cannot be", %{venv: venv, source: source} do
      File.write!(venv, "x")
      assert refusal(venv, source) =~ "#{venv} is no folder"
      assert refusal(Path.join(venv, "below"), source) =~ "#{venv}/below is no folder"
    end

    test "one whose marker somebody wrote", %{venv: venv, source: source} do
      File.mkdir_p!(venv)
      File.write!(Path.join(venv, "dspex_setup.json"), "{}")
      assert refusal(venv, source) =~ "#{venv}/dspex_setup.json is not what dspex.setup wrote"
    end
  end

  describe "the interpreter" do
    test "none, too old, or without what makes environments: one line with what to do", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      put_system_env("PYTHON_EXECUTABLE", nil)
      put_system_env("PATH", bin)
      text = refusal(venv, source)
      assert text =~ "no Python found" and text =~ "install Python 3.10 or newer, or uv"

      assert refusal(venv, source, python: "/no/python") =~
               "--python names /no/python, which is no"

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

    test "that is named decides, also over an environment that is there", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      uv(bin, source, "")
      {{:ok, _python}, _lines} = make(venv, source)
      assert {{:ok, _python}, [_installing, _peer]} = make(venv, source, python: python())

      another = program(bin, "python3.99", ~S(echo 'DSPEX {"version": "3.99.0", "found": {}}'))
      assert {_result, ["making " <> anew | _]} = make(venv, source, python: "python3.99")
      assert anew =~ ~r/anew: it is of Python 3\.\d+\.\d+, not 3\.99\.0/
      assert File.read!("#{bin}/log") =~ "--python #{another} #{venv}\n"
    end
  end

  describe "with uv on the PATH" do
    test "it makes and installs, of the Python that it chooses, or of the one that is named", %{
      venv: venv,
      source: source,
      bin: bin
    } do
      put_system_env("PYTHON_EXECUTABLE", nil)
      uv(bin, source, "")
      {{:ok, python}, lines} = make(venv, source)
      assert ["making " <> making, "installing 2 packages with uv" <> _, _peer] = lines
      assert making == "#{venv} with uv"

      assert [making, packages, peer] = String.split(File.read!("#{bin}/log"), "\n", trim: true)
      assert making == "venv --quiet --allow-existing --python >=3.10 #{venv}"
      install = "pip install --quiet --compile-bytecode --python #{python}"
      assert packages == "#{install} -r #{source}/requirements.txt"

      assert peer ==
               "#{install} --no-deps --reinstall dspy-bridge @ #{TinySource.url(source)}/package"
    end

    test "an installation that was broken off in one that somebody else made is made sure of",
         %{
           venv: venv,
           source: source,
           bin: bin
         } do
      {_, 0} = System.cmd(python(), ["-m", "venv", "--without-pip", venv])
      uv(bin, source, "echo $$ > #{bin}/pid; sleep 600")
      killed = spawn(fn -> Venv.make(venv, source: source) end)

      os_pid = number("#{bin}/pid")
      Process.exit(killed, :kill)
      eventually(fn -> not alive?(os_pid) end)

      uv(bin, source, "")
      assert {{:ok, _python}, ["installing 2" <> _, _peer]} = make(venv, source)
      assert File.read!("#{bin}/log") =~ "--reinstall -r #{source}/requirements.txt"
    end

    test "when it fails: the end of what it said, without what is secret", %{
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
    assert refusal(venv, source) =~ "#{source} lacks requirements.txt or package: compile"
  end
end
