defmodule DSPex.PythonBridge.Client.DeadlineTest do
  @moduledoc "The deadline that a peer is told, of requests that take long to encode."

  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Bridge, Pool, Protocol}
  alias DSPex.Test.FakePeer

  @pool __MODULE__.Pool

  test "counts from before the encoding, of a bridge and of a pool" do
    bridge = start_supervised!({Bridge, FakePeer.opts(:echo)})
    start_supervised!({Pool, Keyword.merge(FakePeer.opts(:echo), name: @pool, pool_size: 1)})
    args = %{a: Enum.to_list(1..300_000), b: "small"}
    encode = fn -> {:ok, _body} = Protocol.encode_body(:echo, args) end
    encoding_ms = Enum.min(for _ <- 1..2, do: elem(:timer.tc(encode), 0) / 1_000)

    for request <- [&Bridge.request(bridge, &1, &2, &3), &Pool.request(@pool, &1, &2, &3)] do
      # The peers are up.
      assert {:ok, _, _} = request.(:echo, %{}, timeout: 60_000)
      assert {:ok, %{"timeout_ms" => told}, _meta} = request.(:echo, args, timeout: 600_000)
      # Each encoding takes another time on a busy machine.
      assert told < 600_000 - encoding_ms / 4
    end
  end
end
