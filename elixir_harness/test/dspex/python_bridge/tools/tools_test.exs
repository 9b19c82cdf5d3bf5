defmodule DSPex.PythonBridge.Tools.ToolsTest do
  @moduledoc """
  Functions of the caller that the peer calls, with a peer that calls them by a script. Named after the races.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers
  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.{Bridge, Error, Pool, Tools}
  alias DSPex.Test.{Exits, FakePeer}

  doctest Tools.Runner

  defp start(opts \\ []), do: :plays |> FakePeer.opts(opts) |> start_and_wait()

  defp request(bridge, play, opts),
    do: Bridge.request(bridge, :execute_program, %{play: play}, opts)

  defp async(bridge, play, opts), do: Task.async(fn -> request(bridge, play, opts) end)
  defp go(bridge, name), do: Bridge.cast(bridge, :go, %{name: name})
  defp status(bridge, key), do: Map.fetch!(Bridge.get_status(bridge), key)

  # One call of each of these functions, all under way at once; the frames that the peer gets.
  defp results(bridge, functions) do
    numbered = Enum.with_index(functions, 1)
    calls = for {_function, n} <- numbered, do: ["tool", n, "tool#{n}", %{n: n}]
    waits = for {_function, n} <- numbered, do: ["result", n]
    tools = Map.new(numbered, fn {function, n} -> {"tool#{n}", function} end)
    play = calls ++ waits ++ [["reply"]]
    {:ok, results, _} = request(bridge, play, tools: tools, timeout: 10_000)
    for {_function, n} <- numbered, do: Map.delete(results["#{n}"], "call_id")
  end

  defp ok(result), do: %{"success" => true, "result" => result}

  # The frames about tools that the peer got, without cancels.
  defp tool_frames(bridge) do
    {:ok, %{"heard" => heard}} = Bridge.call(bridge, :heard)
    for %{"tool_result" => result} <- heard, do: result
  end

  defp tool_frames(bridge, call_id) do
    eventually(fn -> Enum.find(tool_frames(bridge), &(&1["call_id"] == call_id)) end)
  end

  # Sends its process, and that of its call, and does what only a kill can end.
  defp endless(test) do
    fn args ->
      Process.flag(:trap_exit, true)
      send(test, {:running, args, self(), proxy_of(self())})
      Process.sleep(:infinity)
    end
  end

  defp proxy_of(tool), do: elem(Process.info(tool, :parent), 1)

  defp watch(count) do
    for _ <- 1..count do
      assert_receive {:running, _args, tool, proxy}, 5_000
      for pid <- [tool, proxy], do: Process.monitor(pid)
    end
    |> List.flatten()
  end

  defp assert_dead(monitors) do
    for monitor <- monitors, do: assert_receive({:DOWN, ^monitor, :process, _pid, _reason}, 5_000)
  end

  describe "what a function does" do
    test "is a result if it has a JSON form, else an error in one line, which is not logged" do
      functions = [
        fn %{"n" => 1} -> "a string" end,
        fn _ -> {:ok, %{a: [1, nil, true]}} end,
        fn _ -> {:error, "as\nit is"} end,
        fn _ -> {:error, {:reason, 1}} end,
        fn _ -> raise ArgumentError, "two\n\n  lines" end,
        fn _ -> throw({:thrown, 1}) end,
        # What Task.await has to say of a task that raises.
        fn _ -> exit({{%ArgumentError{message: "boom"}, stack()}, {Task, :await, [:hidden]}}) end,
        fn _ -> raise String.duplicate("long\n", 100_000) end,
        fn _ -> raise %Exits.OnMessage{} end,
        fn _ -> throw(%Exits.OnInspect{}) end,
        fn _ -> {:a, 1} end,
        fn _ -> <<255>> end,
        fn _ -> %Exits.OnEncode{} end,
        fn _ -> Process.exit(self(), :kill) end,
        fn _ -> Process.exit(self(), :normal) end
      ]

      bridge = start()
      {results, log} = with_log(fn -> results(bridge, functions) end)
      assert [ok("a string"), ok(%{"a" => [1, nil, true]})] == Enum.take(results, 2)

      expected = [
        "as\nit is",
        "{:reason, 1}",
        "ArgumentError: two lines",
        "throw: {:thrown, 1}",
        "ArgumentError: boom",
        "RuntimeError: long long long",
        "error: a reason that cannot be shown",
        "throw: a reason that cannot be shown",
        "tool tool11: result: a tuple has no JSON form",
        "tool tool12: result: a string that is not valid UTF-8",
        "tool tool13: result: a struct DSPex.Test.Exits.OnEncode has no JSON form",
        "exit: :killed",
        "exit: :normal"
      ]

      for {%{"success" => false, "error" => text}, expected} <-
            Enum.zip(Enum.drop(results, 2), expected) do
        assert String.starts_with?(text, expected)
        assert String.length(text) <= 500
        refute text =~ "hidden"
      end

      # Others may log meanwhile.
      for contents <- ["long", "two", "thrown", "Exits"], do: refute(log =~ contents)
    end

    defp stack, do: [{__MODULE__, :hidden, [:hidden], [file: ~c"hidden.ex", line: 1]}]

    test "is an error when its frame is too large" do
      bridge = start(max_frame_bytes: 1_000)
      big = String.duplicate("x", 1_000)
      exact = String.duplicate("x", 1_000 - byte_size(frame("")))

      tools = %{
        "t1" => fn _ -> exact end,
        "t2" => fn _ -> big end,
        "t3" => fn _ -> {:error, big} end
      }

      calls = for n <- 1..3, do: ["tool", n, "t#{n}", %{}]
      waits = for n <- 1..3, do: ["result", n]
      assert {:ok, sizes, _} = request(bridge, calls ++ waits ++ [["sizes"]], tools: tools)
      assert sizes["1"] == byte_size(exact)
      for n <- ["2", "3"], do: assert(sizes[n] =~ "max_frame_bytes is 1000")
    end

    defp frame(result),
      do: ~s({"tool_result":{"call_id":1,"success":true,"result":#{JSON.encode!(result)}}})

    test "runs in its own process, which knows the caller" do
      test = self()

      tools = %{
        where: fn _ ->
          send(test, {:where, self(), Process.get(:"$callers"), Process.info(self(), :links)}) &&
            1
        end
      }

      Process.put(:"$callers", [:before])
      play = [["tool", 1, "where", %{}], ["result", 1], ["reply", %{}]]
      assert {:ok, %{}, _} = request(start(), play, tools: tools)
      assert_received {:where, pid, [^test, :before], {:links, links}}
      assert pid != test and test not in links
    end
  end

  describe "options" do
    test "wrong :tools are refused, and named" do
      for {tools, text} <- [
            {[search: & &1], ":tools: expected a map"},
            {%{search: fn -> 1 end}, ":tools: search: expected a function of one argument, or"},
            {%{search: {& &1, repeat: nil}},
             ":tools: search: :repeat: expected true or false, got nil"},
            {%{1 => & &1}, ":tools: expected names"},
            {%{:search => & &1, "search" => & &1}, ":tools: search: there twice"}
          ] do
        assert {:error, %Error{type: :invalid_request, message: message}} =
                 Bridge.request(:nobody, :execute_program, %{}, tools: tools)

        assert String.starts_with?(message, text)
      end
    end
  end

  describe "a tool that is not there" do
    test "is refused, by its name, for any caller" do
      bridge = start()
      play = fn n -> [["tool", n, "search", %{}], ["result", n], ["reply", %{}]] end
      args = fn n -> %{play: play.(n)} end
      text = "tool search: :tools was not given for this call"
      assert {:ok, %{}} = Bridge.call(bridge, :execute_program, args.(1), 10_000)
      assert {:ok, %{}, _} = request(bridge, play.(2), on_chunk: & &1)
      assert {:ok, %{}, _} = request(bridge, play.(3), tools: %{})
      assert :ok = Bridge.cast(bridge, :execute_program, args.(4))
      for n <- 1..4, do: assert(%{"success" => false, "error" => ^text} = tool_frames(bridge, n))
      tools = %{"b" => & &1, a: & &1}
      assert {:ok, %{}, _} = request(bridge, play.(5), tools: tools)
      text = "tool search: it was not given in :tools, which has a, b"
      assert %{"success" => false, "error" => ^text} = tool_frames(bridge, 5)

      name = Module.concat(__MODULE__, Pool)
      start_supervised!({Pool, Keyword.merge(FakePeer.opts(:plays), name: name, pool_size: 1)})
      assert {:ok, %{}} = Pool.call(name, :execute_program, args.(6), 10_000)
    end
  end

  describe "tools are dead, and their call's process is, after" do
    setup do
      bridge = start()
      %{bridge: bridge, open: [["tool", 1, "t", %{}], ["tool", 2, "t", %{}], ["go", "on"]]}
    end

    defp opts(more \\ []), do: [tools: %{t: endless(self())}] ++ more

    test "the reply", %{bridge: bridge, open: open} do
      task = async(bridge, open ++ [["reply", %{}]], opts())
      monitors = watch(2)
      refute_received {:DOWN, _, _, _, _}
      go(bridge, "on")
      assert {:ok, %{}, _} = Task.await(task)
      assert_dead(monitors)
      assert tool_frames(bridge) == []
    end

    test "the death of the caller", %{bridge: bridge, open: open} do
      opts = opts()
      caller = spawn(fn -> request(bridge, open, opts) end)
      monitors = watch(2)
      Process.exit(caller, :kill)
      assert_dead(monitors)
      eventually(fn -> status(bridge, :pending) == 0 end)
      {:ok, %{"heard" => heard}} = Bridge.call(bridge, :heard)
      assert [%{"cancel" => _id}] = heard
    end

    test "a stream that is halted", %{bridge: bridge, open: open} do
      stream = Bridge.stream(bridge, %{play: [["count", 1]] ++ open}, opts())
      suspend = fn element, _acc -> {:suspend, element} end
      {:suspended, _, next} = Enumerable.reduce(stream, {:cont, nil}, suspend)
      monitors = watch(2)
      next.({:halt, nil})
      assert_dead(monitors)
    end

    test "the end of the bridge", %{bridge: bridge, open: open} do
      task = async(bridge, open, opts())
      monitors = watch(2)
      Process.exit(bridge, :kill)
      assert {:error, %Error{type: :bridge_not_running}} = Task.await(task)
      assert_dead(monitors)
    end
  end

  describe "a tool with repeat: false" do
    setup do
      test = self()

      refund = fn %{}, key ->
        send(test, {:refund, self(), key})
        receive do: (:finish -> "refunded")
      end

      play = [["tool", 1, "refund", %{}], ["result", 1], ["go", "on"], ["reply"]]

      %{
        bridge: start(),
        tools: %{refund: {refund, repeat: false}},
        play: play
      }
    end

    defp assert_not_again(task, text) do
      assert {:error, %Error{type: :python_process_died} = error} = Task.await(task)
      assert error.message =~ text
      assert error.message =~ "repeat: false"
      # Whoever makes the call again calls the tool again.
      refute error.retryable
      refute_received {:refund, _pid, _key}
    end

    test "ends the run with its peer, if that is replaced and does not finish in time" do
      env = %{"DSPY_BRIDGE_DRAIN_MS" => "50"}
      bridge = start_supervised!({Bridge, FakePeer.opts(:plays, env: env)}, id: :impatient)
      test = self()
      refund = fn _ -> send(test, :refund) && Process.sleep(:infinity) end
      play = [["tool", 1, "refund", %{}], ["go", "on"]]
      task = async(bridge, play, tools: %{refund: {refund, repeat: false}})
      assert_receive :refund, 5_000
      assert Bridge.restart(bridge) == :ok
      assert_not_again(task, "was lost before it had replied")
    end

    test "makes no error of the run look retryable, once it has begun", %{bridge: bridge} do
      error = ~s({"id":ID,"success":false,"error":"x","error_type":"lm_error","retryable":true})
      play = fn n -> [["tool", n, "t", %{}], ["result", n], ["raw", error]] end

      for {repeat, n} <- [{false, 1}, {true, 2}] do
        tools = %{t: {fn _ -> 1 end, repeat: repeat}}
        assert {:error, %Error{type: :lm_error} = error} = request(bridge, play.(n), tools: tools)
        assert error.retryable == repeat
      end
    end

    test "lets a run be sent again in which it has not begun", context do
      %{bridge: bridge, tools: tools, play: play} = context
      task = async(bridge, [["first", [["go", "never"]], play]], tools: tools)
      eventually(fn -> status(bridge, :pending) == 1 end)
      FakePeer.kill(bridge)
      assert_receive {:refund, pid, _key}, 10_000
      send(pid, :finish)
      go(bridge, "on")
      assert {:ok, %{"1" => %{"result" => "refunded"}}, _} = Task.await(task)
    end
  end
end
