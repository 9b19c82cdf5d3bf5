defmodule DSPex.PythonBridge.Tools.FunctionHolderTest do
  @moduledoc """
  The holder of a call's functions while a pool tries one peer after the other: this process is the caller and all
  bridges.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.Client.StreamProxy
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Tools.{FunctionHolder, Invocation}

  # An attempt of a call in the calling process; the messages of its bridge come to the test.
  defp attempt(bridge, holder, opts \\ []) do
    timeout = Keyword.get(opts, :timeout, :infinity)
    request = %Request{body: "", retry: Keyword.get(opts, :retry, :pool)}

    proxy =
      StreamProxy.start(
        %{dest: bridge, deadline: Deadline.new(timeout), request: request},
        holder
      )

    if bridge == self() do
      assert_receive {:request, %Request{ref: ref, pid: ^proxy, tools?: true}}
      {proxy, ref}
    else
      proxy
    end
  end

  # The bridge's peer calls a tool.
  defp call_tool(ref, name, args \\ %{}, call_id \\ 1) do
    call = %{call_id: call_id, name: name, args: args}
    frame = JSON.encode!(%{id: 1, tool_call: call})

    send(
      ref,
      {ref, :tool_call, %Invocation{port: port(), id: 1, frame: frame, max_frame_bytes: 9_999}}
    )
  end

  # One for each attempt.
  defp port, do: hd(Port.list())

  defp reply(ref, reply), do: send(ref, {ref, reply})

  defp endless(test) do
    fn _args ->
      Process.flag(:trap_exit, true)
      send(test, {:running, self()})
      Process.sleep(:infinity)
    end
  end

  defp assert_down(pid) do
    monitor = Process.monitor(pid)
    assert_receive {:DOWN, ^monitor, :process, _pid, _reason}, 5_000
  end

  test "is there for the next attempt, and ends, with its tools, when the call is closed" do
    holder = FunctionHolder.open(%{"t" => endless(self()), "one" => fn _ -> 1 end})
    {proxy, ref} = attempt(self(), holder)
    reply(ref, {:error, {:died, :sent}})
    assert StreamProxy.next(proxy, :infinity) == {:over, {:error, {:died, :sent}}}
    assert_down(proxy)
    {proxy, ref} = attempt(self(), holder)
    call_tool(ref, "one")
    assert_receive {:tool_result, _port, 1, frame}
    assert frame =~ ~s("result":1)
    call_tool(ref, "t")
    assert_receive {:running, tool}, 5_000
    reply(ref, {:frame, ~s({"id":1,"success":false,"error":"no"})})
    assert {:over, {:frame, _}} = StreamProxy.next(proxy, :infinity)
    assert Process.alive?(holder)
    FunctionHolder.close(holder)
    for pid <- [tool, holder], do: assert_down(pid)
    assert FunctionHolder.close(holder) == :ok
  end

  test "ends with a reply that no other peer can change" do
    for {retry, reply} <- [
          {:pool, {:frame, ~s({"id":1,"success":true,"result":{}})}},
          {:bridge, {:frame, ~s({"id":1,"success":false,"error":"no"})}},
          {:never, {:error, :python_process_died}}
        ] do
      holder = FunctionHolder.open(%{"t" => endless(self())})
      {_proxy, ref} = attempt(self(), holder, retry: retry)
      call_tool(ref, "t")
      assert_receive {:running, tool}, 5_000
      reply(ref, reply)
      # Nobody has asked for the reply.
      for pid <- [tool, holder], do: assert_down(pid)
    end
  end

  test "ends with the time of the call, also if its caller has not asked for the reply yet" do
    holder = FunctionHolder.open(%{"t" => endless(self())})
    {_proxy, ref} = attempt(self(), holder, timeout: 300)
    call_tool(ref, "t")
    assert_receive {:running, tool}, 5_000
    reply(ref, {:error, {:died, :sent}})
    for pid <- [tool, holder], do: assert_down(pid)
  end

  test "ends with its caller, whatever that was doing" do
    test = self()

    for moment <- [:opened, :attended, :between, :attended_again] do
      caller =
        spawn(fn ->
          holder = FunctionHolder.open(%{"t" => endless(test)})
          send(test, {:holder, moment, holder})

          proxies =
            for again? <- [false, true],
                moment != :opened and (not again? or moment == :attended_again) do
              proxy = attempt(test, holder)
              if moment != :attended, do: StreamProxy.next(proxy, :infinity)
              proxy
            end

          send(test, {:reached, moment, proxies})
          Process.sleep(:infinity)
        end)

      assert_receive {:holder, ^moment, holder}

      if moment in [:between, :attended_again] do
        assert_receive {:request, %Request{ref: ref}}
        reply(ref, {:error, {:died, :sent}})
      end

      # What it runs then, if anything.
      tools =
        if moment in [:attended, :attended_again] do
          assert_receive {:request, %Request{ref: ref}}
          call_tool(ref, "t")
          assert_receive {:running, tool}, 5_000
          [tool]
        else
          if moment != :opened, do: assert_receive({:reached, ^moment, [_proxy]})
          []
        end

      Process.exit(caller, :kill)
      for pid <- [holder | tools], do: assert_down(pid)
    end
  end

  test "ends with a proxy that is killed" do
    holder = FunctionHolder.open(%{"t" => endless(self())})
    {proxy, ref} = attempt(self(), holder)
    call_tool(ref, "t")
    assert_receive {:running, tool}, 5_000
    StreamProxy.stop(proxy)
    for pid <- [tool, holder], do: assert_down(pid)
  end

  test "gives no function to a tool of an earlier attempt" do
    test = self()
    holder = FunctionHolder.open(%{"t" => endless(test)})
    FunctionHolder.attend(holder)

    earlier =
      spawn(fn ->
        receive do: (:ask -> send(test, {:got, FunctionHolder.fetch(holder, test, "t")}))
      end)

    {_proxy, _ref} = attempt(self(), holder)
    send(earlier, :ask)
    assert_receive {:got, :over}
    FunctionHolder.close(holder)
    assert eventually(fn -> not Process.alive?(holder) end)
  end
end
