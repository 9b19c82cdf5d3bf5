defmodule DSPex.PythonBridge.EnvironmentCheckTest do
  # The check reads the application's configuration.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.EnvironmentCheck
  alias DSPex.PythonBridge.Python.Probe

  doctest Probe

  @moduletag :tmp_dir

  setup :only_python

  defp error do
    assert {:error, text} = EnvironmentCheck.validate_environment()
    assert String.printable?(text)
    text
  end

  defp script(dir, source) do
    path = Path.join(dir, "peer.py")
    File.write!(path, source)
    put_config(:python_bridge, script_path: path)
    path
  end

  test "a good environment: what it found, with versions" do
    assert {:ok, report} = EnvironmentCheck.validate_environment()
    assert report.python_path == python()
    assert report.script_path == Application.app_dir(:dspex, "priv/python/dspy_bridge.py")
    assert report.python_version =~ ~r/^3\.\d+\.\d+$/
    assert report.dspy_version =~ ~r/^\d+\.\d+/
    assert report.packages["dspy"] == report.dspy_version
    assert Map.keys(report.packages) == ["dspy", "psutil"]
  end

  test "an interpreter that cannot be run", %{tmp_dir: dir} do
    path = Path.join(dir, "python3")
    File.write!(path, "no program")
    put_system_env("PYTHON_EXECUTABLE", path)
    assert error() =~ "#{path} cannot be run: exit status 126: "
  end

  test "an interpreter that fails, is not Python, or is too old", %{tmp_dir: dir} do
    for {script, text} <- [
          {"echo 'cannot load libpython' >&2; exit 127",
           "cannot be run: exit status 127: cannot load libpython"},
          {"echo hello", "cannot be run: it is not a Python: hello"},
          {~S(echo 'DSPEX {"version": "3.9.1", "found": {}}'), "is 3.9.1, needed is 3.10"}
        ] do
      path = use_interpreter(dir, script)
      assert error() =~ "#{path} #{text}"
    end
  end

  test "no dspy, no psutil: all missing packages, by name", %{tmp_dir: dir} do
    use_interpreter(dir, ~S(echo 'DSPEX {"version": "3.11.0", "found": {}}'))
    assert error() =~ "missing in"
    assert error() =~ "`dspy`, `psutil` (`mix dspex.setup` makes an environment)"
    use_interpreter(dir, ~S(echo 'DSPEX {"version": "3.11.0", "found": {}, "venv": true}'))
    assert error() =~ "`dspy`, `psutil` (install them there)"
  end

  test "only those required packages that the real interpreter lacks" do
    put_config(:python_environment, required_packages: ["psutil", "no-such-package", "nor-this"])
    text = error()
    assert text =~ "`no-such-package`, `nor-this`"
    refute text =~ "`psutil`"
  end

  test "dspy-ai counts as dspy", %{tmp_dir: dir} do
    put_config(:python_environment, required_packages: ["dspy-ai"])

    assert {:ok, %{packages: %{"dspy-ai" => version}, dspy_version: version}} =
             EnvironmentCheck.validate_environment()

    use_interpreter(dir, ~S(echo 'DSPEX {"version": "3.11.0", "found": {"dspy-ai": "2.6.0"}}'))
    put_config(:python_environment, required_packages: ["dspy"])
    assert {:ok, %{dspy_version: "2.6.0"}} = EnvironmentCheck.validate_environment()
  end

  test "no script" do
    put_config(:python_bridge, script_path: "/no/such/peer.py")
    assert error() == "script not found: /no/such/peer.py"
  end

  test "a script that is not a peer's: what it lacks, by name", %{tmp_dir: dir} do
    path = script(dir, "def main():\n    pass\n")

    assert error() =~
             "#{path} is not a peer's script: it lacks `class DSPyBridge`, `def handle_command`"
  end

  test "wrong configuration, by key" do
    for {key, value, parts} <- [
          {:python_environment, [virtual_env: 5], ["python_environment", "virtual_env"]},
          {:python_environment, [required_packages: "dspy"], ["required_packages"]},
          {:python_environment, [required_packages: ["--help"]], ["required_packages"]},
          {:python_environment, [venv: "x"], ["venv"]},
          {:python_environment, [virtual_enf: "x"], ["did you mean :virtual_env?"]},
          {:python_environment, :text, ["python_environment", "keyword list"]},
          {:python_bridge, [max_retries: -1], [":python_bridge", ":max_retries"]},
          {:python_bridge, [lm: 5], [":python_bridge", ":lm"]},
          {:python_bridge_monitor, [interval: 0], [":python_bridge_monitor", ":interval"]}
        ] do
      before = Application.get_env(:dspex, key, [])
      Application.put_env(:dspex, key, value)
      text = error()
      Application.put_env(:dspex, key, before)
      for part <- parts, do: assert(text =~ part)
    end

    Application.delete_env(:dspex, :python_bridge_monitor)
  end

  test "the package dspy_bridge neither next to the script nor installed", %{tmp_dir: dir} do
    drop_in = File.read!(Application.app_dir(:dspex, "priv/python/dspy_bridge.py"))
    path = script(dir, drop_in)
    text = ~S("version": "3.11.0", "found": {"dspy": "3.0", "psutil": "6"})
    python = use_interpreter(dir, "echo 'DSPEX {#{text}, \"bridge\": false}'")
    assert error() =~ "the package dspy_bridge is neither next to #{path}"
    assert error() =~ "nor installed in #{python}"

    # The system's Python has no such package.
    put_config(:python_environment, required_packages: [])
    put_system_env("PYTHON_EXECUTABLE", "/usr/bin/python3")

    if File.exists?("/usr/bin/python3"),
      do: assert(error() =~ "the package dspy_bridge is neither")

    # Another script brings what it needs.
    script(dir, "class DSPyBridge:\n    def handle_command(self): pass\ndef main(): pass\n")
    assert {:ok, _} = EnvironmentCheck.validate_environment()
  end

  test "the package dspy_bridge is found where the script of the peer finds it: in a checkout, next to it, installed",
       %{
         tmp_dir: dir
       } do
    folder = Path.join(dir, "a/b/c")
    script = Path.join(folder, "dspy_bridge.py")
    File.mkdir_p!(folder)
    File.cp!(Application.app_dir(:dspex, "priv/python/dspy_bridge.py"), script)
    # Without site-packages nothing is installed.
    python = use_interpreter(dir, "exec #{python()} -I -S \"$@\"\n")

    found = fn ->
      {:ok, probe} = Probe.run(python, script, [])
      probe.bridge
    end

    assert found.() == false

    installed = Path.join(dir, "site")
    package(installed)
    use_interpreter(dir, "PYTHONPATH=\"#{installed}\" exec #{python()} -S \"$@\"\n")
    assert found.() == installed

    next_to_it = Path.join(folder, "package")
    package(next_to_it)
    assert found.() == next_to_it

    package(dir)
    assert found.() == dir

    # The peer that starts is the same one's.
    assert {dir <> "\n", 0} == System.cmd(python, [script])
  end

  # One that says where it is.
  defp package(folder) do
    File.mkdir_p!(Path.join(folder, "dspy_bridge"))
    File.write!(Path.join(folder, "dspy_bridge/__init__.py"), "")

    File.write!(Path.join(folder, "dspy_bridge/__main__.py"), """
    import os
    def main():
        print(os.path.dirname(os.path.dirname(__file__)))
    """)
  end
end
