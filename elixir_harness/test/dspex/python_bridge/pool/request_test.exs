defmodule DSPex.PythonBridge.Pool.RequestTest do
  @moduledoc "`Pool.request` of calls that must not be made twice. Its options are in client/options_test.exs."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.Test.PoolProbe

  defp start(opts) do
    name = Module.concat(__MODULE__, "Pool#{System.unique_integer([:positive])}")
    start_supervised!({Pool, Keyword.put(opts, :name, name)}, id: name)
    all_up(name)
    name
  end

  defp who(opts), do: start(fake_opts("who", opts))

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
end
