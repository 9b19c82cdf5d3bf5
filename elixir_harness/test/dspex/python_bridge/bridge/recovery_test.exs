defmodule DSPex.PythonBridge.Bridge.RecoveryTest do
  @moduledoc "What is left of calls and programs when a peer dies: all that can be kept."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error}
  alias DSPex.Test.SilentLM

  @moduletag :tmp_dir
  @moduletag :slow

  defp start(opts), do: start_supervised!({Bridge, opts})

  defp start_up(opts) do
    bridge = start(opts)
    eventually(fn -> Bridge.get_status(bridge).state == :running end, 20_000)
    bridge
  end

  defp create(bridge, id, type \\ "predict") do
    args = %{id: id, signature: "question -> answer", program_type: type}
    {:ok, %{"status" => "created"}} = Bridge.call(bridge, :create_program, args, 30_000)
  end

  defp execute(bridge, id, question \\ "?", timeout \\ 30_000) do
    args = %{program_id: id, inputs: %{question: question}}
    Bridge.call(bridge, :execute_program, args, timeout)
  end

  defp kill_peer(bridge), do: kill(Bridge.get_status(bridge).os_pid)

  describe "calls in flight" do
    test "are sent to the successor, with what is left of their time", %{tmp_dir: dir} do
      bridge = start_up(fake_opts("answers_the_second_time", env: %{"FAKE_FILE" => dir <> "/f"}))
      call = Task.async(fn -> Bridge.call(bridge, :echo, %{}, 10_000) end)
      assert {:ok, %{"timeout_ms" => left, "first_ms" => first}} = Task.await(call, 10_000)
      assert left < first
      assert %{restarts: 1, pending: 0, late_replies: 0} = Bridge.get_status(bridge)
    end

    @tag timeout: 120_000
    test "one that kills each time fails; its neighbours lose nothing", %{
      tmp_dir: dir
    } do
      bridge = start(host_opts(dir))
      create(bridge, "nap", "host:Nap")
      create(bridge, "deadly", "host:Deadly")

      tasks =
        for n <- 1..21 do
          Task.async(fn ->
            {id, question} = if n == 11, do: {"deadly", "0"}, else: {"nap", "#{n}"}
            # Six peers import DSPy meanwhile.
            execute(bridge, id, question, 90_000)
          end)
        end

      results = Task.await_many(tasks, 100_000)
      assert {{:error, :python_process_died}, good} = List.pop_at(results, 10)
      assert good == for(n <- 1..21, n != 11, do: {:ok, %{"answer" => "#{n}"}})
      # Twice with all others, then in a group that gets smaller, and at last alone.
      assert noted(dir, "deadly") in 4..8
      eventually(fn -> match?(%{pending: 0, state: :running}, Bridge.get_status(bridge)) end)
    end
  end

  describe "programs" do
    test "come back before the next call is served, in their order, with their last definition",
         %{
           tmp_dir: dir
         } do
      bridge = start(host_opts(dir))
      create(bridge, "one")
      create(bridge, "two")
      create(bridge, "one", "host:Nap")
      create(bridge, "three")
      {:ok, _} = Bridge.call(bridge, :cleanup, %{program_ids: ["two"]})
      {:ok, %{"programs" => before}} = Bridge.call(bridge, :list_programs)
      assert Enum.sort(before) == ["one", "three"]

      kill_peer(bridge)
      assert {:ok, %{"programs" => ^before}} = Bridge.call(bridge, :list_programs)
      assert execute(bridge, "one", "same") == {:ok, %{"answer" => "same"}}
      assert execute(bridge, "two") == {:error, "Program not found: two"}

      {:ok, _} = Bridge.call(bridge, :cleanup)
      kill_peer(bridge)
      assert {:ok, %{"programs" => []}} = Bridge.call(bridge, :list_programs)
    end

    test "one that no longer loads makes only its own runs fail, with the reason", %{
      tmp_dir: dir
    } do
      bridge = start(host_opts(dir))
      create(bridge, "good")
      create(bridge, "spoilable", "host:Spoilable")
      assert {:ok, _} = execute(bridge, "spoilable")
      File.write!(Path.join(dir, "spoilt"), "raise")
      kill_peer(bridge)
      assert {:error, text} = execute(bridge, "spoilable")
      assert text =~ "program spoilable could not be loaded: "
      assert text =~ "ValueError"
      assert {:ok, _} = execute(bridge, "good")
      assert execute(bridge, "other") == {:error, "Program not found: other"}
      # What keeps it from loading may go away. (The peer itself tries again after a minute.)
      File.rm!(Path.join(dir, "spoilt"))
      kill_peer(bridge)
      assert {:ok, _} = execute(bridge, "spoilable")
    end

    test "a create in flight is made by the successor, but not one whose caller has given up", %{
      tmp_dir: dir
    } do
      file = Path.join(dir, "f")
      bridge = start_up(fake_opts("answers_the_second_time", env: %{"FAKE_FILE" => file}))
      args = %{id: "x", signature: "q -> a"}
      assert {:ok, _} = Bridge.call(bridge, :create_program, args, 10_000)
      # This peer answers everything.
      kill_peer(bridge)
      assert {:ok, %{"seen" => seen}} = Bridge.call(bridge, :look)
      # The list is the bridge's own: see `DSPex.PythonBridge.Calls.Suspects`.
      assert seen == ["ping", "create_program", "list_programs", "look"]
    end
  end

  describe "restart/1" do
    test "no caller notices it" do
      bridge = start_up(real_opts())
      create(bridge, "qa")
      stop = :atomics.new(1, [])

      callers =
        for _ <- 1..20 do
          Task.async(fn ->
            Stream.repeatedly(fn -> execute(bridge, "qa") end)
            |> Enum.take_while(fn result ->
              assert {:ok, %{"answer" => _}} = result
              :atomics.get(stop, 1) == 0
            end)
            |> length()
          end)
        end

      pids =
        for _ <- 1..3 do
          assert Bridge.restart(bridge) == :ok
          Bridge.get_status(bridge).os_pid
        end

      :atomics.put(stop, 1, 1)
      assert Enum.all?(Task.await_many(callers, 20_000), &(&1 > 0))
      assert length(Enum.uniq(pids)) == 3
      assert %{restarts: 3, pending: 0, late_replies: 0} = Bridge.get_status(bridge)
      eventually(fn -> Enum.filter(pids, &alive?/1) == [Bridge.get_status(bridge).os_pid] end)
    end

    test "the old peer finishes what it has; programs made meanwhile are not lost", %{
      tmp_dir: dir
    } do
      bridge = start(host_opts(dir))
      create(bridge, "nap", "host:Nap")
      %{os_pid: old} = Bridge.get_status(bridge)
      napping = Task.async(fn -> execute(bridge, "nap", "slept") end)
      eventually(fn -> match?({:ok, %{"in_flight" => 1}}, Bridge.call(bridge, :get_stats)) end)
      restart = Task.async(fn -> Bridge.restart(bridge) end)
      eventually(fn -> Bridge.get_status(bridge).restarts == 1 end)
      create(bridge, "meanwhile")
      assert {:ok, _} = execute(bridge, "meanwhile")
      assert Task.await(restart, 20_000) == :ok
      assert Task.await(napping) == {:ok, %{"answer" => "slept"}}
      assert Bridge.call(bridge, :list_programs) == {:ok, %{"programs" => ["nap", "meanwhile"]}}
      eventually(fn -> not alive?(old) end)
    end

    test "calls that the old peer does not finish in its time are sent to the new one" do
      opts = SilentLM.lm_opts(SilentLM.start()) ++ [env: %{"DSPY_BRIDGE_DRAIN_MS" => "100"}]
      bridge = start_up(real_opts(opts))
      create(bridge, "qa")
      caller = spawn(fn -> execute(bridge, "qa") end)

      never = [retry: false, timeout: 30_000]
      args = %{program_id: "qa", inputs: %{question: "once only"}}
      once = Task.async(fn -> Bridge.request(bridge, :execute_program, args, never) end)
      for _ <- 1..2, do: assert_receive({:lm_request, _line}, 10_000)
      assert Bridge.restart(bridge) == :ok
      assert_receive {:lm_request, _line}, 10_000
      assert {:error, %Error{type: :python_process_died}} = Task.await(once)
      assert Bridge.get_status(bridge).pending == 1
      Process.exit(caller, :kill)
      eventually(fn -> Bridge.get_status(bridge).pending == 0 end)
    end

    test "leaves the old peer serving if the new one does not start", %{tmp_dir: dir} do
      file = Path.join(dir, "there")
      File.write!(file, "")
      bridge = start_up(fake_opts("needs_a_file", env: %{"FAKE_FILE" => file}))
      %{os_pid: old} = Bridge.get_status(bridge)
      File.rm!(file)
      assert {:error, text} = Bridge.restart(bridge)
      assert text =~ "exit status 4"
      assert {:ok, _} = Bridge.call(bridge, :ping)
      assert %{os_pid: ^old, state: :running} = Bridge.get_status(bridge)
      File.write!(file, "")
      assert Bridge.restart(bridge) == :ok
      assert {:ok, _} = Bridge.call(bridge, :ping)
    end
  end

  describe "stop" do
    test "lets the peer finish its calls", %{tmp_dir: dir} do
      bridge = start(host_opts(dir))
      create(bridge, "nap", "host:Nap")
      napping = for n <- 1..5, do: Task.async(fn -> execute(bridge, "nap", "#{n}") end)
      eventually(fn -> match?({:ok, %{"in_flight" => 5}}, Bridge.call(bridge, :get_stats)) end)
      %{os_pid: os_pid} = Bridge.get_status(bridge)
      # As a supervisor stops it.
      :ok = stop_supervised(Bridge)

      for {task, n} <- Enum.zip(napping, 1..5),
          do: assert(Task.await(task) == {:ok, %{"answer" => "#{n}"}})

      eventually(fn -> not alive?(os_pid) end)
    end
  end
end
