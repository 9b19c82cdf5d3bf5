defmodule DSPex.PythonBridge.Tools.OnceTest do
  @moduledoc """
  Tools of an agent whose peer is killed in the middle of a run: the real peer.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.Test.{AgentLM, PoolProbe}

  @bridge __MODULE__.Bridge
  @pool __MODULE__.Pool

  setup_all do
    {lm, _asked} = AgentLM.start()
    opts = real_opts(default_timeout: 30_000)
    start_supervised!({Bridge, Keyword.put(opts, :name, @bridge)})
    start_supervised!({Pool, Keyword.merge(opts, name: @pool, pool_size: 2)})

    for server <- [@bridge, @pool],
        do: {:ok, _} = module(server).call(server, :create_program, AgentLM.agent("agent", lm))

    :ok
  end

  # The server, and what its agent calls its tool with.
  defp start(server, calls) do
    idle? = &(&1.state == :running and &1.pending == 0)
    eventually(fn -> Enum.all?(peers(server), idle?) end, 20_000)
    {server, Enum.join(calls, " ")}
  end

  defp module(@bridge), do: Bridge
  defp module(_pool), do: Pool

  defp peers(@bridge), do: [Bridge.get_status(@bridge)]
  defp peers(pool), do: Pool.status(pool).peers

  defp ask({server, question}, tool) do
    args = %{program_id: "agent", inputs: %{question: question}}
    opts = [tools: %{"do" => tool}]
    Task.async(fn -> module(server).request(server, :execute_program, args, opts) end)
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
  defp kill_peer({@bridge, _id}), do: kill(Bridge.get_status(@bridge).os_pid)

  defp kill_peer({pool, _id}) do
    [peer] = for {peer, 1} <- Enum.zip(Pool.status(pool).peers, PoolProbe.busy(pool)), do: peer
    kill(peer.os_pid)
  end

  defp observations({:ok, %{"trajectory" => trajectory}, _meta}),
    do: for(n <- 0..9, seen = trajectory["observation_#{n}"], do: seen)

  test "a call that was answered is not made again by the next peer" do
    agent = start(@bridge, ["a", "a", "b", "c"])
    %{restarts: restarts} = Bridge.get_status(@bridge)
    request = ask(agent, doer())
    keys = [done("a", "one"), done("a", "two")]
    assert_receive {:does, "b", key, pid}, 10_000
    kill_peer(agent)
    # The peer that has asked is dead.
    send(pid, {:done, "three"})
    assert_receive {:does, "c", last, pid}, 20_000
    keys = [key, last | keys]
    assert Enum.uniq(keys) == keys
    # Now the next peer asks while the function runs.
    kill_peer(agent)
    restarts = restarts + 2

    eventually(
      fn -> match?(%{state: :running, restarts: ^restarts}, Bridge.get_status(@bridge)) end,
      20_000
    )

    send(pid, {:done, "four"})
    result = Task.await(request, 20_000)
    assert ["one", "two", "three", "four", _of_the_end] = observations(result)
    refute_received {:does, _what, _key, _pid}
  end

  test "a call with repeat: false ends the run when its peer dies, once it has begun" do
    for {server, answered?} <- [{@bridge, true}, {@pool, false}],
        do: assert_ends_with_peer(server, answered?)
  end

  defp assert_ends_with_peer(server, answered?) do
    agent = start(server, ["a", "b"])
    request = ask(agent, {doer(), repeat: false})
    if answered?, do: done("a", "one")
    what = if answered?, do: "b", else: "a"
    assert_receive {:does, ^what, _key, pid}, 20_000
    kill_peer(agent)
    assert {:error, %Error{type: :python_process_died} = error} = Task.await(request, 20_000)
    assert error.message =~ "repeat: false" and not error.retryable
    refute Process.alive?(pid)
    refute_received {:does, _what, _key, _pid}
  end
end
