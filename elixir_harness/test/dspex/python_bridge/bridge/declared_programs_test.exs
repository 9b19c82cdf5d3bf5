defmodule DSPex.PythonBridge.Bridge.DeclaredProgramsTest do
  @moduledoc "Declared programs of a bridge: there from the first call on, after each restart, with the reason if not."

  # Some tests set the application's configuration, or use the default names.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.{Bridge, Error}
  alias DSPex.PythonBridge.Supervisor, as: BridgeSupervisor

  defmodule Triage do
    def definition, do: %{id: "triage", signature: "ticket -> team"}
  end

  @name __MODULE__.Bridge
  @ms 30_000
  @key "sk-0123456789abcdef"
  @qa %{id: "qa", signature: "q -> a"}

  defp start(opts), do: start_supervised!({Bridge, real_opts([name: @name] ++ opts)})

  # A peer that keeps programs as ids with their signatures.
  defp start_who(opts),
    do: start_supervised!({Bridge, Keyword.merge(fake_opts("who"), [name: @name] ++ opts)})

  defp execute(id, inputs \\ %{q: "?"}),
    do: Bridge.call(@name, :execute_program, %{program_id: id, inputs: inputs}, @ms)

  defp programs do
    {:ok, %{"programs" => programs}} = Bridge.call(@name, :list_programs, %{}, @ms)
    programs
  end

  # Of a bridge whose process is being started again.
  defp later(fun),
    do: eventually(fn -> with({:error, :bridge_not_running} <- fun.(), do: nil) end, @ms)

  defp kill_bridge do
    pid = Process.whereis(@name)
    Process.exit(pid, :kill)
    eventually(fn -> Process.whereis(@name) not in [pid, nil] end)
  end

  test "are there from the first call on, in their order" do
    start(programs: [@qa, [id: :keywords, signature: "q -> a"], Triage])
    assert {:ok, %{"a" => _}} = execute("qa")
    assert {:ok, %{"team" => _}} = execute("triage", %{ticket: "?"})
    assert {:ok, %{"a" => _}} = execute(:keywords)
    # Each is created once more, to be loaded.
    eventually(fn -> programs() == ["qa", "keywords", "triage"] end)
    assert %{programs: %{failed: none}} = Bridge.get_status(@name)
    assert none == %{}
  end

  test "are there after the peer's death; one that was created in their place stays, one that was removed does not come back" do
    start_who(programs: [@qa, Triage, %{id: "gone", signature: "q -> a"}])
    {:ok, _} = Bridge.call(@name, :create_program, %{id: "qa", signature: "q -> b"}, @ms)
    {:ok, _} = Bridge.call(@name, :cleanup, %{program_ids: ["gone"]}, @ms)
    kill(Bridge.get_status(@name).os_pid)
    assert {:ok, %{"signature" => "q -> b"}} = execute("qa")
    assert {:ok, %{"signature" => "ticket -> team"}} = execute("triage")
    assert {:error, "Program not found: gone"} = execute("gone")
    assert Bridge.restart(@name) == :ok
    assert programs() == %{"qa" => "q -> b", "triage" => "ticket -> team"}
    assert {:ok, %{"signature" => "q -> b"}} = execute("qa")

    # A bridge that has no supervisor of this project is a tree of its own.
    kill_bridge()
    assert {:ok, %{"signature" => "q -> a"}} = later(fn -> execute("qa") end)
    assert Enum.sort(Map.keys(programs())) == ["gone", "qa", "triage"]
  end

  describe "below DSPex.PythonBridge.Supervisor" do
    defp start_tree(opts) do
      bridge = Keyword.merge(fake_opts("who"), [name: @name] ++ Keyword.get(opts, :bridge, []))
      monitor = [name: Module.concat(@name, Monitor)]
      opts = Keyword.merge([name: __MODULE__.Tree], opts)
      spec = {BridgeSupervisor, Keyword.merge(opts, bridge: bridge, monitor: monitor)}
      start_supervised!(spec)
    end

    test "stay removed when the bridge crashes, and are back when the tree is started again" do
      start_tree(programs: [@qa, Triage])
      assert programs() == %{"qa" => "q -> a", "triage" => "ticket -> team"}
      {:ok, _} = Bridge.call(@name, :cleanup, %{program_ids: ["qa"]}, @ms)
      {:ok, _} = Bridge.call(@name, :create_program, %{id: "triage", signature: "q -> b"}, @ms)
      kill_bridge()
      assert {:ok, %{"signature" => "q -> b"}} = later(fn -> execute("triage") end)
      assert programs() == %{"triage" => "q -> b"}

      tree = Process.whereis(__MODULE__.Tree)
      Supervisor.stop(tree)
      eventually(fn -> Process.whereis(__MODULE__.Tree) not in [tree, nil] end)
      assert {:ok, %{"signature" => "q -> a"}} = later(fn -> execute("qa") end)
      assert {:ok, %{"signature" => "ticket -> team"}} = execute("triage")
    end
  end

  describe "one that is wrong" do
    @wrong [
      {%{id: "no json", signature: "q -> a", lm: %{api_key: {:system, @key}}},
       "args.lm.api_key: a tuple has no JSON form"},
      {%{id: "bad signature", signature: "q"}, "signature: expected exactly one \"->\""},
      {%{
         id: "bad type",
         signature: %{
           inputs: [%{name: "q", type: "string"}],
           outputs: [%{name: "a", type: "strng"}]
         }
       }, "signature.outputs[0].type: unknown type 'strng'"},
      {%{id: "bad lm", signature: "q -> a", lm: %{model: "offline/echo", kye: @key}},
       "lm.kye: unknown option"},
      {%{id: "nothing"}, "signature: missing"}
    ]

    defp failed, do: Bridge.get_status(@name).programs.failed

    test "is in the log and the status, and makes only its own runs fail, with the reason" do
      declared = for {args, _text} <- @wrong, do: args

      log =
        capture_log(fn ->
          start(programs: declared ++ [@qa])
          assert {:ok, %{"a" => _}} = execute("qa")
          ids = Enum.sort(Enum.map(declared, & &1.id))
          eventually(fn -> Enum.sort(Map.keys(failed())) == ids end, @ms)
        end)

      failed = failed()

      for {%{id: id}, text} <- @wrong do
        reason = "program #{id} could not be loaded: #{text}"
        assert failed[id] =~ reason
        assert [_] = Regex.scan(~r/#{Regex.escape(reason)}/, log)
        args = %{program_id: id, inputs: %{q: "?"}}
        opts = [timeout: @ms]
        assert {:error, message} = execute(id)
        assert message =~ reason
        {:error, %Error{} = error} = Bridge.request(@name, :execute_program, args, opts)
        assert {:invalid_args, ^message} = {error.type, error.message}
        assert [error: streamed] = Enum.to_list(Bridge.stream(@name, args, opts))
        assert %{streamed | meta: nil} == %{error | meta: nil}
      end

      refute log =~ @key
      refute inspect(Bridge.get_status(@name)) =~ @key
      # It is not found once it is removed, and there once it is created.
      {:ok, _} = Bridge.call(@name, :cleanup, %{program_ids: ["no json", "bad type"]}, @ms)
      assert {:error, "Program not found: no json"} = execute("no json")

      for id <- ["bad signature", "nothing"],
          do: {:ok, _} = Bridge.call(@name, :create_program, %{@qa | id: id}, @ms)

      assert {:ok, %{"a" => _}} = execute("nothing")
      assert Map.keys(failed()) == ["bad lm"]
    end
  end

  describe "while they are loaded" do
    @describetag :tmp_dir

    defp start_frail(dir, dies, ids) do
      env = %{"FAKE_FILE" => Path.join(dir, "times"), "FAKE_DIES" => Enum.join(dies, " ")}
      programs = for id <- ids, do: %{@qa | id: id}
      opts = [name: @name, env: env, max_retries: 1, programs: programs]
      start_supervised!({Bridge, Keyword.merge(fake_opts("frail"), opts)})
    end

    # While there is the file, the one program that it names is being loaded.
    defp hold(dir, id), do: File.write!(Path.join(dir, "times.holds"), id)
    defp let_go(dir), do: File.rm!(Path.join(dir, "times.holds"))
    # The real peer, whose set-up of DSPy waits until the file is gone.
    defp slow_env(dir) do
      File.write!(Path.join(dir, "slow.py"), """
      import os, time

      def init():
          while os.path.exists(os.environ["SLOW_FILE"]):
              time.sleep(0.01)
      """)

      file = Path.join(dir, "times.holds")
      %{"PYTHONPATH" => dir, "DSPY_BRIDGE_INIT" => "slow:init", "SLOW_FILE" => file}
    end

    test "nobody waits but their own runs, within their timeouts", %{tmp_dir: dir} do
      hold(dir, "qa")
      bridge = start(env: slow_env(dir), programs: [@qa])
      assert {:ok, %{"programs" => ["qa"]}} = Bridge.call(bridge, :list_programs, %{}, @ms)
      assert {:ok, %{"status" => "ok"}} = Bridge.call(bridge, :ping, %{}, @ms)
      assert %{state: :running, os_pid: os_pid} = Bridge.get_status(bridge)
      args = %{program_id: "qa", inputs: %{q: "?"}}
      assert Bridge.call(bridge, :execute_program, args, 100) == {:error, :timeout}
      run = Task.async(fn -> execute("qa") end)
      eventually(fn -> Bridge.get_status(bridge).pending == 1 end)
      let_go(dir)
      assert {:ok, %{"a" => _}} = Task.await(run, @ms)
      assert %{state: :running, os_pid: ^os_pid} = Bridge.get_status(bridge)
    end

    test "one that kills Python does so twice, is named, and fails only its own runs", %{
      tmp_dir: dir
    } do
      bridge = start_frail(dir, 1..10, ["first", "frail", "last"])
      # The second time behind the others.
      eventually(fn -> loads(dir) == 2 and Bridge.get_status(bridge).restarts == 2 end, @ms)
      assert %{"frail" => reason} = Bridge.get_status(bridge).programs.failed
      assert reason =~ "program frail could not be loaded: the Python process died"
      assert {:ok, %{"programs" => programs}} = execute("last")
      assert Enum.sort(programs) == ["first", "frail", "last"]
      assert loads(dir) == 2
      # max_retries is 1.
      assert execute("frail") == {:error, :python_process_died}
      assert loads(dir) == 4
      assert {:ok, _} = execute("first")
      # Not tried again by itself.
      assert loads(dir) == 4
    end

    test "one whose peer was killed is loaded by the next", %{tmp_dir: dir} do
      bridge = start_frail(dir, 1..1, ["frail", "last"])
      eventually(fn -> loads(dir) == 2 and Bridge.get_status(bridge).programs.failed == %{} end)
      assert {:ok, _} = execute("frail")
    end

    defp loads(dir) do
      case File.stat(Path.join(dir, "times")) do
        {:ok, %{size: size}} -> size
        {:error, :enoent} -> 0
      end
    end
  end
end
