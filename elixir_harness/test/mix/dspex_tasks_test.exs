defmodule Mix.Tasks.DspexTasksTest do
  # What they print and how they exit; what they find and make is tested where that is done.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias Mix.Tasks.Dspex.{Doctor, Setup}

  @moduletag :tmp_dir

  setup %{tmp_dir: dir} do
    shell = Mix.shell()
    Mix.shell(Mix.Shell.Process)
    on_exit(fn -> Mix.shell(shell) && Logger.delete_application_level(:dspex) end)
    put_system_env("DSPY_VENV", nil)
    put_system_env("PYTHON_EXECUTABLE", python())
    put_system_env("MIX_BUILD_PATH", Path.join(dir, "build"))
    put_config(:python_environment, [])
    # A peer without DSPy, whose import takes longer than all else here.
    put_config(:python_bridge, lm: "offline/echo", script_path: fake("healthy"))
  end

  # What a task printed, and its exit status.
  defp run(task, args) do
    status =
      try do
        task.run(args)
        0
      catch
        :exit, {:shutdown, status} -> status
      end

    {printed(), status}
  end

  defp printed do
    receive do
      {:mix_shell, :info, [line]} -> line <> "\n" <> printed()
    after
      0 -> ""
    end
  end

  # A uv that makes an environment with what the interpreter of the tests has, and installs nothing.
  defp uv(dir) do
    bin = Path.join(dir, "bin")
    File.mkdir_p!(bin)

    File.write!(Path.join(bin, "uv"), """
    #!/bin/sh
    test "$1" = venv || exit 0
    for folder; do :; done
    #{python()} -m venv --without-pip "$folder"
    cd "$folder"/lib/python3.*/site-packages
    #{python()} -c 'import site; print(site.getsitepackages()[0])' > all.pth
    """)

    File.chmod!(Path.join(bin, "uv"), 0o755)
    put_system_env("PATH", "#{bin}:#{System.get_env("PATH")}")
  end

  describe "dspex.doctor" do
    test "prints each check, and exits with 0" do
      {text, status} = run(Doctor, [])
      assert status == 0
      assert text =~ ~r/^✓ configuration /
      assert text =~ "✓ lm            offline/echo"
      assert String.ends_with?(text, "\nAll is well.\n")
    end

    test "--ask: one check more; exits with 1 when any has failed" do
      put_config(:python_bridge, script_path: fake("healthy"), adapter: "x", lm: 5)
      assert {text, 1} = run(Doctor, ["--ask"])
      assert text =~ "✗ configuration " and text =~ "– ask           skipped: needs lm"
    end

    test "refuses unknown arguments" do
      assert_raise OptionParser.ParseError, ~r/--jsn/, fn -> Doctor.run(["--jsn"]) end
      assert_raise Mix.Error, ~r/takes no now/, fn -> Doctor.run(["now"]) end
    end
  end

  describe "dspex.setup" do
    test "makes it in the default folder, and runs the doctor", %{tmp_dir: dir} do
      # Which is to find the real one.
      put_config(:python_bridge, lm: "offline/echo")
      uv(dir)
      folder = Path.join(dir, "build/dspex_venv")
      {text, status} = run(Setup, [])
      assert status == 0
      assert text =~ "making #{folder} with uv"
      assert text =~ "✓ interpreter   #{folder}/bin/python3 ("
      assert text =~ "✓ program "
      path = Path.relative_to(folder, Path.expand("config"), force: true)

      assert text =~
               "To use it, have this in config/config.exs:\n\n    config :dspex, :python_environment, " <>
                 "virtual_env: Path.expand(\"#{path}\", __DIR__)\n"
    end

    test "makes the one that is configured, and prints no instructions then", %{tmp_dir: dir} do
      uv(dir)
      folder = Path.join(dir, "mine")
      put_config(:python_environment, virtual_env: folder)
      {text, 0} = run(Setup, [])
      assert text =~ "making #{folder}" and not (text =~ "To use it")
    end

    test "--path, --with: makes it there, with it", %{tmp_dir: dir} do
      uv(dir)
      put_config(:python_bridge, python_executable: python(), script_path: fake("healthy"))
      folder = Path.join(dir, "there")
      args = ["--path", Path.relative_to_cwd(folder), "--python", python()]
      {text, 0} = run(Setup, args ++ ["--with", "optimizers"])
      assert text =~ "making #{folder} with uv from #{python()}, Python 3."
      assert text =~ "and remove :python_executable from :python_bridge, which comes first"
      assert text =~ ~r/✓ optimizers    all of them, with numpy \d.*, optuna \d/
      manifest = JSON.decode!(File.read!(Path.join(folder, "dspex_setup.json")))
      assert %{"extras" => ["optimizers"]} = manifest
    end

    test "one line if nothing can be made", %{tmp_dir: dir} do
      assert_raise Mix.Error, ~r/^no Python found: --python names \/no\/python.*$/, fn ->
        Setup.run(["--python", "/no/python"])
      end

      assert_raise Mix.Error, ~r/--with dspy is not known; .*: litellm, optimizers$/, fn ->
        Setup.run(["--with", "dspy"])
      end

      assert_raise Mix.Error, ~r/did you mean --path #{dir}\?/, fn -> Setup.run([dir]) end

      assert_raise Mix.Error,
                   ~r/--release: there is no folder #{dir}\/rel; run `mix release`/,
                   fn ->
                     Setup.run(["--release", "#{dir}/rel"])
                   end

      assert_raise Mix.Error, "--path and --release exclude each other", fn ->
        Setup.run(["--release", dir, "--path", dir])
      end

      refute File.exists?(Path.join(dir, "build/dspex_venv"))
    end
  end

  test "by default the environment is next to the builds of all environments of Mix" do
    put_system_env("MIX_BUILD_PATH", nil)
    assert Mix.DSPex.default_venv() == Path.expand("_build/dspex_venv")
    line = Mix.DSPex.config_line(Path.expand("_build/dspex_venv"))
    assert String.ends_with?(line, ~s|virtual_env: Path.expand("../_build/dspex_venv", __DIR__)|)
    assert Mix.DSPex.config_line("/opt/venv") =~ ~s(virtual_env: "/opt/venv")
  end

  # Another project, in the folder `dir`.
  defp in_project(dir, config, fun) do
    name = Module.concat(__MODULE__, "Project#{System.unique_integer([:positive])}")
    config = Macro.escape([app: :another, version: "0.1.0"] ++ config)
    Module.create(name, quote(do: def(project, do: unquote(config))), Macro.Env.location(__ENV__))
    File.mkdir_p!(dir)
    Mix.Project.push(name)

    try do
      File.cd!(dir, fun)
    after
      Mix.Project.pop()
      # Mix prints once of which project the next lines are; those are another test's.
      Mix.shell().print_app()
    end
  end

  test "in a child of an umbrella the line is for the umbrella's file", %{tmp_dir: dir} do
    child = [config_path: "../../config/config.exs", build_path: "../../_build"]

    in_project(Path.join(dir, "apps/child"), child, fn ->
      line = Mix.DSPex.config_line(Path.join(dir, "_build/dspex_venv"))

      assert String.ends_with?(
               line,
               ~s|virtual_env: Path.expand("../_build/dspex_venv", __DIR__)|
             )

      assert Mix.DSPex.config_file() == {:missing, "../../config/config.exs"}
    end)
  end
end
