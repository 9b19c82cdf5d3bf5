defmodule DSPex.PythonBridge.Tools.FunctionHolderTest do
  @moduledoc """
  The functions of a call while a pool tries one peer after the other: this process is the caller and all bridges.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers, only: [eventually: 1]

  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.Client.StreamProxy
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Tools.{FunctionHolder, Invocation, LargeFunction, Runner}

  @died {:error, {:died, :sent}}

  defp open(tools) do
    {:ok, functions} = Runner.functions(tools)
    FunctionHolder.open([tools: functions], nil, "p")
  end

  # Makes the call of the calling process by the test's process, the bridge.
  defp start(bridge, holder, opts \\ []) do
    deadline = Deadline.new(Keyword.get(opts, :timeout, :infinity))
    request = %Request{body: "", resend: Keyword.get(opts, :resend, :caller)}
    StreamProxy.start(%{dest: bridge, deadline: deadline, request: request}, holder)
  end

  # A peer of this process has the call.
  defp peer(holder, opts \\ []) do
    proxy = start(self(), holder, opts)
    assert_receive {:request, %Request{ref: ref, pid: ^proxy, tools?: true}}
    port = Port.open({:spawn_executable, System.find_executable("cat")}, [:binary])
    %{proxy: proxy, ref: ref, port: port}
  end

  defp die(%{ref: ref, proxy: proxy}) do
    send(ref, {ref, @died})
    assert StreamProxy.next(proxy, :infinity) == {:over, @died}
  end

  # The peer calls a tool.
  defp call(%{ref: ref, port: port}, call_id, name, args \\ %{}) do
    frame = JSON.encode!(%{id: 1, tool_call: %{call_id: call_id, name: name, args: args}})
    call = %Invocation{port: port, id: 1, frame: frame, max_frame_bytes: 9_999}
    send(ref, {ref, :tool_call, call})
  end

  defp result(%{port: port}, call_id) do
    assert_receive {:tool_result, ^port, 1, "{\"tool_result\":{\"call_id\":" <> _ = frame}, 5_000
    assert %{"tool_result" => %{"call_id" => ^call_id} = result} = JSON.decode!(frame)
    result["result"] || result["error"]
  end

  defp call_result(peer, call_id, name, args \\ %{}) do
    call(peer, call_id, name, args)
    result(peer, call_id)
  end

  # A tool that says that it runs, with its arguments, and returns what it is sent.
  defp slow(test) do
    fn args ->
      Process.flag(:trap_exit, true)
      send(test, {:running, self(), args})
      receive do: ({:finish, result} -> result)
    end
  end

  # How often it was called.
  defp counting do
    counter = :counters.new(1, [])
    count = fn -> :counters.get(counter, 1) end

    tool = fn args ->
      :counters.add(counter, 1, 1)
      "#{args["q"]}#{count.()}"
    end

    {tool, count}
  end

  defp assert_down(pid) do
    monitor = Process.monitor(pid)
    assert_receive {:DOWN, ^monitor, :process, _pid, _reason}, 5_000
  end

  describe "a call of the next peer" do
    test "that is like one with an answer gets that, in order, without the function" do
      {tool, count} = counting()
      holder = open(%{"t" => tool, "other" => tool, "fails" => fn _ -> raise "no" end})
      one = peer(holder)
      assert call_result(one, 1, "t", %{"q" => "a", "n" => 1}) == "a1"
      assert call_result(one, 2, "t", %{"q" => "a", "n" => 1}) == "a2"
      assert call_result(one, 3, "t", %{"q" => "b"}) == "b3"
      assert call_result(one, 4, "fails") == "RuntimeError: no"
      die(one)
      two = peer(holder)
      assert call_result(two, 1, "t", %{"q" => "b"}) == "b3"
      # The order of the arguments says nothing.
      assert call_result(two, 2, "t", %{"n" => 1, "q" => "a"}) == "a1"
      # Another tool, other arguments.
      assert call_result(two, 3, "other", %{"q" => "a", "n" => 1}) == "a4"
      assert call_result(two, 4, "t", %{"q" => "a", "n" => 2}) == "a5"
      assert call_result(two, 5, "t", %{"q" => "a", "n" => 1}) == "a2"
      assert call_result(two, 6, "t", %{"q" => "a", "n" => 1}) == "a6"
      assert call_result(two, "seven", "fails") == "RuntimeError: no"
      die(two)
      three = peer(holder)

      for n <- [1, 2, 6],
          do: assert(call_result(three, n, "t", %{"q" => "a", "n" => 1}) == "a#{n}")

      assert count.() == 6
      FunctionHolder.close(holder)
    end

    test "that is like one that runs waits for its answer; one for an earlier peer does no longer" do
      holder = open(%{"t" => slow(self())})
      one = peer(holder)
      call(one, 1, "t")
      assert_receive {:running, tool, %{}}, 5_000
      die(one)
      two = peer(holder)
      call(two, 1, "t")
      # It is asked for before the next one.
      call(two, 2, "t")
      assert_receive {:running, another, %{}}, 5_000
      die(two)
      three = peer(holder)
      for n <- 1..3, do: call(three, n, "t")
      assert_receive {:running, third, %{}}, 5_000
      for {pid, n} <- [{another, 2}, {tool, 1}, {third, 3}], do: send(pid, {:finish, n})
      # Which of those that were made at once is which, nobody can tell.
      results = for _ <- 1..3, do: any_result(three)
      assert Enum.sort(results) == [1, 2, 3]
      FunctionHolder.close(holder)
      refute_received {:running, _pid, _args}
      refute_received {:tool_result, _port, _id, _frame}
    end

    defp any_result(%{port: port}) do
      assert_receive {:tool_result, ^port, 1, frame}, 5_000
      JSON.decode!(frame)["tool_result"]["result"]
    end

    test "has the same call_key, which no other call has" do
      test = self()

      tool = fn args, key ->
        send(test, {:key, key})
        if args["slow"], do: receive(do: (:finish -> 1)), else: key
      end

      keys =
        for _run <- 1..2 do
          holder = open(%{"a" => tool, "b" => {tool, []}})
          one = peer(holder)
          first = for {name, n} <- [{"a", 1}, {"b", 2}, {"a", 3}], do: call_result(one, n, name)
          other = call_result(one, 4, "a", %{q: 1})
          die(one)
          two = peer(holder)
          # In another order, and each with what the other peer has got.
          assert call_result(two, 1, "a", %{q: 1}) == other
          again = for {name, n} <- [{"a", 2}, {"b", 3}, {"a", 4}], do: call_result(two, n, name)
          assert again == first
          FunctionHolder.close(holder)
          [other | first]
        end

      keys = List.flatten(keys)
      assert Enum.uniq(keys) == keys
      for key <- keys, do: assert(key =~ ~r/\A[0-9a-f]{32}\z/)
    end
  end

  describe "a tool with repeat: false" do
    defp refund(test) do
      open(%{
        "refund" => {slow(test), repeat: false},
        "key" => {fn _, key -> key end, repeat: false}
      })
    end

    test "begins once the bridge does not send the run again; then nor does a pool" do
      holder = refund(self())
      one = peer(holder)
      call(one, 1, "refund")
      assert_receive {:bind, port, 1, ref}, 5_000
      assert port == one.port
      refute_received {:running, _tool, _args}
      send(ref, {ref, :ok})
      assert_receive {:running, tool, %{}}, 5_000
      # What no bridge sends, but if it ends itself:
      send(one.ref, {one.ref, {:error, :bridge_not_running}})
      assert {:over, {:error, :bridge_not_running}} = StreamProxy.next(one.proxy, :infinity)
      proxy = start(self(), holder)
      assert StreamProxy.next(proxy, :infinity) == {:over, {:error, :tool_begun}}
      for pid <- [tool, holder], do: assert_down(pid)
      refute_received {:request, _request}
    end
  end

  describe "answers" do
  end

  describe "a large function" do
    # The same function with more captured than each call should have a copy of.
    defp large(function) do
      held = Enum.to_list(1..200_000)
      fn args -> if length(held) == 200_000, do: function.(args) end
    end

    defp terms, do: for({{LargeFunction, ref}, _} <- :persistent_term.get(), do: ref)

    test "is not copied for its calls, and its errors are those of any function" do
      size = fn %{"n" => n} ->
        if n == 2, do: Process.exit(self(), :kill)
        if n == 3, do: raise(ArgumentError, "no #{n}")
        Process.info(self(), :total_heap_size) |> elem(1)
      end

      one = peer(open(%{"t" => large(size)}))
      assert call_result(one, 1, "t", %{n: 1}) < 100_000
      assert call_result(one, 2, "t", %{n: 2}) == "exit: :killed"
      assert call_result(one, 3, "t", %{n: 3}) == "ArgumentError: no 3"
    end

    test "runs as often at once as it is called, and is erased at the end of the call" do
      before = terms()
      holder = open(%{"t" => large(slow(self()))})
      one = peer(holder)
      for n <- 1..20, do: call(one, n, "t", %{n: n})

      tools =
        for _ <- 1..20 do
          assert_receive {:running, tool, %{}}, 5_000
          tool
        end

      assert length(Enum.uniq(tools)) == 20
      assert [mine] = terms() -- before
      FunctionHolder.close(holder)
      for pid <- [holder | tools], do: assert_down(pid)
      eventually(fn -> mine not in terms() end)
    end
  end
end
