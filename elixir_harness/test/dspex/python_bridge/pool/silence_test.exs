defmodule DSPex.PythonBridge.Pool.SilenceTest do
  @moduledoc "A peer of a pool that hangs: calls avoid it, and its monitor replaces it soon."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Monitor, Pool}
  alias DSPex.PythonBridge.Pool.Handle
  alias DSPex.Test.SilentLM

  @pool __MODULE__.Pool

  defp start_up(opts) do
    start_supervised!({Pool, [name: @pool] ++ opts})
    all_up(@pool)
  end

  defp who(opts), do: "who" |> fake_opts() |> Keyword.delete(:name) |> Keyword.merge(opts)
  defp peers, do: Pool.status(@pool).peers

  # It is to be gone with its bridge, whatever the test does.
  defp stop(os_pid) do
    signal("STOP", os_pid)
    on_exit(fn -> System.cmd("/bin/sh", ["-c", "kill -9 #{os_pid}"], stderr_to_stdout: true) end)
  end

  defp ask(timeout) do
    case Pool.call(@pool, :who, %{}, timeout) do
      {:ok, %{"pid" => os_pid}} -> os_pid
      {:error, :timeout} -> :timeout
    end
  end

  test "a peer whose call has timed out is picked last, until it answers something" do
    [hung, other] = start_up(who(pool_size: 2))
    stop(hung.os_pid)
    assert Bridge.call(hung.bridge, :who, %{}, 50) == {:error, :timeout}
    assert for(_ <- 1..20, uniq: true, do: ask(60_000)) == [other.os_pid]

    # However busy the others are.
    held = for _ <- 1..5, do: Task.async(fn -> Pool.call(@pool, :hold, %{}, 60_000) end)
    eventually(fn -> Bridge.get_status(other.bridge).pending == 5 end)
    assert ask(60_000) == other.os_pid

    signal("CONT", hung.os_pid)
    eventually(fn -> ask(60_000) == hung.os_pid end, 20_000)
    assert Bridge.get_status(hung.bridge).restarts == 0
    Enum.each(held, &Task.shutdown(&1, :brutal_kill))
  end

  @tag :capture_log
  @tag :slow
  test "a peer whose event loop is blocked is replaced within 10 s of that" do
    env = %{
      "PYTHONPATH" => Path.dirname(fake("host")),
      "DSPY_BRIDGE_ALLOW_MODULES" => "host"
    }

    [blocked] = start_up(real_opts(name: @pool, env: env, pool_size: 1))

    for {id, type} <- [{"blocks", "host:Blocks"}, {"qa", "predict"}] do
      program = %{id: id, signature: "question -> answer", program_type: type}
      {:ok, _} = Pool.call(@pool, :create_program, program, 60_000)
    end

    run = fn id, timeout ->
      args = %{program_id: id, inputs: %{question: "3600"}}
      Pool.call(@pool, :execute_program, args, timeout)
    end

    assert run.("blocks", 100) == {:error, :timeout}

    eventually(
      fn ->
        run.("qa", 500)
        Bridge.get_status(blocked.bridge).restarts == 1
      end,
      60_000
    )

    assert {:ok, %{"answer" => _}} = run.("qa", 60_000)
    eventually(fn -> not alive?(blocked.os_pid) end)
  end

  test "a peer that waits for an LM answers pings, and is not replaced" do
    opts = SilentLM.start() |> SilentLM.lm_opts() |> real_opts() |> Keyword.delete(:name)
    [peer] = start_up(opts ++ [pool_size: 1])
    program = %{id: "qa", signature: "question -> answer"}
    {:ok, _} = Pool.call(@pool, :create_program, program, 30_000)
    execute = %{program_id: "qa", inputs: %{question: "?"}}

    for _ <- 1..10 do
      assert Pool.call(@pool, :execute_program, execute, 50) == {:error, :timeout}
    end

    # Where the peer's deadline came first it has answered, and its monitor has heard of nothing.
    health = Monitor.force_health_check(Handle.monitor(@pool, 1))
    assert %{status: :healthy, success_rate: 1.0} = health
    assert [%{state: :running, os_pid: os_pid}] = peers()
    assert os_pid == peer.os_pid
  end
end
