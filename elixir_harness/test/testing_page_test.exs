defmodule DSPex.TestingPageTest do
  use ExUnit.Case, async: true

  alias DSPex.Test.{Helpers, Page}

  @page "docs/testing.md"
  @external_resource Page.path(@page)

  # A project of its own, in a BEAM of its own: its tests are ExUnit's.
  @tag :tmp_dir
  @tag timeout: 120_000
  test "the application of testing.md and its tests run as shown", %{tmp_dir: dir} do
    for code <- Page.blocks(@page), {file, text} <- files(code) do
      path = Path.join(dir, file)
      File.mkdir_p!(Path.dirname(path))
      File.write!(path, text)
    end

    File.write!(Path.join(dir, "start.exs"), """
    for {app, values} <- Config.Reader.read!("config/test.exs"), do: Application.put_all_env([{app, values}])
    {:ok, pid} = MyApp.Application.start(:normal, [])
    Process.unlink(pid)
    ExUnit.start(seed: 0)
    """)

    application = Path.wildcard(Path.join(dir, "lib/**/*.ex"))
    # `use` of a program comes before what matches on its struct.
    {[program], others} = Enum.split_with(application, &(Path.basename(&1) == "triage.ex"))
    tests = Path.wildcard(Path.join(dir, "test/**/*_test.exs"))
    assert length(tests) == 6
    files = [program | others] ++ [Path.join(dir, "start.exs") | tests]
    paths = Enum.flat_map(:code.get_path(), &["-pa", to_string(&1)])
    args = paths ++ Enum.flat_map(files, &["-r", &1]) ++ ["-e", ":ok"]
    env = [{"PYTHON_EXECUTABLE", Helpers.python()}]
    {output, status} = System.cmd("elixir", args, cd: dir, env: env, stderr_to_stdout: true)
    assert status == 0, output
    assert output =~ "10 tests, 0 failures", output
    # Nothing is logged that a reader would take for a fault.
    refute output =~ "warning:", output
  end

  # A block may be several files, each with its path in the first line.
  defp files(code) do
    ~r/^# (\S+\.exs?)\n(.*?)(?=^# \S+\.exs?\n|\z)/ms
    |> Regex.scan(code, capture: :all_but_first)
    |> Enum.map(&List.to_tuple/1)
  end
end
