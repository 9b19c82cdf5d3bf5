defmodule DSPex.PythonBridge.Tools.OnceTest do
  @moduledoc """
  Tools of an agent whose peer is killed in the middle of a run: the real peer, with an LM whose answers are in a list,
  from which each peer starts anew.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.Test.{Loopback, PoolProbe}

  @agent %{
    id: "agent",
    signature: "question -> answer",
    program_type: "react",
    options: %{max_iters: 10},
    tools: [%{name: "do", description: "does", args: %{what: "string"}}]
  }
  @ask %{program_id: "agent", inputs: %{question: "Why?"}}

  # An agent that makes these calls of its tool, one after the other.
  defp opts(calls) do
    steps = for what <- calls, do: %{next_tool_name: "do", next_tool_args: %{what: what}}
    answers = steps ++ [%{next_tool_name: "finish"}, %{answer: "done"}]
    real_opts(lm: "offline/script", lm_options: %{answers: answers}, default_timeout: 30_000)
  end

  defp start(calls) do
    bridge = start_supervised!({Bridge, opts(calls)})
    {:ok, _} = Bridge.call(bridge, :create_program, @agent)
    bridge
  end

  defp start_pool(calls, opts \\ []) do
    pool = Module.concat(__MODULE__, "Pool#{System.unique_integer([:positive])}")
    opts = Keyword.merge([name: pool, pool_size: 2], opts)
    start_supervised!({Pool, Keyword.merge(opts(calls), opts)})
    {:ok, _} = Pool.call(pool, :create_program, @agent, 30_000)
    eventually(fn -> Enum.all?(Pool.status(pool).peers, &(&1.state == :running)) end, 20_000)
    pool
  end

  defp ask(server, tool, opts \\ []) do
    opts = [tools: %{"do" => tool}] ++ opts
    module = if is_pid(server), do: Bridge, else: Pool
    Task.async(fn -> module.request(server, :execute_program, @ask, opts) end)
  end

  # Sends the test what it does, and with what call_key, and does it when told to.
  defp doer do
    test = self()

    fn %{"what" => what}, key ->
      send(test, {:does, what, key, self()})
      receive do: ({:done, result} -> result)
    end
  end

  defp done(what, result) do
    assert_receive {:does, ^what, key, pid}, 20_000
    send(pid, {:done, result})
    key
  end

  # The peer that has the run.
  defp kill_peer(bridge) when is_pid(bridge), do: kill(Bridge.get_status(bridge).os_pid)

  defp kill_peer(pool) do
    [peer] = for {peer, 1} <- Enum.zip(Pool.status(pool).peers, PoolProbe.busy(pool)), do: peer
    kill(peer.os_pid)
  end

  defp observations({:ok, %{"answer" => "done", "trajectory" => trajectory}, _meta}),
    do: for(n <- 0..9, seen = trajectory["observation_#{n}"], do: seen)

  test "a call that was answered is not made again by the next peer" do
    bridge = start(["a", "a", "b", "c"])
    request = ask(bridge, doer())
    keys = [done("a", "one"), done("a", "two")]
    assert_receive {:does, "b", key, pid}, 10_000
    kill_peer(bridge)
    # The peer that has asked is dead.
    send(pid, {:done, "three"})
    assert_receive {:does, "c", last, pid}, 20_000
    keys = [key, last | keys]
    assert Enum.uniq(keys) == keys
    # Now the next peer asks while the function runs.
    kill_peer(bridge)

    eventually(
      fn -> match?(%{state: :running, restarts: 2}, Bridge.get_status(bridge)) end,
      20_000
    )

    send(pid, {:done, "four"})
    result = Task.await(request, 20_000)
    assert observations(result) == ["one", "two", "three", "four", "Completed."]
    refute_received {:does, _what, _key, _pid}
  end

  test "a call that was answered is not made again by another peer of a pool" do
    pool = start_pool(["a", "a", "b"])
    request = ask(pool, doer())
    keys = [done("a", "one"), done("a", "two")]
    assert_receive {:does, "b", key, pid}, 10_000
    kill_peer(pool)
    send(pid, {:done, "three"})
    result = Task.await(request, 20_000)
    assert observations(result) == ["one", "two", "three", "Completed."]
    refute_received {:does, _what, _key, _pid}
    assert Enum.uniq([key | keys]) == [key | keys]
  end

  test "a call that goes on after the death of its peer ends with the run" do
    for server <- [start(["a"]), start_pool(["a"])] do
      request = ask(server, doer(), timeout: 2_000)
      assert_receive {:does, "a", _key, pid}, 10_000
      kill_peer(server)
      assert {:error, %Error{type: :timeout}} = Task.await(request, 20_000)
      refute Process.alive?(pid)
    end
  end

  test "a call with repeat: false ends the run when its peer dies, once it has begun" do
    for server <- [start(["a", "b"]), start_pool(["a", "b"])], answered? <- [false, true] do
      request = ask(server, {doer(), repeat: false})
      if answered?, do: done("a", "one")
      what = if answered?, do: "b", else: "a"
      assert_receive {:does, ^what, _key, pid}, 20_000
      kill_peer(server)
      assert {:error, %Error{type: :python_process_died} = error} = Task.await(request, 20_000)
      assert error.message =~ "repeat: false" and not error.retryable
      refute Process.alive?(pid)
      refute_received {:does, _what, _key, _pid}
    end
  end

  test "a call with repeat: false that has begun when its pool ends must not be made again" do
    pool = start_pool(["a"], pool_size: 1, env: %{"DSPY_BRIDGE_DRAIN_MS" => "0"})
    request = ask(pool, {doer(), repeat: false})
    assert_receive {:does, "a", _key, pid}, 20_000
    stop_supervised!(pool)
    assert {:error, %Error{type: :python_process_died} = error} = Task.await(request, 20_000)
    assert error.message =~ "repeat: false" and not error.retryable
    refute Process.alive?(pid)
  end

  # Answers its first request with a call of the tool, all others with 429.
  defp busy_lm do
    asked = :counters.new(1, [])

    step =
      "[[ ## next_thought ## ]]\nt\n\n[[ ## next_tool_name ## ]]\ndo\n\n[[ ## next_tool_args ## ]]\n" <>
        ~s({"what": "a"})

    choice = %{index: 0, finish_reason: "stop", message: %{role: "assistant", content: step}}

    Loopback.start(fn socket, _owner ->
      Loopback.answer_requests(socket, fn ->
        :counters.add(asked, 1, 1)

        {status, body} =
          if :counters.get(asked, 1) == 1,
            do: {"200 OK", %{choices: [choice]}},
            else: {"429 Too Many Requests", %{error: %{message: "slow down"}}}

        body =
          %{id: "c", object: "chat.completion", created: 0, model: "m"}
          |> Map.merge(body)
          |> JSON.encode!()

        head = "HTTP/1.1 #{status}\r\ncontent-type: application/json\r\n"
        [head, "content-length: #{byte_size(body)}\r\n\r\n", body]
      end)
    end)
  end

  test "a retryable error after a call with repeat: false has begun does not look retryable" do
    for {module, repeat} <- [{Bridge, false}, {Pool, false}, {Bridge, true}] do
      lm = %{
        api_base: "http://127.0.0.1:#{busy_lm()}/v1",
        api_key: "k",
        num_retries: 0,
        cache: false
      }

      name = Module.concat(__MODULE__, "Busy#{System.unique_integer([:positive])}")
      opts = real_opts(lm: "openai/m", lm_options: lm, default_timeout: 30_000)
      size = if module == Pool, do: [pool_size: 1], else: []
      start_supervised!({module, Keyword.put(opts, :name, name) ++ size}, id: name)
      {:ok, _} = module.call(name, :create_program, @agent)
      tools = %{"do" => {fn %{"what" => "a"} -> "one" end, repeat: repeat}}
      assert {:error, error} = module.request(name, :execute_program, @ask, tools: tools)
      assert {error.type, error.retryable} == {:lm_error, repeat}
    end
  end
end
