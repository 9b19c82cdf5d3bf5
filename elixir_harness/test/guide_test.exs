defmodule DSPex.GuideTest do
  @moduledoc "docs/guide.md runs as it stands: its Elixir here, its Python where it says."

  # It changes the working directory, as a reader would.
  use ExUnit.Case, async: false

  @root Path.expand("../..", __DIR__)
  @guide Path.join(@root, "docs/guide.md")
  @external_resource @guide
  @sections ~w(1 2 3 4 5 6 7 8 9 10 11)

  @tag :tmp_dir
  @tag timeout: 120_000
  test "every example of the guide is as it says", %{tmp_dir: dir} do
    python = DSPex.Test.Helpers.python()
    told = Path.join(dir, "told")
    File.mkdir_p!(Path.join(dir, "states"))
    File.mkdir_p!(Path.join(dir, "files"))
    File.write!(Path.join(dir, "files/cat.png"), <<0x89, "PNG\r\n">>)
    File.cp!(Path.join(@root, "tests/fakes/mlflow.py"), Path.join(dir, "mlflow.py"))
    before = Application.get_env(:dspex, :python_bridge)
    Application.put_env(:dspex, :python_bridge, python_executable: python)
    System.put_env("MLFLOW_TOLD", told)
    cwd = File.cwd!()
    File.cd!(dir)

    on_exit(fn ->
      File.cd!(cwd)
      System.delete_env("MLFLOW_TOLD")

      if before,
        do: Application.put_env(:dspex, :python_bridge, before),
        else: Application.delete_env(:dspex, :python_bridge)

      DSPex.PythonBridge.Bridge.stop()
    end)

    text = File.read!(@guide)
    blocks = Regex.scan(~r/^```(elixir|python)\n(.*?)^```$/ms, text, capture: :all_but_first)
    # What a reader would have in place before the Bridge starts.
    for ["python", code] <- blocks, do: place(code, dir)
    {:ok, script} = File.read(Path.join(dir, "optimize.py"))
    {output, 0} = System.cmd(python, ["-c", script], cd: dir, stderr_to_stdout: true)
    assert is_binary(output)

    env = Code.env_for_eval([])

    Enum.reduce(blocks, {[], env}, fn
      ["elixir", code], {binding, env} ->
        quoted = Code.string_to_quoted!(code, file: @guide)
        {_value, binding, env} = Code.eval_quoted_with_env(quoted, binding, env)
        {binding, env}

      ["python", _code], so_far ->
        so_far
    end)

    assert File.read!(told) == "experiment triage\nautolog\n"
  end

  test "each section has an example" do
    sections = Regex.split(~r/^## (?=\d+\. )/m, File.read!(@guide)) |> tl()
    assert Enum.map(sections, &(&1 |> String.split(".") |> hd())) == @sections
    assert Enum.all?(sections, &(&1 =~ "```elixir" or &1 =~ "```python"))
  end

  defp place(code, dir) do
    [_, path] = Regex.run(~r/\A# (\S+\.py)\n/, code)
    file = Path.join(dir, path)
    File.mkdir_p!(Path.dirname(file))
    File.write!(file, code)
  end
end
