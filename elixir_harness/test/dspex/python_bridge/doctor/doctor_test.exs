defmodule DSPex.PythonBridge.Doctor.DoctorTest do
  # The checks read the application's configuration.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import ExUnit.CaptureIO
  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.Doctor
  alias DSPex.PythonBridge.Doctor.Packages
  alias DSPex.Test.Nodes

  @moduletag :tmp_dir

  @names ~w(configuration interpreter version dspy psutil optimizers script package folders) ++
           ~w(ping program programs lm)
  @key "sk-0123456789abcdef"

  setup :only_python

  # By name.
  defp run(opts \\ []) do
    checks = Doctor.run(opts)
    assert Doctor.ok?(checks) == Enum.all?(checks, &(&1.status != :failed))
    Map.new(checks, &{&1.name, &1})
  end

  # Without a peer that answers: a test of the checks before it does not pay for the import of DSPy.
  defp run_without_peer(opts \\ []), do: run([start_timeout: 1] ++ opts)

  # With one that answers at once, without DSPy.
  defp run_with_fake(opts \\ []), do: run([script_path: fake("healthy")] ++ opts)

  defp statuses(checks, names), do: for(name <- names, do: checks[name].status)

  defp says(dir, answer), do: use_interpreter(dir, "echo 'DSPEX #{JSON.encode!(answer)}'")

  # A peer's script by its looks.
  defp peer(dir, source) do
    path = Path.join(dir, "peer.py")
    File.write!(path, "# class DSPyBridge, def handle_command, def main():\n" <> source)
    path
  end

  describe "a good environment" do
    test "all checks, in order, each when it is done; real DSPy answers, and takes what is declared" do
      me = self()

      put_config(:python_bridge,
        programs: [%{id: "qa", signature: "q -> a"}, __MODULE__.Triage]
      )

      checks = Doctor.run(lm: "offline/echo", each: &send(me, &1))
      assert Enum.map(checks, & &1.name) == @names
      assert Enum.map(checks, & &1.status) == List.duplicate(:ok, 13)
      assert Enum.map(checks, & &1.advice) == List.duplicate(nil, 13)
      for check <- checks, do: assert_received(^check)
      checks = Map.new(checks, &{&1.name, &1.found})
      assert checks["interpreter"] =~ "#{python()} (the environment variable PYTHON_EXECUTABLE)"
      assert checks["version"] =~ ~r/^3\.\d+\.\d+$/
      assert checks["dspy"] =~ ~r/^3\.4\./
      assert checks["script"] == Application.app_dir(:dspex, "priv/python/dspy_bridge.py")
      assert checks["ping"] =~ ~r/^answered \d+ ms after its start$/
      assert checks["program"] =~ "offline/echo answered"
      assert checks["programs"] == "2 declared, and created"
    end

    test "it leaves no process and no message, and takes no name", %{tmp_dir: dir} do
      Process.flag(:trap_exit, true)
      Process.register(self(), :doctor_test)
      put_config(:python_bridge, name: :doctor_test)
      # Its path is that of no other peer.
      script = Path.join(dir, "healthy.py")
      for name <- ["healthy", "frames"], do: File.cp!(fake(name), Path.join(dir, "#{name}.py"))
      before = Process.list()
      checks = run(script_path: script, lm: "offline/echo")
      assert %{status: :ok} = checks["program"]
      refute_received _anything
      eventually(fn -> Process.list() -- before == [] end)
      eventually(fn -> not (elem(System.cmd("ps", ["-eo", "args"]), 0) =~ script) end)
    end

    test "it logs nothing, neither here nor, by rpc, on the caller's node" do
      Nodes.distribute()
      node = Nodes.start()
      level = Logger.level()
      on_exit(fn -> Logger.configure(level: level) end)
      opts = [python_executable: python(), script_path: fake("healthy")]
      me = self()

      log =
        capture_log(fn ->
          Logger.configure(level: :debug)

          for on <- [node(), node] do
            Nodes.on(on, Logger, :configure, [[level: :debug]])
            send(me, {:made, Nodes.on(on, Doctor, :run, [opts])})
            filters = Nodes.on(on, :logger, :get_primary_config, []).filters
            refute Keyword.has_key?(filters, :dspex_doctor)
          end
        end)

      for _on <- [1, 2], do: assert_received({:made, checks} when length(checks) == 13)
      refute log =~ "bridge"
    end

    test "works without the application running", %{tmp_dir: dir} do
      code = """
      false = List.keymember?(Application.loaded_applications(), :dspex, 0)
      IO.puts DSPex.PythonBridge.Doctor.print()
      """

      # As that of a release.
      config = Path.join(dir, "sys.config")
      options = ~s({lm, <<"offline/echo">>}, {script_path, <<"#{fake("healthy")}">>})
      File.write!(config, "[{dspex, [{python_bridge, [#{options}]}]}].")

      args = ["--erl", "-config sys", "-pa", Application.app_dir(:dspex, "ebin"), "-e", code]
      assert {output, 0} = System.cmd("elixir", args, cd: dir, stderr_to_stdout: true)
      assert output =~ "offline/echo answered"
      assert output =~ "lm            offline/echo, which is built in"
      assert output =~ "All is well.\ntrue\n"
    end
  end

  describe "declared programs" do
    defmodule Triage do
      def definition, do: %{id: "triage", signature: "ticket -> team"}
    end

    test "that are wrong are named, each with the reason" do
      wrong = [
        %{id: "bad type", signature: %{inputs: [%{name: "q", type: "strng"}], outputs: []}},
        Triage,
        %{id: "no json", lm: %{model: "x", api_key: {:system, @key}}}
      ]

      checks = run(programs: wrong, lm: "offline/echo")
      assert %{status: :failed, found: found, advice: advice} = checks["programs"]
      assert found =~ "bad type: signature.inputs[0].type: unknown type 'strng'"
      assert found =~ "; no json: args.lm.api_key: a tuple has no JSON form"
      refute found =~ "triage"
      refute found =~ @key
      assert advice =~ ":programs"
      # They do not make another check fail.
      assert statuses(checks, ~w(ping program lm)) == [:ok, :ok, :ok]
    end

    test "that stand beside the options of the bridge are named" do
      put_config(:programs, [Triage])
      assert %{status: :failed, found: found} = run_without_peer()["configuration"]
      assert found == "config :dspex, :programs: they belong to :python_bridge"
    end
  end

  describe "the configuration" do
    test "misspelt keys, with suggestions; all errors at once; the other checks run" do
      put_config(:python_bridg, lm: "x")
      put_config(:python_bridge_monitor, intervall: 5)
      checks = run_with_fake()
      assert %{status: :failed, found: text} = checks["configuration"]
      assert text =~ "unknown option :python_bridg, did you mean :python_bridge?"
      assert text =~ "unknown option :intervall, did you mean :interval?"
      assert checks["program"].status == :ok
    end

    test "keys of the application's own are ignored" do
      put_config(:something_else, 1)
      assert run_without_peer()["configuration"].status == :ok
    end

    test "wrong types, and a misspelt option: checks that depend on them are skipped" do
      for {key, value, text} <- [
            {:python_bridge, [max_retrys: 1], "unknown option :max_retrys, did you mean"},
            {:python_bridge, [lm: 5], ":lm: expected a string, or a map with model"},
            {:python_bridge, "lm", "expected a keyword list"},
            {:python_environment, [virtual_env: 5], "virtual_env: expected the path of a folder"},
            {:python_environment, [virtualenv: "x"], "did you mean :virtual_env?"}
          ] do
        before = Application.get_env(:dspex, key)
        Application.put_env(:dspex, key, value)
        checks = run()
        Application.put_env(:dspex, key, before)
        assert %{status: :failed, found: found} = checks["configuration"]
        assert found =~ inspect(key) and found =~ text
        assert checks["interpreter"].found == "needs configuration"
        assert statuses(checks, tl(@names)) == List.duplicate(:skipped, 12)
      end
    end
  end

  describe "the interpreter" do
    test "none" do
      put_system_env("PYTHON_EXECUTABLE", "/no/such/python")
      checks = run()
      assert %{status: :failed, found: found, advice: advice} = checks["interpreter"]
      assert found =~ "PYTHON_EXECUTABLE names /no/such/python"
      assert advice =~ "mix dspex.setup"
      skipped = ~w(version dspy psutil package ping program lm)
      assert statuses(checks, skipped) == List.duplicate(:skipped, 7)
      assert statuses(checks, ~w(script folders)) == [:ok, :ok]
    end

    test "a relative path that only works from here is noted", %{tmp_dir: dir} do
      venv = Path.relative_to_cwd(dir)
      File.mkdir_p!(Path.join(dir, "bin"))
      File.ln_s!(python(), Path.join(dir, "bin/python"))
      put_config(:python_environment, virtual_env: venv)
      assert %{status: :note, found: found, advice: advice} = run_without_peer()["interpreter"]
      assert found == "#{dir}/bin/python (virtual_env in config :dspex, :python_environment)"
      assert advice =~ "give an absolute path"
    end

    test "too old", %{tmp_dir: dir} do
      says(dir, %{version: "3.8.10", found: %{}})
      checks = run()
      assert %{status: :failed, found: found, advice: advice} = checks["version"]
      assert found =~ "3.8.10, needed is 3.10" and advice =~ "3.10 or newer"
      assert advice =~ "mix dspex.setup --path FOLDER --python PYTHON"
      assert checks["dspy"].found == "needs version"
    end
  end

  describe "packages" do
    test "a virtual environment that lacks them, for real", %{tmp_dir: dir} do
      venv = Path.join(dir, "venv of mine")
      {_, 0} = System.cmd(python(), ["-m", "venv", "--without-pip", venv])
      put_config(:python_environment, virtual_env: venv)
      checks = run()
      assert %{status: :failed, found: found, advice: advice} = checks["dspy"]
      assert found == "not installed in #{venv}/bin/python3"
      assert advice =~ "mix dspex.setup"
      assert advice =~ "or install 'dspy>="

      assert checks["psutil"].status == :failed
      assert checks["ping"].found == "needs dspy"
      assert statuses(checks, ~w(program lm)) == [:skipped, :skipped]
    end

    test "what to install into an environment, and never into a shared Python", %{
      tmp_dir: dir
    } do
      put_config(:python_environment, required_packages: ["mlflow"])

      answer = %{version: "3.11.0", found: %{psutil: "5.9"}}
      says(dir, Map.put(answer, :venv, true))
      checks = run()
      assert checks["mlflow"].advice == "install 'mlflow' there"
      assert checks["dspy"].advice =~ "makes an environment with it, or install 'dspy>="

      says(dir, Map.put(answer, :venv, false))
      checks = run()
      assert checks["dspy"].advice == "`mix dspex.setup` makes an environment with it"

      assert checks["mlflow"].advice ==
               "`mix dspex.setup` makes a virtual environment; install 'mlflow' there"
    end

    test "versions that are not tested", %{tmp_dir: dir} do
      for {dspy, status} <-
            [{"3.4.0", :failed}, {"3.4.1", :ok}, {"3.4.12", :ok}] ++
              [{"4.0.0rc1", :failed}, {"4.1", :failed}, {"3.5.2.post1", :ok}] do
        says(dir, %{version: "3.11.0", found: %{dspy: dspy, psutil: "5.9"}})
        checks = run()
        assert {dspy, checks["dspy"].status} == {dspy, status}
        assert checks["psutil"].status == :ok
      end
    end

    test "further packages that the configuration requires" do
      put_config(:python_environment, required_packages: ["dspy-ai", "no-such-package"])
      checks = run_without_peer()
      assert checks["no-such-package"].status == :failed
      assert checks["no-such-package"].advice =~ "install 'no-such-package' there"
      assert checks["dspy"].status == :ok
      refute Map.has_key?(checks, "dspy-ai")
    end

    test "optimizers that lack theirs, or have it in an old version, are noted", %{tmp_dir: dir} do
      answer = %{version: "3.11.0", found: %{dspy: "3.4.1", psutil: "5.9"}}
      says(dir, answer)
      lacking = "all but mipro_v2 (needs optuna>=3.4) and simba (needs numpy>=1.26)"
      found = lacking <> ": `mix dspex.setup --with optimizers`"
      assert %{status: :note, found: ^found, advice: nil} = run()["optimizers"]

      for {found, text} <- [
            {%{numpy: "2.4.6"}, "all but mipro_v2 (needs optuna>=3.4): `mix"},
            {%{numpy: "1.25", optuna: "5.0.0"}, "all but simba (needs numpy>=1.26): `mix"},
            {%{numpy: "1.26.4", optuna: "3.4"}, "all of them, with numpy 1.26.4, optuna 3.4"}
          ] do
        says(dir, put_in(answer.found, Map.merge(answer.found, found)))
        assert run()["optimizers"].found =~ text
      end
    end

    test "requirements are those of the Python package" do
      project = File.read!(Application.app_dir(:dspex, "priv/python/package/pyproject.toml"))

      for package <- Packages.needed() ++ Packages.optimizers(),
          do: assert(project =~ ~s("#{Packages.requirement(package)}"))
    end
  end

  describe "the script" do
    test "that is missing, by a relative path: where it was searched for" do
      put_config(:python_bridge, script_path: "no/peer.py")
      checks = run()
      assert %{status: :failed, found: found} = checks["script"]
      assert found =~ "script not found: #{File.cwd!()}/no/peer.py"
      assert found =~ "give an absolute path"
      assert checks["package"].found == "needs script"
    end

    test "whose package is nowhere", %{tmp_dir: dir} do
      script = peer(dir, "from dspy_bridge import x\n")
      says(dir, %{version: "3.11.0", found: %{dspy: "3.4.1", psutil: "6"}, bridge: false})
      checks = run(script_path: script)
      assert %{status: :failed, found: found, advice: advice} = checks["package"]
      assert found =~ "neither next to #{script}" and advice =~ "mix dspex.setup"
      assert checks["ping"].found == "needs package"
    end
  end

  describe "folders" do
    defp folders(env), do: run_without_peer(env: env)["folders"]

    test "that are set are listed; a cache's may be missing", %{tmp_dir: dir} do
      cache = Path.join(dir, "not/yet")
      env = %{"DSPY_BRIDGE_STATE_DIR" => dir, "DSPY_BRIDGE_DISK_CACHE" => cache}
      assert %{status: :ok, found: found} = folders(env)
      assert found == "DSPY_BRIDGE_STATE_DIR #{dir}, DSPY_BRIDGE_DISK_CACHE #{cache}"
    end

    test "that are missing, or are not folders, each with its setting", %{tmp_dir: dir} do
      file = Path.join(dir, "file")
      File.write!(file, "")

      env = %{
        "DSPY_BRIDGE_STATE_DIR" => "no/states",
        "DSPY_BRIDGE_FILES_DIR" => file,
        "DSPY_BRIDGE_DISK_CACHE" => Path.join(file, "cache")
      }

      assert %{status: :failed, found: found} = folders(env)
      assert found =~ "DSPY_BRIDGE_STATE_DIR names #{File.cwd!()}/no/states, where there is no"
      assert found =~ "give an absolute path"
      assert found =~ "DSPY_BRIDGE_FILES_DIR names #{file}, which is not a folder"

      assert found =~
               "DSPY_BRIDGE_DISK_CACHE names #{file}/cache, which cannot be made in #{file}"
    end
  end

  test "a failure that the caller does not count is a note", %{tmp_dir: dir} do
    # What DSPy says of the key is tested with Doctor.LM.
    facts = JSON.encode!(%{engine: "litellm", known: true, lacks: ["SOME_API_KEY"], set: []})
    script = ~s(case "$1" in */check_lm.py\) echo 'DSPEX #{facts}'; exit;; esac\n)
    use_interpreter(dir, script <> ~s(exec #{python()} "$@"))

    opts = [
      script_path: fake("healthy"),
      lm: "openai/gpt-4o-mini",
      env: %{"DSPY_BRIDGE_STATE_DIR" => "/no/states"},
      notes: ["lm", "folders"]
    ]

    checks = run(opts)
    assert %{status: :note, found: "openai/gpt-4o-mini: its key is not set"} = checks["lm"]
    assert %{status: :note, advice: advice} = checks["folders"]
    assert advice != nil
    assert for({name, %{status: :failed}} <- checks, do: name) == []
  end

  describe "the peer" do
    test "that refuses its settings: its own error text" do
      checks = run(adapter: "no_such")
      assert %{status: :failed, found: found, advice: advice} = checks["ping"]
      assert found =~ "the peer does not start: dspy_bridge: DSPY_BRIDGE_ADAPTER"

      assert advice =~ "correct what it names: an option of the bridge" and
               advice =~ "mix dspex.setup"

      assert checks["program"].found == "needs ping"
    end

    test "that hangs: no answer; it is killed, and not logged as well",
         %{
           tmp_dir: dir
         } do
      pid = Path.join(dir, "pid")

      hangs =
        "import os, time\nopen(#{inspect(pid)}, 'w').write(str(os.getpid()))\ntime.sleep(600)"

      filters = :logger.get_primary_config().filters
      me = self()
      opts = [script_path: peer(dir, hangs), start_timeout: 1_000]
      assert capture_log(fn -> send(me, run(opts)) end) == ""
      assert :logger.get_primary_config().filters == filters
      assert_received %{"ping" => _} = checks
      assert %{status: :failed, found: found, advice: advice} = checks["ping"]
      assert found =~ "the peer does not start: no answer to its first ping within 1000 ms"
      assert advice =~ ":start_timeout gives it more time"
      os_pid = File.read!(pid)
      eventually(fn -> not alive?(os_pid) end)
    end

    test "whose DSPy does not work: the program's error, and the setting" do
      checks = run(env: %{"DSPY_BRIDGE_INIT" => "no_such_module:init"})
      assert checks["ping"].status == :ok
      assert %{status: :failed, found: found, advice: advice} = checks["program"]
      assert found =~ "DSPY_BRIDGE_INIT no_such_module:init"
      assert advice =~ "DSPY_BRIDGE_INIT"
    end

    test "LM options that DSPy refuses, by either check, without what is secret in them" do
      checks = run(lm: "openai/x", lm_options: %{num_retries: "many", api_key: @key})
      assert %{status: :failed, found: found, advice: advice} = checks["program"]
      assert found =~ "DSPY_BRIDGE_LM_OPTIONS: lm: num_retries" and advice =~ ":lm_options"
      assert %{status: :failed, found: found} = checks["lm"]
      assert found =~ "openai/x: it or its options are refused: ValueError: num_retries"
      refute inspect(checks) =~ @key
    end
  end

  describe "in print" do
    setup do
      put_system_env("PYTHON_EXECUTABLE", "/no/such/python")
    end

    test "a line for each check, and one with what to do" do
      text = capture_io(fn -> refute Doctor.print() end)
      assert text =~ "✓ configuration its keys and types are right\n"
      assert text =~ ~r/✗ interpreter   no Python found: .*\n {16}-> name one/
      assert text =~ "– version       skipped: needs interpreter\n"
      assert text =~ ~r/\n1 check failed\.\n\z/
    end

    test "in ASCII if the terminal has no Unicode" do
      text = capture_io([encoding: :latin1], fn -> refute Doctor.print() end)
      assert text =~ "ok   configuration "
      assert text =~ ~r/\nFAIL interpreter   no Python found: .*\n {19}-> /
      assert text =~ "\n-    version       skipped: needs interpreter\n"
      assert for(<<byte <- text>>, byte > 127, do: byte) == []
    end
  end
end
