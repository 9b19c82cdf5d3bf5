defmodule DSPex.PythonBridge.InterpreterTest do
  # The look-up reads the system's environment.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Interpreter}

  doctest Interpreter

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

  test "the option, the configured venv, DSPY_VENV, PYTHON_EXECUTABLE, PATH: in this order", %{
    tmp_dir: dir
  } do
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

  test "what is set but not there is an error that says so, never skipped", %{tmp_dir: dir} do
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

  test "an empty variable is an unset one" do
    put_system_env("DSPY_VENV", "")
    put_system_env("PYTHON_EXECUTABLE", "")
    assert Interpreter.find() == {:ok, System.find_executable("python3")}
  end

  test "what decided is told" do
    assert {:ok, _path, :path} = Interpreter.locate()
    assert {:ok, _path, :option} = Interpreter.locate("sh")
    put_system_env("PYTHON_EXECUTABLE", System.find_executable("sh"))
    assert {:ok, path, :python_executable} = Interpreter.locate()
    assert Interpreter.base() == {:ok, path, :python_executable}
  end

  describe "a relative path that leads nowhere: where it was looked for, and what holds from anywhere" do
    test "in the configuration" do
      put_config(:python_environment, virtual_env: "_build/no_such_venv")
      assert {:error, text} = Interpreter.find()
      assert text =~ Path.join(File.cwd!(), "_build/no_such_venv")
      assert text =~ ~s(it was given as "_build/no_such_venv" and looked for from #{File.cwd!()},)
      assert text =~ ~s|Path.expand("../_build/no_such_venv", __DIR__)|
    end

    test "in an option, and in the text of a bridge that cannot start" do
      assert {:error, text} = Interpreter.find("./venv/bin/python")
      assert text =~ Path.expand("venv/bin/python") <> ", which is no file"
      assert text =~ ~s|Path.expand("../venv/bin/python", __DIR__)|

      bridge = start_supervised!({Bridge, name: nil, python_executable: "./venv/bin/python"})
      assert %{last_error: ^text} = eventually(fn -> with_error(Bridge.get_status(bridge)) end)
    end

    defp with_error(status), do: if(status.last_error, do: status)

    test "but not an absolute one, nor one in the home folder" do
      for path <- ["/no/venv", "~/no/such/venv"] do
        put_config(:python_environment, virtual_env: path)
        assert {:error, text} = Interpreter.find()
        refute text =~ "__DIR__"
        assert text =~ "there is no such folder" and text =~ "mix dspex.setup"
      end
    end
  end

  test "a virtual environment whose Python is gone: which that was", %{tmp_dir: dir} do
    File.mkdir_p!(Path.join(dir, "bin"))
    File.ln_s!("/no/such/python3.9", Path.join(dir, "bin/python"))
    File.ln_s!("python", Path.join(dir, "bin/python3"))
    put_config(:python_environment, virtual_env: dir)
    assert {:error, text} = Interpreter.find()
    assert text =~ "#{dir}, whose bin/python is a link to /no/such/python3.9, which is gone"
  end

  test "no Python at all", %{tmp_dir: dir} do
    put_system_env("PATH", dir)

    assert Interpreter.find() ==
             {:error,
              "no Python found: no interpreter is configured, and there is no python3 on the PATH"}
  end
end
