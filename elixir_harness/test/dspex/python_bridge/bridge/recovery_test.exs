defmodule DSPex.PythonBridge.Bridge.RecoveryTest do
  @moduledoc "What is left of calls and programs when a peer dies: all that can be kept."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error}
  alias DSPex.Test.SilentLM

  @moduletag :tmp_dir
  @moduletag :slow

  defp start(opts), do: start_supervised!({Bridge, opts})

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
    test "are sent to the successor, with what is left of their time; what they made is there later",
         %{tmp_dir: dir} do
      bridge =
        start_and_wait(fake_opts("answers_the_second_time", env: %{"FAKE_FILE" => dir <> "/f"}))

      create = %{id: "x", signature: "q -> a"}

      assert {:ok, %{"timeout_ms" => left, "first_ms" => first}} =
               Bridge.call(bridge, :create_program, create, 10_000)

      assert left < first
      assert %{restarts: 1, pending: 0, late_replies: 0} = Bridge.get_status(bridge)
      # This peer answers everything.
      kill_peer(bridge)
      assert {:ok, %{"seen" => seen}} = Bridge.call(bridge, :look)
      # The list is the bridge's own: see `DSPex.PythonBridge.Calls.Suspects`.
      assert seen == ["ping", "create_program", "list_programs", "look"]
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
  end

  describe "restart/1" do
    test "programs made while the old peer finishes are not lost", %{tmp_dir: dir} do
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
      bridge = start_and_wait(real_opts(opts))
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
      bridge = start_and_wait(fake_opts("needs_a_file", env: %{"FAKE_FILE" => file}))
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
end
