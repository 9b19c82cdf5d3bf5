defmodule DSPex.PythonBridge.Doctor.DoctorTest do
  # The checks read the application's configuration.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import ExUnit.CaptureIO

  alias DSPex.PythonBridge.Doctor

  @moduletag :tmp_dir
  @moduletag :capture_log

  @names ~w(configuration interpreter version dspy psutil litellm optimizers script package folders) ++
           ~w(ping program programs lm)
  @key "sk-0123456789abcdef"

  setup :only_python

  defmodule Triage do
    def definition, do: %{id: "triage", signature: "ticket -> team"}
  end

  # By name.
  defp run(opts \\ []), do: Map.new(Doctor.run(opts), &{&1.name, &1})

  # Without a peer that answers: a test of the checks before it does not pay for the import of DSPy.
  defp run_without_peer(opts \\ []), do: run([start_timeout: 1] ++ opts)

  defp statuses(checks, names), do: for(name <- names, do: checks[name].status)
  defp says(dir, answer), do: use_interpreter(dir, "echo 'DSPEX #{JSON.encode!(answer)}'")

  # A peer's script by its looks.
  defp peer(dir, source) do
    path = Path.join(dir, "peer.py")
    File.write!(path, "# class DSPyBridge, def handle_command, def main():\n" <> source)
    path
  end

  test "a good environment: all checks, in order, each when it is done; the peer is gone after" do
    me = self()
    put_config(:python_bridge, programs: [%{id: "qa", signature: "q -> a"}, Triage])
    checks = Doctor.run(lm: "offline/echo", each: &send(me, &1))
    assert Enum.map(checks, & &1.name) == @names
    for check <- checks, do: assert(%{status: :ok, advice: nil} = check)
    for check <- checks, do: assert_received(^check)
    checks = Map.new(checks, &{&1.name, &1.found})
    assert checks["interpreter"] =~ "#{python()} (the environment variable PYTHON_EXECUTABLE)"
    assert checks["dspy"] =~ ~r/^3\.4\./
    assert checks["script"] == Application.app_dir(:dspex, "priv/python/dspy_bridge.py")
    assert checks["ping"] =~ ~r/^answered \d+ ms after its start$/
    assert checks["program"] =~ "offline/echo answered"
    assert checks["programs"] == "2 declared, and created"
  end

  test "in a release's eval the application is not loaded", %{tmp_dir: dir} do
    code = """
    false = List.keymember?(Application.loaded_applications(), :dspex, 0)
    IO.puts DSPex.PythonBridge.Doctor.print()
    """

    config = Path.join(dir, "sys.config")
    options = ~s({lm, <<"offline/echo">>}, {script_path, <<"#{fake("healthy")}">>})
    File.write!(config, "[{dspex, [{python_bridge, [#{options}]}]}].")
    args = ["--erl", "-config sys", "-pa", Application.app_dir(:dspex, "ebin"), "-e", code]
    assert {output, 0} = System.cmd("elixir", args, cd: dir, stderr_to_stdout: true)
    assert output =~ "lm            offline/echo, which is built in"
    assert output =~ "All is well.\ntrue\n"
  end

  test "declared programs that are wrong are named, each with the reason" do
    wrong = [
      %{id: "bad type", signature: %{inputs: [%{name: "q", type: "strng"}], outputs: []}},
      Triage,
      %{id: "no json", lm: %{model: "x", api_key: {:system, @key}}}
    ]

    checks = run(programs: wrong, lm: "offline/echo")
    assert %{status: :failed, found: found, advice: advice} = checks["programs"]
    assert found =~ "bad type: signature.inputs[0].type: unknown type 'strng'"
    assert found =~ "; no json: args.lm.api_key: a tuple has no JSON form"
    refute found =~ "triage" or found =~ @key
    assert advice =~ ":programs"
    # They do not make another check fail.
    assert statuses(checks, ~w(ping program lm)) == [:ok, :ok, :ok]
  end

  describe "the configuration" do
    test "misspelt keys, with suggestions; all errors at once; the other checks run" do
      put_config(:python_bridg, lm: "x")
      put_config(:python_bridge_monitor, intervall: 5)
      checks = run(script_path: fake("healthy"))

      assert %{status: :failed, found: text, advice: "correct it in config/"} =
               checks["configuration"]

      assert text =~ "unknown option :python_bridg, did you mean :python_bridge?"
      assert text =~ "unknown option :intervall, did you mean :interval?"
      assert checks["program"].status == :ok
    end

    test "wrong options: checks that depend on them are skipped" do
      put_config(:python_bridge, max_retrys: 1)
      checks = run()
      assert %{status: :failed, found: found} = checks["configuration"]
      assert found =~ "unknown option :max_retrys, did you mean"
      assert checks["interpreter"].found == "needs configuration"
      assert statuses(checks, tl(@names)) == List.duplicate(:skipped, 13)
    end
  end

  describe "the interpreter" do
    test "none" do
      put_system_env("PYTHON_EXECUTABLE", "/no/such/python")
      checks = run()
      assert %{status: :failed, found: found, advice: advice} = checks["interpreter"]
      assert found =~ "PYTHON_EXECUTABLE names /no/such/python"
      assert advice =~ "mix dspex.setup"
      assert statuses(checks, ~w(version dspy ping lm)) == List.duplicate(:skipped, 4)
    end
  end

  describe "packages" do
    test "that are missing: what installs them, and never into a shared Python", %{tmp_dir: dir} do
      put_config(:python_environment, required_packages: ["mlflow", "dspy-ai"])
      answer = %{version: "3.11.0", found: %{psutil: "5.9"}, venv: true}
      python = says(dir, answer)
      checks = run()
      assert %{status: :failed, found: found, advice: advice} = checks["dspy"]
      assert found =~ "not installed in #{dir}" and advice =~ "mix dspex.setup"
      assert advice =~ "or install 'dspy>=3.4.1,<4' there"
      assert checks["mlflow"].advice =~ "install 'mlflow' there"
      refute Map.has_key?(checks, "dspy-ai")
      assert checks["ping"].found == "needs package" or checks["ping"].found == "needs dspy"

      says(dir, %{answer | venv: false})
      refute run()["dspy"].advice =~ "install '"
      assert python
    end

    test "in versions that are not tested", %{tmp_dir: dir} do
      for {dspy, status} <-
            [{"3.4.0", :failed}, {"3.4.1", :ok}, {"3.4.12", :ok}] ++
              [{"4.0.0rc1", :failed}, {"4.1", :failed}, {"3.5.2.post1", :ok}] do
        says(dir, %{version: "3.11.0", found: %{dspy: dspy, psutil: "5.9"}})
        checks = run_without_peer()
        assert {dspy, checks["dspy"].status} == {dspy, status}
      end
    end

    test "of LiteLLM and optimizers: notes", %{tmp_dir: dir} do
      answer = %{version: "3.11.0", found: %{dspy: "3.4.1", psutil: "5.9"}}
      lacking = "all but mipro_v2 (needs optuna>=3.4) and simba (needs numpy>=1.26)"
      setup = ": `mix dspex.setup --with optimizers`"

      for {found, text} <- [
            {%{}, lacking <> setup},
            {%{numpy: "1.25", optuna: "5.0.0"}, "all but simba (needs numpy>=1.26)" <> setup},
            {%{numpy: "1.26.4", optuna: "3.4"}, "all of them, with numpy 1.26.4, optuna 3.4"}
          ] do
        says(dir, put_in(answer.found, Map.merge(answer.found, found)))
        checks = run_without_peer()
        assert %{found: ^text, advice: nil} = checks["optimizers"]
        assert %{status: :note, advice: nil, found: found} = checks["litellm"]
        assert found =~ "`mix dspex.setup --with litellm`"
      end
    end

    test "requirements are those of the Python package" do
      project = File.read!(Application.app_dir(:dspex, "priv/python/package/pyproject.toml"))

      for package <- ~w(dspy psutil numpy optuna),
          do: assert(project =~ ~s("#{Doctor.requirement(package)}"))
    end
  end

  test "a script that is missing, and one whose package is nowhere", %{tmp_dir: dir} do
    checks = run_without_peer(script_path: "no/peer.py")
    assert checks["script"].found =~ "script not found: #{File.cwd!()}/no/peer.py"
    assert checks["package"].found == "needs script"

    script = peer(dir, "from dspy_bridge import x\n")
    says(dir, %{version: "3.11.0", found: %{dspy: "3.4.1", psutil: "6"}, bridge: false})
    assert %{status: :failed, found: found, advice: advice} = run(script_path: script)["package"]
    assert found =~ "neither next to #{script}" and advice =~ "mix dspex.setup"
  end

  test "folders: those that are set; a cache's may be missing", %{tmp_dir: dir} do
    cache = Path.join(dir, "not/yet")
    env = %{"DSPY_BRIDGE_STATE_DIR" => dir, "DSPY_BRIDGE_DISK_CACHE" => cache}
    assert %{status: :ok, found: found} = run_without_peer(env: env)["folders"]
    assert found == "DSPY_BRIDGE_STATE_DIR #{dir}, DSPY_BRIDGE_DISK_CACHE #{cache}"

    env = %{"DSPY_BRIDGE_STATE_DIR" => "/no/states"}
    assert %{status: :failed, found: found} = run_without_peer(env: env)["folders"]
    assert found =~ "DSPY_BRIDGE_STATE_DIR: this user cannot use a folder /no/states"
    # What the caller does not count as a failure.
    assert %{status: :note} = run_without_peer(env: env, notes: ["folders"])["folders"]
  end

  describe "the peer" do
    test "that refuses its settings: its own error text" do
      checks = run(adapter: "no_such")
      assert %{status: :failed, found: found, advice: advice} = checks["ping"]
      assert found =~ "dspy_bridge: DSPY_BRIDGE_ADAPTER" and advice =~ "correct the option"
      assert checks["program"].found == "needs ping"
    end

    test "that hangs: no answer; it is killed", %{tmp_dir: dir} do
      pid = Path.join(dir, "pid")
      hangs = "import os, time\nopen('#{pid}', 'w').write(str(os.getpid()))\ntime.sleep(600)"
      checks = run(script_path: peer(dir, hangs), start_timeout: 1_000)
      assert %{status: :failed, found: found} = checks["ping"]
      assert found =~ "no answer to its first ping within 1000 ms"
      os_pid = File.read!(pid)
      eventually(fn -> not alive?(os_pid) end)
    end

    test "whose LM options DSPy refuses, by either check, without what is secret in them" do
      checks = run(lm: "openai/x", lm_options: %{num_retries: "many", api_key: @key})
      assert %{status: :failed, found: found} = checks["program"]
      assert found =~ "DSPY_BRIDGE_LM_OPTIONS: lm: num_retries"
      assert %{status: :failed, found: found} = checks["lm"]
      assert found =~ "openai/x: it or its options are refused: ValueError: num_retries"
      refute inspect(checks) =~ @key
    end
  end

  test "print: a line for each check, and one with what to do; in ASCII without Unicode" do
    put_system_env("PYTHON_EXECUTABLE", "/no/such/python")
    text = capture_io(fn -> refute Doctor.print() end)
    assert text =~ "✓ configuration its keys and types are right"
    assert text =~ ~r/✗ interpreter   no Python found: .*\n {16}-> name one/
    assert text =~ "– version       skipped: needs interpreter\n"
    assert text =~ ~r/\nFailed: 1 of 14\.\n\z/
    text = capture_io([encoding: :latin1], fn -> refute Doctor.print() end)
    assert text =~ "\nx interpreter   no Python found"
    assert for(<<byte <- text>>, byte > 127, do: byte) == []
  end
end
