defmodule DSPex.PythonBridge.IntegrationTest do
  @moduledoc "The real peer, over a real port, with the LM that needs no network."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error}
  alias DSPex.Test.{RawPeer, SilentLM}

  @qa %{
    id: "qa",
    signature: %{
      inputs: [%{name: "question", type: "string"}],
      outputs: [%{name: "answer", type: "string", description: "one word"}],
      instructions: "Answer."
    }
  }

  @shared __MODULE__.Bridge
  @secret "sk-secret-of-ours"

  setup_all do
    opts = [lm_options: %{api_key: @secret}, env: %{"SOME_KEY" => @secret}]
    start_supervised!({Bridge, real_opts([name: @shared] ++ opts)})
    :ok
  end

  # The bridge that the tests share, without programs.
  defp shared do
    {:ok, _} = Bridge.call(@shared, :cleanup, %{}, 20_000)
    Process.whereis(@shared)
  end

  defp start(opts \\ []), do: start_supervised!({Bridge, real_opts(opts)})

  defp nothing_runs(bridge),
    do: eventually(fn -> match?({:ok, %{"in_flight" => 0}}, Bridge.call(bridge, :get_stats)) end)

  defp execute(question, id \\ "qa"), do: %{program_id: id, inputs: %{question: question}}

  describe "commands" do
    test "ping has a number as timestamp" do
      assert {:ok, %{"status" => "ok", "timestamp" => at}} =
               Bridge.call(shared(), :ping, %{}, 10_000)

      assert_in_delta at, System.os_time(:second), 60
    end

    test "create, execute, list, stats, cleanup" do
      bridge = shared()

      assert {:ok, %{"program_id" => "qa", "status" => "created"}} =
               Bridge.call(bridge, :create_program, @qa)

      assert {:ok, %{"answer" => answer}} = Bridge.call(bridge, :execute_program, execute("Why?"))
      assert is_binary(answer)
      assert {:ok, %{"programs" => ["qa"]}} = Bridge.call(bridge, :list_programs)
      assert {:ok, stats} = Bridge.call(bridge, :get_stats)
      assert %{"programs_count" => 1, "in_flight" => 0, "pid" => pid} = stats
      assert pid == Bridge.get_status(bridge).os_pid

      assert {:ok, %{"status" => "cleaned", "programs_removed" => 1}} =
               Bridge.call(bridge, :cleanup)

      assert {:ok, %{"programs" => []}} = Bridge.call(bridge, :list_programs)
    end

    test "typed fields come back as values of their types; chain of thought returns its reasoning" do
      bridge = shared()

      args = %{
        id: "n",
        signature: "question -> answer: int, sure: bool",
        program_type: "chain_of_thought"
      }

      {:ok, _} = Bridge.call(bridge, :create_program, args)
      assert {:ok, result} = Bridge.call(bridge, :execute_program, execute("How many?", "n"))
      assert %{"answer" => n, "sure" => sure, "reasoning" => text} = result
      assert is_integer(n) and is_boolean(sure) and is_binary(text)
    end

    test "an unknown program and an unknown command say so" do
      bridge = shared()

      assert Bridge.call(bridge, :execute_program, execute("?", "nope")) ==
               {:error, "Program not found: nope"}

      assert Bridge.call(bridge, :frobnicate, %{}) == {:error, "Unknown command: frobnicate"}

      assert {:error,
              %Error{
                type: :program_not_found,
                message: "Program not found: nope",
                retryable: false
              }} =
               Bridge.request(bridge, :execute_program, execute("?", "nope"), [])

      assert {:error, %Error{type: :unknown_command}} =
               Bridge.request(bridge, :frobnicate, %{}, [])

      assert {:error, %Error{type: :invalid_args}} =
               Bridge.request(bridge, :create_program, %{}, [])
    end

    test "request/4 gives durations and the LM's usage" do
      bridge = shared()
      {:ok, _} = Bridge.call(bridge, :create_program, @qa)

      assert {:ok, %{"answer" => _}, meta} =
               Bridge.request(bridge, :execute_program, execute("?"), [])

      assert %{"duration_ms" => ms, "queue_ms" => _, "lm_usage" => %{}} = meta
      assert is_number(ms)
    end

    test "text and integers of any size come back exactly" do
      bridge = shared()
      {:ok, _} = Bridge.call(bridge, :create_program, @qa)
      id = "žluťoučký 🐎 \" \\ \n #{String.duplicate("9", 400)}"
      {:ok, %{"program_id" => ^id}} = Bridge.call(bridge, :create_program, %{@qa | id: id})
      assert {:ok, %{"programs" => ["qa", ^id]}} = Bridge.call(bridge, :list_programs)
    end

    test "no key shows in ps, neither the peer's nor its watchdog's" do
      bridge = shared()
      {:ok, _} = Bridge.call(bridge, :create_program, @qa)
      {processes, 0} = System.cmd("ps", ["-A", "-o", "pid,args"])
      assert processes =~ "#{Bridge.get_status(bridge).os_pid} "
      assert length(String.split(processes, "dspy_bridge.py")) >= 3
      refute processes =~ @secret
    end

    test "settings reach the peer: a frame limit of ours is its own, too" do
      bridge = start(max_frame_bytes: 100_000)
      {:ok, _} = Bridge.call(bridge, :create_program, @qa)
      long = String.duplicate("x", 200_000)
      assert {:error, text} = Bridge.call(bridge, :execute_program, execute(long))
      assert text =~ "max_frame_bytes"
      assert {:ok, _} = Bridge.call(bridge, :execute_program, execute("short"))
    end
  end

  describe "many calls" do
    test "10 concurrent pings in 5 s" do
      bridge = shared()
      tasks = for _ <- 1..10, do: Task.async(fn -> Bridge.call(bridge, :ping, %{}, 5_000) end)
      for result <- Task.await_many(tasks, 5_000), do: assert({:ok, %{"status" => "ok"}} = result)
    end

    test "500 mixed concurrent calls each get their own reply" do
      bridge = shared()
      %{late_replies: late} = Bridge.get_status(bridge)
      for n <- 1..5, do: {:ok, _} = Bridge.call(bridge, :create_program, %{@qa | id: "p#{n}"})

      tasks =
        for n <- 1..500 do
          Task.async(fn ->
            case rem(n, 5) do
              0 ->
                {:ping, Bridge.call(bridge, :ping, %{n: n}, 30_000)}

              1 ->
                {:execute,
                 Bridge.call(
                   bridge,
                   :execute_program,
                   execute("q#{n}", "p#{rem(n, 5) + 1}"),
                   30_000
                 )}

              2 ->
                {n, Bridge.call(bridge, :execute_program, execute("?", "no-#{n}"), 30_000)}

              3 ->
                {:list, Bridge.call(bridge, :list_programs, %{}, 30_000)}

              4 ->
                {n, Bridge.call(bridge, "command_#{n}", %{}, 30_000)}
            end
          end)
        end

      for {what, result} <- Task.await_many(tasks, 40_000) do
        case what do
          :ping -> assert {:ok, %{"status" => "ok"}} = result
          :execute -> assert {:ok, %{"answer" => _}} = result
          :list -> assert {:ok, %{"programs" => [_, _, _, _, _]}} = result
          n when rem(n, 5) == 2 -> assert result == {:error, "Program not found: no-#{n}"}
          n -> assert result == {:error, "Unknown command: command_#{n}"}
        end
      end

      assert %{pending: 0, late_replies: ^late, unreadable_frames: 0} =
               Bridge.get_status(bridge)
    end

    test "a timeout of 1 ms gives a result or :timeout, and leaves the bridge usable" do
      bridge = shared()
      {:ok, _} = Bridge.call(bridge, :create_program, @qa)

      for _ <- 1..50 do
        case Bridge.call(bridge, :execute_program, execute("?"), 1) do
          {:ok, %{"answer" => _}} -> :ok
          {:error, :timeout} -> :ok
        end
      end

      assert {:ok, %{"status" => "ok"}} = Bridge.call(bridge, :ping, %{}, 5_000)
      assert Bridge.get_status(bridge).pending == 0
      refute_received _anything
      nothing_runs(bridge)
    end

    test "a large request and a large reply" do
      bridge = shared()
      {:ok, _} = Bridge.call(bridge, :create_program, @qa)

      assert {:ok, %{"answer" => _}} =
               Bridge.call(bridge, :execute_program, execute(String.duplicate("x", 5_000_000)))
    end

    @tag :slow
    test "64 MiB both ways at once, and other callers meanwhile" do
      bridge = start()
      id = String.duplicate("x", 64 * 1024 * 1024 - 1_000)
      pings = Task.async(fn -> for _ <- 1..200, do: Bridge.call(bridge, :ping, %{}, 20_000) end)

      # A program's id comes back.
      definition = %{id: id, signature: "question -> answer"}

      assert {:ok, %{"program_id" => ^id}} =
               Bridge.call(bridge, :create_program, definition, 60_000)

      assert Enum.all?(Task.await(pings, 60_000), &match?({:ok, %{"status" => "ok"}}, &1))
    end
  end

  describe "answers that a test chooses" do
    test "in turn, or by the question; text that does not fit, too" do
      answers = %{
        "France" => %{answer: "Paris", population: 67},
        "did not fit" => %{answer: "Rome", population: 59},
        "*" => "I do not know."
      }

      bridge = shared()
      lm = %{model: "offline/script", answers: answers}
      signature = "question -> answer, population: int"
      program = %{id: "qa", signature: signature, adapter: "json", lm: lm}
      {:ok, _} = Bridge.call(bridge, :create_program, program)

      assert {:ok, %{"answer" => "Paris", "population" => 67}} =
               Bridge.call(bridge, :execute_program, execute("France?"))

      assert {:error, %Error{type: :output_invalid}} =
               Bridge.request(bridge, :execute_program, execute("Italy?"), [])

      args = Map.put(execute("Italy?"), :attempts, 2)

      assert {:ok, %{"answer" => "Rome"}, meta} =
               Bridge.request(bridge, :execute_program, args, [])

      assert meta["lm_calls"] == 2

      in_turn = %{model: "offline/script", answers: [%{answer: "one"}, %{answer: "two"}]}
      program = %{id: "turns", signature: "question -> answer", lm: in_turn}
      {:ok, _} = Bridge.call(bridge, :create_program, program)

      for answer <- ["one", "two"] do
        assert Bridge.call(bridge, :execute_program, execute("?", "turns")) ==
                 {:ok, %{"answer" => answer}}
      end

      assert {:error, %Error{type: :lm_error, retryable: false, message: text}} =
               Bridge.request(bridge, :execute_program, execute("?", "turns"), [])

      assert text =~ "all 2 answers are used"
    end
  end

  describe "an LM that takes its time" do
    # With a peer of its own if that is to end.
    setup context do
      bridge = if context[:slow], do: start(), else: shared()
      [lm: model, lm_options: options] = SilentLM.lm_opts(SilentLM.start())
      program = Map.put(@qa, :lm, Map.put(options, :model, model))
      {:ok, _} = Bridge.call(bridge, :create_program, program)
      %{bridge: bridge, late_replies: Bridge.get_status(bridge).late_replies}
    end

    test "a ping overtakes a run; the run's deadline closes the LM's connection", %{
      bridge: bridge
    } do
      task =
        Task.async(fn ->
          timed(fn -> Bridge.call(bridge, :execute_program, execute("?"), 2_000) end)
        end)

      assert_receive {:lm_request, _line}, 1_900
      {ms, {:ok, _}} = timed(fn -> Bridge.call(bridge, :ping, %{}, 1_000) end)
      assert ms < 250
      {ms, result} = Task.await(task)
      assert result == {:error, :timeout}
      assert ms < 2_250
      assert_receive :lm_closed, 1_000
      nothing_runs(bridge)
    end

    test "a list of inputs has its results by the caller's timeout: those that are there", %{
      bridge: bridge,
      late_replies: late_replies
    } do
      # The first is refused without the LM.
      inputs = [%{x: 1} | for(n <- 1..300, do: %{question: "#{n}"})]
      args = %{program_id: "qa", inputs: inputs}

      assert {:ok, %{"results" => [refused | late]}} =
               Bridge.call(bridge, :execute_program, args, 2_000)

      assert refused["error_type"] == "invalid_args"
      assert length(late) == 300 and Enum.all?(late, &(&1["error_type"] == "timeout"))
      nothing_runs(bridge)
      assert Bridge.get_status(bridge).late_replies == late_replies
    end

    test "a caller that dies has its run cancelled in the peer", %{bridge: bridge} do
      pid = spawn(fn -> Bridge.call(bridge, :execute_program, execute("?"), :infinity) end)
      assert_receive {:lm_request, _line}, 10_000
      Process.exit(pid, :kill)
      assert_receive :lm_closed, 2_000
      nothing_runs(bridge)
      assert Bridge.get_status(bridge).pending == 0
    end

    @tag :slow
    test "the peer killed: every request is made again by the next, which has the program", %{
      bridge: bridge
    } do
      callers =
        for _ <- 1..20,
            do: spawn(fn -> Bridge.call(bridge, :execute_program, execute("?"), 30_000) end)

      for _ <- callers, do: assert_receive({:lm_request, _line}, 10_000)
      old = Bridge.get_status(bridge).os_pid
      kill(old)
      for _ <- callers, do: assert_receive({:lm_request, _line}, 10_000)
      assert %{restarts: 1, state: :running, pending: 20} = Bridge.get_status(bridge)
      Enum.each(callers, &Process.exit(&1, :kill))
      nothing_runs(bridge)
    end

    @tag :slow
    test "stop leaves no process, busy as it is", %{bridge: bridge} do
      spawn(fn -> Bridge.call(bridge, :execute_program, execute("?"), 30_000) end)
      assert_receive {:lm_request, _line}, 10_000
      os_pid = Bridge.get_status(bridge).os_pid
      :ok = stop_supervised(Bridge)
      {ms, _} = timed(fn -> eventually(fn -> not alive?(os_pid) end) end)
      assert ms < 1_000
    end
  end

  describe "the wire examples, sent raw" do
    test "requests.json: each payload gets its reply" do
      peer = RawPeer.open()

      for %{"name" => name, "payload" => payload, "reply" => wanted} <- vectors("requests.json") do
        reply = RawPeer.exchange(peer, JSON.encode!(payload))
        assert contains?(reply, wanted), "#{name}: #{inspect(reply)} lacks #{inspect(wanted)}"
      end
    end

    test "malformed.json: each gets one error, and the next request is served" do
      peer = RawPeer.open()

      for vector <- vectors("malformed.json") do
        reply = RawPeer.exchange(peer, vector_bytes(vector))
        assert %{"success" => false, "error" => text, "error_type" => type} = reply

        assert {vector["name"], reply["id"], type} ==
                 {vector["name"], vector["id"], vector["error_type"]}

        assert text =~ (vector["error_has"] || ""), "#{vector["name"]}: #{text}"
        refute text =~ "\n"

        assert %{"id" => 1, "success" => true} =
                 RawPeer.exchange(peer, ~s({"id":1,"command":"ping"}))
      end
    end

    defp contains?(%{} = reply, %{} = wanted),
      do:
        Enum.all?(wanted, fn {key, value} ->
          is_map_key(reply, key) and contains?(reply[key], value)
        end)

    defp contains?(value, wanted), do: value === wanted
  end
end
