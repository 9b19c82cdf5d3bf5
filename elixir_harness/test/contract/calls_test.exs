defmodule DSPex.Contract.CallsTest do
  @moduledoc "The contract: calls, their errors, limits and times."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error}
  alias DSPex.Test.SilentLM

  @secret "sk-secret-of-ours"
  @ask %{program_id: "qa", inputs: %{question: "?"}}

  setup_all do
    opts = [lm_options: %{api_key: @secret}, env: %{"SOME_KEY" => @secret}]
    bridge = start_supervised!({Bridge, real_opts(opts)})
    {:ok, _} = Bridge.call(bridge, :create_program, %{id: "qa", signature: "question -> answer"})
    %{bridge: bridge}
  end

  # A program whose LM never answers; it tells the test of each request and of each closed connection.
  defp silent_program(bridge) do
    [lm: model, lm_options: options] = SilentLM.lm_opts(SilentLM.start())
    id = "silent#{System.unique_integer([:positive])}"
    lm = Map.put(options, :model, model)
    args = %{id: id, signature: "question -> answer", lm: lm}
    {:ok, _} = Bridge.call(bridge, :create_program, args)
    %{program_id: id, inputs: %{question: "?"}}
  end

  defp gone?(bridge, id) do
    {:ok, %{"in_flight" => n}} = Bridge.call(bridge, :get_stats)
    {:ok, _} = Bridge.call(bridge, :cleanup, %{program_ids: [id]})
    n == 0
  end

  test "a ping has the time as a number", %{bridge: bridge} do
    assert {:ok, %{"status" => "ok", "timestamp" => at}} = Bridge.call(bridge, :ping)
    assert_in_delta at, System.os_time(:second), 60
  end

  test "an unknown program and an unknown command say so", %{bridge: bridge} do
    call = %{program_id: "tirage", inputs: %{}}
    assert Bridge.call(bridge, :execute_program, call) == {:error, "Program not found: tirage"}
    assert Bridge.call(bridge, :frobnicate) == {:error, "Unknown command: frobnicate"}
  end

  test "a request has errors with a type, and says whether to try again", %{bridge: bridge} do
    call = %{program_id: "tirage", inputs: %{}}
    text = "Program not found: tirage"
    assert {:error, error} = Bridge.request(bridge, :execute_program, call, [])
    assert %Error{type: :program_not_found, message: ^text, retryable: false} = error
    assert {:error, %Error{type: type}} = Bridge.request(bridge, :frobnicate, %{}, [])
    assert type == :unknown_command
    assert {:error, %Error{type: type}} = Bridge.request(bridge, :create_program, %{}, [])
    assert type == :invalid_args
  end

  test "a request has times, tokens and LM calls, and prompts if asked for", %{bridge: bridge} do
    assert {:ok, %{"answer" => _}, meta} =
             Bridge.request(bridge, :execute_program, @ask, history: true)

    assert %{"duration_ms" => ms, "queue_ms" => _, "lm_usage" => %{}, "lm_calls" => 1} = meta
    assert is_number(ms)
    assert [%{"model" => "offline/echo", "messages" => [_ | _]}] = meta["history"]
  end

  test "a bridge that does not run is an error, whatever names it" do
    for server <- [:no_such_bridge, self(), "text", {:global, :none}, nil] do
      assert Bridge.call(server, :ping, %{}, 1_000) == {:error, :bridge_not_running}
    end
  end

  test "500 calls at once each have their own reply", %{bridge: bridge} do
    tasks =
      for n <- 1..500 do
        Task.async(fn ->
          {n,
           Bridge.call(bridge, if(rem(n, 2) == 0, do: :ping, else: "command_#{n}"), %{}, 30_000)}
        end)
      end

    for {n, result} <- Task.await_many(tasks, 40_000) do
      if rem(n, 2) == 0,
        do: assert({:ok, %{"status" => "ok"}} = result),
        else: assert(result == {:error, "Unknown command: command_#{n}"})
    end

    assert %{pending: 0, unreadable_frames: 0} = Bridge.get_status(bridge)
  end

  test "a ping overtakes a run, whose timeout closes the LM's connection", %{bridge: bridge} do
    ask = silent_program(bridge)
    run = Task.async(fn -> timed(fn -> Bridge.call(bridge, :execute_program, ask, 2_000) end) end)
    assert_receive {:lm_request, _line}, 1_900
    assert {:ok, _} = Bridge.call(bridge, :ping, %{}, 1_000)
    assert {ms, {:error, :timeout}} = Task.await(run)
    assert ms < 2_250
    assert_receive :lm_closed, 1_000
    eventually(fn -> gone?(bridge, ask.program_id) end)
  end

  test "a caller that dies cancels its run", %{bridge: bridge} do
    ask = silent_program(bridge)
    caller = spawn(fn -> Bridge.call(bridge, :execute_program, ask, :infinity) end)
    assert_receive {:lm_request, _line}, 10_000
    Process.exit(caller, :kill)
    assert_receive :lm_closed, 2_000
    eventually(fn -> gone?(bridge, ask.program_id) end)
  end

  test "a timeout of 1 ms is a result or :timeout, and leaves nothing behind", %{bridge: bridge} do
    for _ <- 1..50 do
      case Bridge.call(bridge, :execute_program, @ask, 1) do
        {:ok, %{"answer" => _}} -> :ok
        {:error, :timeout} -> :ok
      end
    end

    refute_received _anything
    assert {:ok, %{"status" => "ok"}} = Bridge.call(bridge, :ping)
  end

  test "requests and replies of megabytes pass, and larger ones are refused", %{bridge: bridge} do
    ask = &%{@ask | inputs: %{question: String.duplicate("x", &1)}}
    assert {:ok, %{"answer" => _}} = Bridge.call(bridge, :execute_program, ask.(5_000_000))
    bridge = start_supervised!({Bridge, real_opts(max_frame_bytes: 100_000)}, id: :small)
    assert {:error, text} = Bridge.call(bridge, :execute_program, ask.(200_000))
    assert text =~ "max_frame_bytes"
    assert {:ok, %{"status" => "ok"}} = Bridge.call(bridge, :ping)
  end

  test "past max_pending a call is :overloaded at once", %{bridge: _bridge} do
    bridge = start_supervised!({Bridge, real_opts(max_pending: 1)}, id: :narrow)
    ask = silent_program(bridge)
    run = Task.async(fn -> Bridge.call(bridge, :execute_program, ask, 5_000) end)
    assert_receive {:lm_request, _line}, 10_000
    assert Bridge.call(bridge, :ping) == {:error, :overloaded}
    Task.shutdown(run, :brutal_kill)
    eventually(fn -> match?({:ok, _}, Bridge.call(bridge, :ping)) end)
  end

  test "an option that cannot be right is refused when the bridge starts, with its name" do
    assert {:error, text} = Bridge.start_link(name: nil, max_retires: 3)
    assert inspect(text) =~ "max_retires" and inspect(text) =~ "max_retries"
    assert {:error, text} = Bridge.start_link(name: nil, default_timeout: -1)
    assert inspect(text) =~ "default_timeout"
  end

  test "no key shows in ps, neither the peer's nor its watchdog's", %{bridge: bridge} do
    {processes, 0} = System.cmd("ps", ["-A", "-o", "pid,args"])
    assert processes =~ "#{Bridge.get_status(bridge).os_pid} "
    refute processes =~ @secret
  end

  test "the stats name the process, its memory and what it runs", %{bridge: bridge} do
    assert {:ok, %{"pid" => pid, "memory_usage" => %{"rss" => rss}} = stats} =
             Bridge.call(bridge, :get_stats)

    assert pid == Bridge.get_status(bridge).os_pid
    assert rss > 1_000_000 and stats["uptime"] > 0 and is_map(stats["versions"])
  end
end
