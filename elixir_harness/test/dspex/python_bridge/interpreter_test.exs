defmodule DSPex.PythonBridge.InterpreterTest do
  # The look-up reads the system's environment.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Interpreter

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
end
