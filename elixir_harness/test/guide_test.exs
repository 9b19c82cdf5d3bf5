defmodule DSPex.GuideTest do
  @moduledoc """
  Runs the Elixir code of the pages, in order, and the Python of the guide. `offline/echo` takes the place of the LMs
  that some pages name.
  """

  # The guide changes the working directory, as a reader would, and the pages use the default names.
  use ExUnit.Case, async: false

  import ExUnit.CaptureIO

  alias DSPex.PythonBridge.{Bridge, EnvironmentCheck, Monitor, Options, Pool}
  alias DSPex.Test.{Helpers, Page}

  @root Path.expand("../..", __DIR__)
  @guide ~w(signatures agents streaming lms own-modules evaluating)
  @pages ~w(README.md docs/getting-started.md docs/deploying.md docs/security.md docs/settings.md docs/errors.md
            docs/coming-from.md docs/cluster.md docs/upgrading.md elixir_harness/usage-rules.md)
  # The readers of these have the application's own Bridge and Monitor.
  @in_application ~w(README.md docs/getting-started.md)

  # Those that begin with this line and have no other demands on that bridge share one, which imports DSPy once. The page
  # `lms` runs the line itself.
  @start ~s|{:ok, _} = Bridge.start_link(lm: "offline/echo")\n|
  @sharing ~w(docs/guide/agents.md docs/guide/streaming.md docs/errors.md docs/coming-from.md docs/upgrading.md)

  # The pools of these have one peer here: nothing on them needs the second, which would import DSPy, too.
  @one_peer ~w(docs/guide/streaming.md docs/guide/evaluating.md elixir_harness/usage-rules.md)

  setup_all do
    %{shared: start_supervised!({Bridge, Helpers.real_opts()})}
  end

  setup do
    Helpers.put_config(:python_bridge, python_executable: Helpers.python(), lm: "offline/echo")
    # A page shows the error of a missing key.
    Helpers.put_system_env("OPENAI_API_KEY", nil)
    on_exit(fn -> Enum.each([Bridge, Pool], &stop/1) end)
  end

  # Its name is free afterwards, also if the exit of the test has begun to stop it.
  defp stop(name) do
    if pid = Process.whereis(name) do
      ref = Process.monitor(pid)
      Bridge.stop(name)
      assert_receive {:DOWN, ^ref, :process, ^pid, _reason}, 10_000
    end
  end

  for page <- @guide do
    file = Path.join(@root, "docs/guide/#{page}.md")
    @external_resource file

    @tag :tmp_dir
    @tag timeout: 120_000
    test "every example of the guide's #{page} runs as shown", %{tmp_dir: dir, shared: bridge} do
      page = "docs/guide/#{unquote(page)}.md"
      set_up(page, dir)
      blocks = page |> Page.blocks() |> started(page, bridge) |> with_less(page)
      capture_io(fn -> run(blocks, unquote(file)) end)

      if unquote(page) == "lms",
        do: assert(File.read!(Path.join(dir, "recorded")) == "experiment triage\nautolog\n")
    end
  end

  # With the bridge of all in place of the one that the page starts: without programs, and under the default name.
  defp started(blocks, page, bridge) when page in @sharing do
    assert Enum.count(blocks, &String.contains?(&1, @start)) == 1
    {:ok, _} = Bridge.call(bridge, :cleanup)
    Process.register(bridge, Bridge)
    on_exit(fn -> Process.unregister(Bridge) end)
    Enum.map(blocks, &String.replace(&1, @start, ""))
  end

  defp started(blocks, _page, _bridge), do: blocks

  defp with_less(blocks, page) when page in @one_peer do
    assert Enum.any?(blocks, &(&1 =~ "pool_size: 2"))
    Enum.map(blocks, &String.replace(&1, "pool_size: 2", "pool_size: 1"))
  end

  defp with_less(blocks, _page), do: blocks

  # Does what the page asks of its reader before the Bridge starts: folders, files, MLflow, the optimizer.
  defp set_up(page, dir) do
    cwd = File.cwd!()
    File.cd!(dir)
    on_exit(fn -> File.cd!(cwd) end)
    File.cp!(Path.join(@root, "tests/fakes/mlflow.py"), Path.join(dir, "mlflow.py"))
    Helpers.put_system_env("MLFLOW_RECORD", Path.join(dir, "recorded"))

    for commands <- Page.blocks(page, "sh"), do: {_, 0} = System.cmd("sh", ["-e", "-c", commands])

    for code <- Page.blocks(page, "python"), file = place(code, dir), file =~ "optimize.py" do
      assert {_output, 0} = System.cmd(Helpers.python(), [file], stderr_to_stdout: true)
    end
  end

  for page <- @pages do
    @external_resource Path.join(@root, page)

    @tag timeout: 120_000
    test "every example of #{page} runs as shown", %{shared: bridge} do
      file = Path.join(@root, unquote(page))
      if unquote(page) in @in_application, do: start([DSPex.PythonBridge.Supervisor])
      blocks = Page.blocks(unquote(page))
      assert blocks != []

      blocks
      |> started(unquote(page), bridge)
      |> with_less(unquote(page))
      |> Enum.map(&String.replace(&1, ~s(lm: "openai/gpt-4o-mini"), ~s(lm: "offline/echo")))
      |> then(&capture_io(fn -> run(&1, file) end))
    end
  end

  test "the health report of deploying.md works in the tree of a pool, and of a bridge" do
    [module] = for code <- Page.blocks("docs/deploying.md"), code =~ "MyApp.Health", do: code
    # The page's own test compiles it, too.
    {[{health, _code}], _warnings} = Code.with_diagnostics(fn -> Code.compile_string(module) end)
    on_exit(fn -> :code.delete(health) && :code.purge(health) end)

    for {tree, count} <- [{{Pool, pool_size: 2}, 2}, {DSPex.PythonBridge.Supervisor, 1}] do
      start([tree])
      up? = fn -> Enum.all?(health.report(), &(&1.bridge.state == :running)) end
      Helpers.eventually(up?, 10_000)
      assert [%{status: :unknown, last_check: nil, checks: 0} | _] = reports = health.report()
      assert length(reports) == count

      for %{bridge: %{os_pid: os_pid, restarts: 0, last_error: nil}} <- reports,
          do: assert(is_integer(os_pid))
    end
  end

  # Each supervision tree of a page replaces the one before it.
  defp start(children) do
    _not_found = stop_supervised(:tree)
    supervisor = {Supervisor, :start_link, [children, [strategy: :one_for_one]]}
    start_supervised!(%{id: :tree, start: supervisor, type: :supervisor})
    assert children != []
  end

  # One after another, each with the bindings of those before it.
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

  # As the application reads it at its start.
  defp configuration(code, file) do
    [dspex: config] = Config.Reader.eval!(Path.rootname(file) <> ".exs", code, env: :prod)
    assert config != []
    Enum.each(config, &accepted/1)
  end

  defp accepted({:autostart, autostart?}), do: assert(is_boolean(autostart?))
  defp accepted({:python_bridge, opts}), do: assert({:ok, _} = Options.new(opts))
  defp accepted({:python_bridge_monitor, opts}), do: assert({:ok, _} = Monitor.options(opts))

  # The folder does not exist here. The check would report an unknown setting first.
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
    file
  end
end
