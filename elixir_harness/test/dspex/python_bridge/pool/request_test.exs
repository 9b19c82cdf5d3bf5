defmodule DSPex.PythonBridge.Pool.RequestTest do
  @moduledoc "`Pool.request` without chunks and tools: options, metadata, and calls that must not be made twice."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.Test.PoolProbe

  defp start(opts) do
    name = Module.concat(__MODULE__, "Pool#{System.unique_integer([:positive])}")
    start_supervised!({Pool, Keyword.put(opts, :name, name)}, id: name)
    eventually(fn -> Enum.all?(Pool.status(name).peers, &(&1.state == :running)) end, 20_000)
    name
  end

  defp who(opts), do: start(fake_opts("who", opts))

  describe "with a real peer" do
    setup do
      pool = start(real_opts(pool_size: 2))
      args = %{id: "qa", signature: "question -> answer"}
      {:ok, _, meta} = Pool.request(pool, :create_program, args, timeout: 20_000)
      %{pool: pool, created: meta}
    end

    test "gives result and meta, and takes the options of Bridge.request", context do
      %{pool: pool} = context
      run = %{program_id: "qa", inputs: %{question: "Why?"}}
      opts = [history: true, attempts: 2, timeout: 20_000]

      assert {:ok, %{"answer" => "echo: Why?"}, meta} =
               Pool.request(pool, :execute_program, run, opts)

      assert %{"lm_calls" => 1, "history" => [%{"outputs" => _}], "duration_ms" => _} = meta
      assert {:ok, _, meta} = Pool.request(pool, "execute_program", run)
      refute is_map_key(meta, "history")

      batch = %{program_id: "qa", inputs: [%{question: "1"}, %{question: "2"}]}

      assert {:ok, %{"results" => [%{"success" => true}, _]}, _} =
               Pool.request(pool, :execute_program, batch, max_concurrency: 1)

      assert {:error, %Error{type: :program_not_found}} =
               Pool.request(pool, :execute_program, %{run | program_id: "none"})

      for {opts, text} <- [
            {[attempts: 0], ":attempts"},
            {[tiemout: 1], ":tiemout"},
            {[traceparent: "x"], ":traceparent"},
            {[timeout: -1], "timeout"},
            {5, "options"}
          ] do
        assert {:error, %Error{type: :invalid_request, message: message}} =
                 Pool.request(pool, :execute_program, run, opts)

        assert message =~ text
      end

      assert {:error, %Error{message: ":attempts: " <> _}} =
               Pool.request(pool, :ping, %{}, attempts: 2)
    end
  end

  describe "retry: false" do
    test "is not sent again when a peer dies with it" do
      pool = who(pool_size: 2)
      opts = [retry: false, timeout: 20_000]
      assert {:error, %Error{type: :python_process_died}} = Pool.request(pool, :die, %{}, opts)

      # Only one peer has had it; one that is being restarted may not show it yet.
      restarts = fn ->
        Enum.sum(for %{bridge: b} <- Pool.status(pool).peers, do: Bridge.get_status(b).restarts)
      end

      eventually(fn -> restarts.() == 1 end)
      eventually(fn -> PoolProbe.busy(pool) == [0, 0] end)
    end

    test "goes to another peer if its own has not got it" do
      pool = who(pool_size: 2)
      [one, two] = Pool.status(pool).peers
      # It looks ready, and is not.
      GenServer.stop(Process.whereis(one.bridge), :kill)

      for _ <- 1..4 do
        assert {:ok, %{"pid" => _}, _} = Pool.request(pool, :who, %{}, retry: false)
      end

      assert two.bridge in for(p <- Pool.status(pool).peers, p.state == :running, do: p.bridge)
      eventually(fn -> PoolProbe.busy(pool) == [0, 0] end)
    end
  end

  test "a bridge given to a pool's functions is named, with what to use" do
    bridge = start_supervised!({Bridge, fake_opts("who")})
    text = "#{inspect(bridge)} is a bridge: use Bridge.call, Bridge.request or Bridge.stream"
    assert Pool.call(bridge, :who, %{}, 1_000) == {:error, text}

    assert {:error, %Error{type: :invalid_request, message: ^text}} =
             Pool.request(bridge, :who, %{}, [])
  end
end
