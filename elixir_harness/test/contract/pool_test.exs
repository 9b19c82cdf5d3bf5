defmodule DSPex.Contract.PoolTest do
  @moduledoc "The contract: a pool of Python processes."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.Test.SilentLM

  @pool __MODULE__.Pool
  @qa %{id: "qa", signature: "question -> answer"}
  @ask %{program_id: "qa", inputs: %{question: "?"}}

  setup_all do
    start_supervised!({Pool, real_opts(name: @pool, pool_size: 2, default_timeout: 20_000)})
    all_up(@pool)
    :ok
  end

  setup do
    {:ok, _} = Pool.call(@pool, :cleanup)
    {:ok, _} = Pool.call(@pool, :create_program, @qa)
    :ok
  end

  defp peers, do: Pool.status(@pool).peers

  test "a program is in every peer, those of its bridges that start later included" do
    for %{bridge: bridge} <- peers(),
        do: assert({:ok, %{"answer" => _}} = Bridge.call(bridge, :execute_program, @ask))
  end

  test "a call goes to the least busy peer" do
    [lm: model, lm_options: options] = SilentLM.lm_opts(SilentLM.start())
    lm = Map.put(options, :model, model)

    {:ok, _} =
      Pool.call(@pool, :create_program, %{id: "s", signature: "question -> answer", lm: lm})

    # A peer that still imports DSPy is taken last; with states, the list is answered afterwards.
    states = %{state: true, program_ids: []}
    for %{bridge: name} <- peers(), do: {:ok, _} = Bridge.call(name, :list_programs, states)
    ask = %{@ask | program_id: "s"}

    # One after the other: of two that choose at the same moment both may choose one.
    calls =
      for _ <- 1..4 do
        call = Task.async(fn -> Pool.call(@pool, :execute_program, ask) end)
        assert_receive {:lm_request, _line}, 10_000
        call
      end

    # A ping of its monitor may be on its way, too.
    eventually(fn -> Enum.map(peers(), & &1.pending) == [2, 2] end)
    Enum.each(calls, &Task.shutdown(&1, :brutal_kill))
    eventually(fn -> Enum.all?(peers(), &(&1.pending == 0)) end)
  end

  test "a definition that is wrong changes no peer" do
    assert {:error, %Error{type: :invalid_args}} =
             Pool.request(@pool, :create_program, %{@qa | signature: "question -> a: strng"}, [])

    assert {:ok, %{"answer" => _}} = Pool.call(@pool, :execute_program, @ask)
  end

  test "a removed program is gone from every peer" do
    assert {:ok, %{"programs_removed" => 1}} =
             Pool.call(@pool, :cleanup, %{program_ids: ["qa"]})

    for _ <- 1..4,
        do: assert({:error, "Program not found: qa"} = Pool.call(@pool, :execute_program, @ask))

    assert {:ok, %{"programs" => []}} = Pool.call(@pool, :list_programs)
  end

  test "no call is lost when a peer is killed, and the pool has its peers again" do
    calls =
      for n <- 1..200 do
        if n == 100, do: kill(hd(peers()).os_pid)
        Task.async(fn -> Pool.call(@pool, :execute_program, @ask, 30_000) end)
      end

    for result <- Task.await_many(calls, 40_000), do: assert({:ok, %{"answer" => _}} = result)
    all_up(@pool)
  end

  test "the stats are the sums of the peers'" do
    assert {:ok, %{"programs_count" => 1, "memory_usage" => %{"rss" => rss}}} =
             Pool.call(@pool, :get_stats)

    assert rss > 20_000_000
  end

  test "a bridge of the pool is given to a function, or checked out by name" do
    assert {:ok, {:ok, %{"status" => "ok"}}} = Pool.with_bridge(@pool, &Bridge.call(&1, :ping))

    assert {:ok, bridge} = Pool.checkout(@pool)
    assert {:ok, %{"status" => "ok"}} = Bridge.call(bridge, :ping)
    assert Pool.checkin(@pool, bridge) == :ok
  end

  test "a pool streams as a bridge does" do
    elements = Enum.to_list(Pool.stream(@pool, @ask))
    assert [{:chunk, "answer", _} | _] = elements
    assert {:ok, %{"answer" => _}, _meta} = List.last(elements)
  end

  test "a pool that does not run is an error" do
    assert Pool.call(:no_such_pool, :ping) == {:error, :bridge_not_running}
    assert {:error, %Error{}} = Pool.request(:no_such_pool, :ping, %{}, [])
  end
end
