defmodule DSPex.PythonBridge.Bridge.BridgeTest do
  @moduledoc """
  The bridge against peers with one bad habit each (tests/fakes). Named after the races.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error}
  alias DSPex.Test.{Exits, FakePeer}

  # temporary: what ends stays ended, and the test can look.
  defp start(fake, opts) do
    child = Supervisor.child_spec({Bridge, fake_opts(fake, opts)}, restart: :temporary)
    start_supervised!(child)
  end

  # With a peer inside the BEAM.
  defp start_in(kind, opts \\ []) do
    child = Supervisor.child_spec({Bridge, FakePeer.opts(kind, opts)}, restart: :temporary)
    start_supervised!(child)
  end

  defp start_up(fake, opts \\ []), do: fake |> fake_opts(opts) |> start_and_wait()

  defp pending(bridge), do: Bridge.get_status(bridge).pending
  defp os_pid(bridge), do: Bridge.get_status(bridge).os_pid

  describe "start" do
    @describetag :tmp_dir

    test "start_link does not wait; a call that times out is never sent", %{tmp_dir: dir} do
      file = Path.join(dir, "start")
      bridge = start("waits_for_a_file", env: %{"FAKE_FILE" => file})
      assert %{state: :starting, pending: 0, restarts: 0} = Bridge.get_status(bridge)
      assert Bridge.call(bridge, :ping, %{}, 100) == {:error, :timeout}
      File.write!(file, "")
      assert {:ok, _} = Bridge.call(bridge, :ping, %{}, 20_000)
      assert %{state: :running} = Bridge.get_status(bridge)
      # Only the start's own ping and this one were answered.
      assert %{pending: 0, late_replies: 0} = Bridge.get_status(bridge)
    end

    test "calls from before are sent in order, with what is left of their time", %{tmp_dir: dir} do
      file = Path.join(dir, "start")
      bridge = start("waits_for_a_file", env: %{"FAKE_FILE" => file})

      tasks =
        for n <- 1..20 do
          task = Task.async(fn -> Bridge.call(bridge, :echo, %{n: n}, 20_000) end)
          eventually(fn -> pending(bridge) == n end)
          task
        end

      File.write!(file, "")

      # The first that came to the peer is the bridge's own ping.
      for {{:ok, reply}, n} <- tasks |> Task.await_many() |> Enum.zip(1..20) do
        assert %{"args" => %{"n" => ^n}, "before" => ^n, "timeout_ms" => left} = reply
        assert left < 20_000 and left > 10_000
      end
    end

    test "a peer that never answers its first ping is replaced after start_timeout" do
      bridge =
        start("silent", start_timeout: 100, env: %{"FAKE_ANSWERS" => "0"})

      first = os_pid(bridge)
      eventually(fn -> Bridge.get_status(bridge).restarts > 0 end)
      eventually(fn -> not alive?(first) end)
      assert %{state: :restarting, last_error: text} = Bridge.get_status(bridge)
      assert text =~ "first ping"
    end
  end

  describe "call/4" do
    test "takes commands as atoms and strings, servers as pids and names of all kinds" do
      {:ok, _} = start_supervised({Registry, keys: :unique, name: __MODULE__.Registry})

      for name <- [
            __MODULE__.Named,
            {:global, make_ref()},
            {:via, Registry, {__MODULE__.Registry, 1}}
          ] do
        bridge =
          start_supervised!({Bridge, Keyword.put(FakePeer.opts(:echo), :name, name)}, id: name)

        assert {:ok, %{"args" => %{"a" => 1}}} = Bridge.call(name, :echo, %{a: 1}, 5_000)
        assert {:ok, %{"args" => %{}}} = Bridge.call(bridge, "echo", %{}, :infinity)
        assert {:ok, %{"args" => %{"b" => 1}}} = Bridge.call(name, :echo, %{b: 1})
        assert {:ok, %{"args" => %{}}} = Bridge.call(name, :echo)
      end
    end

    test "sends the caller's timeout along, and none for :infinity" do
      bridge = start_in(:echo)
      assert {:ok, %{"timeout_ms" => ms}} = Bridge.call(bridge, :echo, %{}, 4_000)
      assert ms in 1..4_000
      assert {:ok, %{"timeout_ms" => nil}} = Bridge.call(bridge, :echo, %{}, :infinity)
    end

    test "never exits or raises, for any arguments" do
      bridge = start_in(:echo)

      for args <- [%{a: self()}, %{a: {1}}, %{a: <<255>>}, [], nil, 5, "text"] do
        assert {:error, "args" <> _} = Bridge.call(bridge, :echo, args, 1_000)
      end

      for command <- [nil, 5, %{}, {:a}] do
        assert {:error, "command: " <> _} = Bridge.call(bridge, command, %{}, 1_000)
      end

      for timeout <- [-1, 1.5, :soon, nil, 5_000_000_000] do
        assert {:error, "timeout: " <> _} = Bridge.call(bridge, :echo, %{}, timeout)
      end

      for args <- [%{a: %Exits.OnInspect{}}, %{a: %Exits.OnEncode{}}] do
        assert {:error, "args" <> _} = Bridge.call(bridge, :echo, args, 1_000)
      end

      silent = start_and_wait(FakePeer.opts(:silent))
      assert {:error, :timeout} = Bridge.call(silent, :ping, %{}, 0)

      for server <- [
            :nobody,
            "text",
            nil,
            5,
            {:global, :nobody},
            {:via, NoSuchModule, 1},
            {:via, Exits.OnWhereis, 1},
            {:nobody, :"nobody@nowhere.invalid"},
            {:nobody, 5},
            spawn(fn -> :ok end)
          ] do
        assert Bridge.call(server, :ping, %{}, 1_000) == {:error, :bridge_not_running}
        assert Bridge.cast(server, :ping, %{}) == :ok
        assert %{state: :failed, os_pid: nil} = Bridge.get_status(server)
        assert Bridge.restart(server) == {:error, :bridge_not_running}
        assert Bridge.stop(server) == :ok
      end

      assert mailbox() == []
    end

    test "a reply over max_frame_bytes is an error, any other such frame is dropped" do
      bridge = start_in(:plays, max_frame_bytes: 1_000)
      run = &Bridge.request(bridge, :execute_program, %{program_id: "p", play: &1}, &2)
      test = self()

      log =
        ExUnit.CaptureLog.capture_log(fn ->
          play = [["long", "stream", 1_000], ["count", 1], ["reply", "y"]]
          assert {:ok, "y", _meta} = run.(play, on_chunk: &send(test, &1))
        end)

      assert log =~ "too large"
      assert Bridge.get_status(bridge).unreadable_frames == 1
      assert_received %{"chunk" => "0"}
      refute_received %{"chunk" => _long}

      assert {:error, %Error{type: :frame_too_large, message: text, retryable: false}} =
               run.([["long", "reply", 1_000]], [])

      assert text =~ ~r/\Athe reply has 10\d\d bytes; max_frame_bytes is 1000\z/
      assert {:ok, _text, _meta} = run.([["long", "reply", 900]], [])
    end

    test "leaves no monitor and no large frame in the bridge" do
      bridge = start_in(:echo)
      info = fn what -> bridge |> Process.info(what) |> elem(1) end
      before = info.(:monitors)

      for _ <- 1..20, do: {:ok, _} = Bridge.call(bridge, :echo, %{}, 5_000)
      eventually(fn -> info.(:monitors) == before end)

      # After big ones the bridge has nothing more to do that would make it collect its garbage.
      big = %{a: String.duplicate("x", 5_000_000)}

      assert {:ok, _} =
               fn -> Bridge.call(bridge, :echo, big, 20_000) end
               |> Task.async()
               |> Task.await(20_000)

      eventually(fn -> info.(:monitors) == before end)

      held = fn ->
        for {_id, size, _refs} <- info.(:binary), reduce: 0, do: (sum -> sum + size)
      end

      eventually(fn -> held.() < 1_000_000 end)
    end

    test "a bridge that stops under a call that takes too long answers :bridge_not_running" do
      bridge = start_in(:silent, env: %{"DSPY_BRIDGE_DRAIN_MS" => "50"})
      task = Task.async(fn -> Bridge.call(bridge, :ping, %{}, 5_000) end)
      eventually(fn -> pending(bridge) == 1 end)
      :ok = Bridge.stop(bridge)
      assert Task.await(task) == {:error, :bridge_not_running}
    end
  end

  describe "cast/3" do
    test "returns at once and leaves nothing behind" do
      bridge = start_in(:echo)
      assert Bridge.cast(bridge, :echo, %{a: 1}) == :ok
      assert Bridge.cast(bridge, :echo) == :ok
      eventually(fn -> pending(bridge) == 0 end)
      assert Bridge.cast(:nobody, :echo, %{}) == :ok
      assert {:error, "args" <> _} = Bridge.cast(bridge, :echo, %{a: self()})
      assert mailbox() == []
    end

    test "one that is never answered is given up after default_timeout" do
      bridge = start_in(:silent, default_timeout: 50)
      :ok = Bridge.cast(bridge, :ping, %{})
      assert pending(bridge) == 1
      eventually(fn -> pending(bridge) == 0 end)
    end
  end

  describe "races of a call" do
    test "timeout, then the late reply: dropped and counted, the mailbox stays empty" do
      bridge = start_up("late")
      assert Bridge.call(bridge, :late, %{}, 50) == {:error, :timeout}
      assert pending(bridge) == 0
      assert {:ok, %{"status" => "ok"}} = Bridge.call(bridge, :ping, %{}, 5_000)
      eventually(fn -> Bridge.get_status(bridge).late_replies == 1 end)
      assert mailbox() == []
    end

    test "of two replies the first counts; replies under unknown ids are dropped" do
      bridge = start_up("twice")

      for _ <- 1..20,
          do: assert({:ok, %{"status" => "ok"}} = Bridge.call(bridge, :ping, %{}, 5_000))

      eventually(fn -> Bridge.get_status(bridge).late_replies == 40 end)
      assert mailbox() == []
    end

    test "frames that are not replies are dropped, and logged once" do
      bridge = start_up("garbage")

      log =
        ExUnit.CaptureLog.capture_log(fn ->
          for _ <- 1..10, do: assert({:ok, _} = Bridge.call(bridge, :ping, %{}, 5_000))
        end)

      assert Bridge.get_status(bridge).unreadable_frames == 40
      assert log |> String.split("without a readable id") |> length() == 2
      refute log =~ "Traceback"
      # A reply that is not JSON is an error for its own caller only.
      assert {:error, text} = Bridge.call(bridge, :broken, %{}, 5_000)
      assert text =~ "no valid reply"
      assert {:error, %Error{type: :internal}} = Bridge.request(bridge, :broken, %{}, [])
      assert {:ok, _} = Bridge.call(bridge, :ping, %{}, 5_000)
    end
  end

  describe "a peer that does not read" do
    @describetag :tmp_dir

    setup %{tmp_dir: dir} = context do
      file = Path.join(dir, "read from now on")
      # Time for what it has, when it is replaced or stopped.
      env = %{"FAKE_FILE" => file, "DSPY_BRIDGE_DRAIN_MS" => "100"}
      bridge = start_up("never_reads", env: env)
      # More than any pipe holds.
      big = %{a: String.duplicate("x", 3_000_000)}

      blocked =
        Task.async(fn -> Bridge.call(bridge, :big, big, context[:call_timeout] || 60_000) end)

      eventually(fn -> pending(bridge) == 1 end)
      %{bridge: bridge, blocked: blocked, marker: file}
    end

    @tag call_timeout: 2_000
    test "get_status answers at once, calls time out on time", %{bridge: bridge, blocked: blocked} do
      tasks = for _ <- 1..100, do: Task.async(fn -> Bridge.call(bridge, :ping, %{}, 200) end)
      for _ <- 1..20, do: %{state: :running} = Bridge.get_status(bridge)
      for result <- Task.await_many(tasks, 60_000), do: assert(result == {:error, :timeout})
      assert Task.await(blocked, 60_000) == {:error, :timeout}
      assert pending(bridge) == 0
    end

    for {how, restart} <- [{"killed", false}, {"restarted", true}] do
      test "#{how}: requests behind the blocked pipe go to the next peer", context do
        %{bridge: bridge, blocked: blocked, marker: file} = context

        # The first in line is in the hands of the helper that writes; the second still waits.
        [held, waiting] =
          for n <- 2..3 do
            task = Task.async(fn -> Bridge.call(bridge, :ping, %{}, 60_000) end)
            eventually(fn -> pending(bridge) == n end)
            task
          end

        File.write!(file, "")
        old = os_pid(bridge)
        if unquote(restart), do: Bridge.restart(bridge), else: kill(old)
        # It had not even been written: the next peer has it at once.
        assert {:ok, %{"status" => "ok"}} = Task.await(waiting, 60_000)
        # These two may have been seen by the peer: they go once that is gone.
        assert {:ok, %{"status" => "ok"}} = Task.await(blocked, 60_000)
        assert {:ok, %{"status" => "ok"}} = Task.await(held, 60_000)
        assert %{restarts: 1, pending: 0, late_replies: 0} = Bridge.get_status(bridge)
        eventually(fn -> not alive?(old) end)
      end
    end

    # Longer than a test may take.
    @tag call_timeout: :infinity
    test "stop ends after the time to finish, and the peer is gone", %{
      bridge: bridge,
      blocked: blocked
    } do
      os_pid = os_pid(bridge)
      assert Bridge.stop(bridge) == :ok
      assert Task.await(blocked) == {:error, :bridge_not_running}
      eventually(fn -> not alive?(os_pid) end)
    end
  end

  describe "the peer's death" do
    @describetag :tmp_dir

    test "with no retries, all calls in flight fail at once, and the next peer serves" do
      bridge = start_up("silent", env: %{"FAKE_ANSWERS" => "1"}, max_retries: 0)
      tasks = for _ <- 1..20, do: Task.async(fn -> Bridge.call(bridge, :ping, %{}, 60_000) end)
      eventually(fn -> pending(bridge) == 20 end)
      old = os_pid(bridge)

      log =
        ExUnit.CaptureLog.capture_log(fn ->
          kill(old)
          results = Task.await_many(tasks, 60_000)
          assert results == List.duplicate({:error, :python_process_died}, 20)
          eventually(fn -> Bridge.get_status(bridge).state == :running end)
        end)

      assert log =~ "bridge #{inspect(bridge)}, Python process #{old}: died"
      assert %{restarts: 1, pending: 0, os_pid: next} = Bridge.get_status(bridge)
      assert next != old
    end

    test "in the middle of a frame" do
      bridge = start_up("dies_mid_frame", max_retries: 1)
      assert Bridge.call(bridge, :ping, %{}, 5_000) == {:error, :python_process_died}
      eventually(fn -> Bridge.get_status(bridge).state == :running end)
    end

    test "a peer that only closes its output: calls time out, a restart replaces it" do
      bridge = start_up("closes_stdout", env: %{"DSPY_BRIDGE_DRAIN_MS" => "100"})
      old = os_pid(bridge)
      assert Bridge.call(bridge, :ping, %{}, 100) == {:error, :timeout}
      assert Bridge.restart(bridge) == :ok
      eventually(fn -> not alive?(old) end)
      eventually(fn -> Bridge.get_status(bridge).state == :running end)
    end

    test "is noticed although a child holds the output open" do
      bridge = start_up("forks")
      {:ok, %{"child" => child}} = Bridge.call(bridge, :ping, %{}, 5_000)
      kill(os_pid(bridge))
      eventually(fn -> match?(%{state: :running, restarts: 1}, Bridge.get_status(bridge)) end)
      assert {:ok, _} = Bridge.call(bridge, :ping, %{}, 5_000)
      eventually(fn -> not alive?(child) end)
    end

    test "of its calls, again and again: it is not :failed, and other calls are not refused" do
      bridge = start_up("needs_a_file", env: %{"FAKE_FILE" => "/dev/null"}, max_retries: 1)
      deadly = for _ <- 1..5, do: Task.async(fn -> Bridge.call(bridge, :die, %{}, 30_000) end)
      other = Task.async(fn -> Bridge.call(bridge, :ping, %{}, 30_000) end)
      for task <- deadly, do: assert(Task.await(task, 30_000) == {:error, :python_process_died})
      assert {:ok, _} = Task.await(other, 30_000)
    end
  end

  describe "a peer that cannot start" do
    for {name, opts, text} <- [
          {"dies at start", [fake: "dies_at_start", env: %{"FAKE_SAYS" => "why"}],
           "exit status 3: why"},
          {"exits 0 at once", [fake: "exits_0"], "exit status 0"},
          {"has no script", [fake: "no_such_script"], "No such file or directory"},
          {"has no interpreter", [fake: "echo", python_executable: "/no/such/python"],
           "/no/such/python"},
          {"has an interpreter that is none", [fake: "echo", python_executable: "/etc/passwd"],
           "permission denied"}
        ] do
      test "#{name}: tried again and again, :failed with the reason after max_retries, and calls fail with it" do
        {fake, opts} = Keyword.pop(unquote(Macro.escape(opts)), :fake)
        opts = Keyword.merge(fake_opts(fake, max_retries: 2), opts)
        bridge = start_supervised!(Supervisor.child_spec({Bridge, opts}, restart: :temporary))
        # One that waits since before, and those that come then.
        call = Task.async(fn -> Bridge.call(bridge, :ping, %{}, :infinity) end)

        %{last_error: error} =
          eventually(fn ->
            status = Bridge.get_status(bridge)
            if status.state == :failed and status.last_error =~ unquote(text), do: status
          end)

        assert error =~ unquote(text)
        assert {:error, waited} = Task.await(call, 30_000)
        assert waited =~ "the Python process does not start: " and waited =~ unquote(text)

        result = Bridge.request(bridge, :ping, %{}, timeout: :infinity)
        assert {:error, %Error{type: :python_process_died, retryable: true} = error} = result
        assert error.message =~ unquote(text)
        assert {:error, ^waited} = Bridge.call(bridge, :ping, %{}, :infinity)
        assert %{pending: 0} = Bridge.get_status(bridge)
      end
    end

    test "each attempt logs one line with the reason, without secrets" do
      {restarts, log} =
        ExUnit.CaptureLog.with_log(fn ->
          env = %{"FAKE_SAYS" => "no such key: sk-secret-1", "SOME_KEY" => "sk-secret-1"}
          bridge = start("dies_at_start", max_retries: 0, env: env)

          restarts =
            eventually(fn ->
              %{restarts: restarts} = Bridge.get_status(bridge)
              if restarts >= 3, do: restarts
            end)

          stop_supervised!(Bridge)
          restarts
        end)

      lines = for line <- String.split(log, "\n"), line =~ "died before it was up", do: line
      # The last attempt may be under way.
      assert length(lines) in (restarts - 1)..(restarts + 1)

      for line <- lines,
          do: assert(line =~ "exit status 3: no such key: [redacted]; next attempt")
    end

    test "before it has failed so often, calls wait within their own timeouts" do
      bridge = start("dies_at_start", max_retries: 20)
      eventually(fn -> Bridge.get_status(bridge).state == :restarting end)
      assert Bridge.call(bridge, :ping, %{}, 200) == {:error, :timeout}
      assert %{state: :restarting, pending: 0} = Bridge.get_status(bridge)
    end

    @tag :tmp_dir
    test "restart/1 starts again, also after it has failed", %{tmp_dir: dir} do
      file = Path.join(dir, "there")
      bridge = start("needs_a_file", env: %{"FAKE_FILE" => file}, max_retries: 0)
      eventually(fn -> Bridge.get_status(bridge).state == :failed end)
      File.write!(file, "")
      assert Bridge.restart(bridge) == :ok
      assert {:ok, _} = Bridge.call(bridge, :ping, %{}, 5_000)
    end
  end

  describe "no process is left" do
    test "when the peer ignores end of input and SIGTERM: nor is its child, after a restart and after stop" do
      bridge = start_up("stubborn")

      for ending <- [&Bridge.restart/1, &Bridge.stop/1] do
        {:ok, %{"child" => child}} = Bridge.call(bridge, :ping, %{}, 5_000)
        os_pid = os_pid(bridge)
        assert alive?(os_pid) and alive?(child)
        assert ending.(bridge) == :ok
        # They have been sent their end; the system carries that out.
        eventually(fn -> not alive?(os_pid) and not alive?(child) end)
      end
    end

    test "after stop, when the peer leaves a child behind" do
      bridge = start_up("leaves_a_child")
      {:ok, %{"child" => child}} = Bridge.call(bridge, :ping, %{}, 5_000)
      assert Bridge.stop(bridge) == :ok
      # It has been sent its end; the system carries that out.
      eventually(fn -> not alive?(child) end)
    end
  end
end
