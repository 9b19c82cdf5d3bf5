defmodule DSPex.GuideTest do
  @moduledoc """
  The pages run as they stand: their Elixir here, in order, and the guide's Python where it says. What cannot be
  had here is the LM that some of them name: `offline/echo` takes its place.
  """

  # They change the working directory, as a reader would, and use the names that are the defaults.
  use ExUnit.Case, async: false

  import ExUnit.CaptureIO
  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.{Bridge, EnvironmentCheck, Monitor, Options, Pool}
  alias DSPex.Test.Helpers

  @root Path.expand("../..", __DIR__)
  @guide Path.join(@root, "docs/guide.md")
  @external_resource @guide
  @sections ~w(1 2 3 4 5 6 7 8 9 10 11)
  @pages ~w(README.md docs/getting-started.md docs/deploying.md docs/settings.md docs/errors.md docs/coming-from.md
            docs/cluster.md)
  # The readers of these have the application's own Bridge and Monitor.
  @in_application ~w(README.md docs/getting-started.md)
  @telemetry Path.join(@root, "docs/telemetry.md")
  @external_resource @telemetry

  setup do
    Helpers.put_config(:python_bridge, python_executable: Helpers.python(), lm: "offline/echo")
    # A page shows what its absence looks like.
    Helpers.put_system_env("OPENAI_API_KEY", nil)
    on_exit(fn -> Enum.each([Bridge, Pool], &Bridge.stop/1) end)
  end

  @tag :tmp_dir
  @tag timeout: 120_000
  test "every example of the guide is as it says", %{tmp_dir: dir} do
    told = Path.join(dir, "told")
    File.cp!(Path.join(@root, "tests/fakes/mlflow.py"), Path.join(dir, "mlflow.py"))
    Helpers.put_system_env("MLFLOW_TOLD", told)
    cwd = File.cwd!()
    File.cd!(dir)
    on_exit(fn -> File.cd!(cwd) end)

    text = File.read!(@guide)
    # What a reader has in place before the Bridge starts.
    [commands] = blocks(text, "sh")
    {_output, 0} = System.cmd("sh", ["-e", "-c", commands])
    for code <- blocks(text, "python"), do: place(code, dir)
    {:ok, script} = File.read(Path.join(dir, "optimize.py"))
    {output, 0} = System.cmd(Helpers.python(), ["-c", script], cd: dir, stderr_to_stdout: true)
    assert is_binary(output)
    run(blocks(text, "elixir"), @guide)
    assert File.read!(told) == "experiment triage\nautolog\n"
  end

  test "each section has an example" do
    sections = Regex.split(~r/^## (?=\d+\. )/m, File.read!(@guide)) |> tl()
    assert Enum.map(sections, &(&1 |> String.split(".") |> hd())) == @sections
    assert Enum.all?(sections, &(&1 =~ "```elixir" or &1 =~ "```python"))
  end

  for page <- @pages do
    @external_resource Path.join(@root, page)

    @tag timeout: 120_000
    test "every example of #{page} is as it says" do
      file = Path.join(@root, unquote(page))
      if unquote(page) in @in_application, do: start([DSPex.PythonBridge.Supervisor])
      blocks = file |> File.read!() |> blocks("elixir")
      assert blocks != []

      blocks
      |> Enum.map(&String.replace(&1, ~s(lm: "openai/gpt-4o-mini"), ~s(lm: "offline/echo")))
      |> then(&capture_io(fn -> run(&1, file) end))
    end
  end

  test "the handler of telemetry.md names a program where there is one" do
    [handler | _metrics] = @telemetry |> File.read!() |> blocks("elixir")

    # The host of the page has the package; here its stand-in may have been loaded by another test.
    {[{module, _code}], warnings} =
      Code.with_diagnostics(fn -> Code.compile_string(handler, @telemetry) end)

    assert Enum.all?(warnings, &(&1.message =~ ":telemetry.attach_many/4 is undefined"))
    stop = [:dspex, :bridge, :call, :stop]
    metadata = %{command: "ping", program_id: nil, result: :timeout}

    log = fn metadata ->
      capture_log(fn -> module.handle(stop, %{duration: 0}, metadata, nil) end)
    end

    assert log.(metadata) =~ "ping: timeout after 0 ms"

    assert log.(%{metadata | command: "execute_program", program_id: "qa"}) =~
             "execute_program of qa: timeout"

    assert log.(%{metadata | result: :ok}) == ""
  end

  # A tree that a page shows takes the place of the one before it.
  defp start(children) do
    _not_found = stop_supervised(:tree)
    supervisor = {Supervisor, :start_link, [children, [strategy: :one_for_one]]}
    start_supervised!(%{id: :tree, start: supervisor, type: :supervisor})
    assert children != []
  end

  defp blocks(text, language) do
    ~r/^```#{language}\n(.*?)^```$/ms
    |> Regex.scan(text, capture: :all_but_first)
    |> List.flatten()
  end

  # One after another, each with what those before it have bound.
  defp run(blocks, file) do
    Enum.reduce(blocks, {[], Code.env_for_eval([])}, fn code, {binding, env} ->
      cond do
        code =~ ~r/^import Config$/m ->
          configuration(code, file)
          {binding, env}

        # A part of a file that belongs to Mix.
        code =~ ~r/\A# mix\.exs\n/ ->
          Code.string_to_quoted!(code, file: file)
          {binding, env}

        true ->
          quoted = Code.string_to_quoted!(code, file: file)
          {_value, binding, env} = Code.eval_quoted_with_env(quoted, binding, env)
          if code =~ ~r/^children = /m, do: start(binding[:children])
          {binding, env}
      end
    end)
  end

  # As the application would read it when it starts.
  defp configuration(code, file) do
    [dspex: config] = Config.Reader.eval!(Path.rootname(file) <> ".exs", code, env: :prod)
    assert config != []
    Enum.each(config, &accepted/1)
  end

  defp accepted({:autostart, autostart?}), do: assert(is_boolean(autostart?))
  defp accepted({:python_bridge, opts}), do: assert({:ok, _} = Options.new(opts))
  defp accepted({:python_bridge_monitor, opts}), do: assert({:ok, _} = Monitor.options(opts))

  # No such folder is here; of a setting that it does not know, the check would speak first.
  defp accepted({:python_environment, settings}) do
    bridge = Application.fetch_env!(:dspex, :python_bridge)
    Helpers.put_config(:python_environment, settings)
    Helpers.put_config(:python_bridge, [])

    assert {:error, "no Python found: virtual_env names " <> _} =
             EnvironmentCheck.validate_environment()

    Application.put_env(:dspex, :python_bridge, bridge)
    Application.delete_env(:dspex, :python_environment)
  end

  defp place(code, dir) do
    [_, path] = Regex.run(~r/\A# (\S+\.py)\n/, code)
    file = Path.join(dir, path)
    File.mkdir_p!(Path.dirname(file))
    File.write!(file, code)
  end
end
