defmodule DSPex.PythonBridge.Python.InterpreterTest do
  # The look-up reads the system's environment.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import ExUnit.CaptureIO

  alias DSPex.PythonBridge.Bridge
  alias DSPex.PythonBridge.Python.Interpreter

  @moduletag :tmp_dir

  setup do
    put_config(:python_environment, [])
    put_system_env("DSPY_VENV", nil)
    put_system_env("PYTHON_EXECUTABLE", nil)
  end

  defp venv(dir, name, interpreter \\ "python3") do
    path = Path.join([dir, name, "bin", interpreter])
    File.mkdir_p!(Path.dirname(path))
    File.write!(path, "")
    {Path.join(dir, name), path}
  end

  test "the option, the venv, DSPY_VENV, PYTHON_EXECUTABLE, PATH", %{tmp_dir: dir} do
    assert Interpreter.find() == {:ok, System.find_executable("python3")}

    {_, by_variable} = venv(dir, "a")
    put_system_env("PYTHON_EXECUTABLE", by_variable)
    assert Interpreter.find() == {:ok, by_variable}

    {dspy_venv, in_dspy_venv} = venv(dir, "b")
    put_system_env("DSPY_VENV", dspy_venv)
    assert Interpreter.find() == {:ok, in_dspy_venv}

    {configured, in_configured} = venv(dir, "c", "python")
    put_config(:python_environment, virtual_env: configured)
    assert Interpreter.find() == {:ok, in_configured}

    {_, option} = venv(dir, "d")
    assert Interpreter.find(option) == {:ok, option}
  end

  test "a relative path is expanded, a bare name is looked up on the PATH", %{tmp_dir: dir} do
    {_, path} = venv(dir, "a")
    relative = Path.relative_to_cwd(path)
    assert Interpreter.find("./" <> relative) == {:ok, path}
    assert Interpreter.find("sh") == {:ok, System.find_executable("sh")}
  end

  test "a setting that names a missing interpreter is an error", %{tmp_dir: dir} do
    assert {:error, text} = Interpreter.find("/no/such/python")
    assert text =~ "no Python found" and text =~ "/no/such/python"
    assert {:error, text} = Interpreter.find("no-such-python")
    assert text =~ "no-such-python"

    put_system_env("PYTHON_EXECUTABLE", "/no/such/python")
    assert {:error, text} = Interpreter.find()
    assert text =~ "PYTHON_EXECUTABLE"

    put_system_env("DSPY_VENV", dir)
    assert {:error, text} = Interpreter.find()
    assert text =~ "DSPY_VENV" and text =~ dir

    put_config(:python_environment, virtual_env: "/no/venv")
    assert {:error, text} = Interpreter.find()
    assert text =~ "virtual_env" and text =~ "/no/venv"
  end

  test "a relative path to nothing is named whole, also in the text of a bridge" do
    assert {:error, text} = Interpreter.find("./venv/bin/python")
    assert text =~ Path.expand("venv/bin/python") <> ", which is not a file"
    bridge = start_supervised!({Bridge, name: nil, python_executable: "./venv/bin/python"})
    assert eventually(fn -> Bridge.get_status(bridge).last_error == text end)
  end

  describe "a virtual environment without a Python: why, and what to do" do
    setup %{tmp_dir: dir} do
      put_config(:python_environment, virtual_env: Path.join(dir, "venv"))
      File.mkdir_p!(Path.join(dir, "venv"))
      %{venv: Path.join(dir, "venv")}
    end

    defp link(venv, name, target) do
      File.mkdir_p!(Path.join(venv, "bin"))
      File.ln_s!(target, Path.join([venv, "bin", name]))
    end

    defp said(venv) do
      {:error, text} = Interpreter.find()
      String.replace_prefix(text, "no Python found: virtual_env names #{venv}, ", "")
    end

    test "it is gone, at the end of any number of links", %{venv: venv} do
      link(venv, "python3.9", "/no/such/python3.9")
      link(venv, "python3", "python3.9")
      link(venv, "python", "../bin/python3")

      assert said(venv) ==
               "whose bin/python is a link to /no/such/python3.9, which is gone " <>
                 "(remove it, and `mix dspex.setup` makes it anew)"
    end

    test "its links go in a circle", %{venv: venv} do
      link(venv, "python3", "python")
      link(venv, "python", "python3")
      assert said(venv) =~ "bin/python"
    end

    # What is said where `hidden` may not be looked at. Root may look anywhere, so the test is another user then.
    defp as_another(venv, hidden) do
      File.chmod!(hidden, 0)
      on_exit(fn -> File.chmod!(hidden, 0o755) end)

      code =
        "Application.put_env(:dspex, :python_environment, virtual_env: #{inspect(venv)})\n" <>
          "{:error, text} = DSPex.PythonBridge.Python.Interpreter.find()\nIO.puts(text)"

      if File.ls(hidden) == {:error, :eacces} do
        capture_io(fn -> Code.eval_string(code) end) |> String.trim()
      else
        user = ["--reuid=65534", "--regid=65534", "--clear-groups", "elixir"]
        args = user ++ ["-pa", Application.app_dir(:dspex, "ebin"), "-e", code]
        {text, 0} = System.cmd("setpriv", args, env: %{"HOME" => "/"}, cd: "/")
        String.trim(text)
      end
    end

    test "this user may not reach it", %{tmp_dir: dir, venv: venv} do
      hidden = Path.join(dir, "hidden")
      File.mkdir_p!(Path.join(hidden, "venv/bin"))
      File.write!(Path.join(hidden, "python3"), "")
      link(venv, "python", Path.join(hidden, "python3"))

      assert as_another(venv, hidden) ==
               "no Python found: virtual_env names #{venv}, whose bin/python is a link to #{hidden}/python3, " <>
                 "which this user may not reach"

      assert as_another("#{hidden}/venv", hidden) ==
               "no Python found: virtual_env names #{hidden}/venv, which this user may not reach"
    end
  end
end
