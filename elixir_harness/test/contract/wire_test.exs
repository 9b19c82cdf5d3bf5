defmodule DSPex.Contract.WireTest do
  @moduledoc "The contract: the examples of the wire (tests/vectors), sent raw, which docs/protocol.md explains."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Bridge
  alias DSPex.Test.RawPeer

  test "requests.json: each payload gets its reply, after what comes before it" do
    peer = RawPeer.open()

    for %{"name" => name, "payload" => payload, "reply" => reply} = vector <-
          vectors("requests.json") do
      RawPeer.write(peer, JSON.encode!(payload))

      for wanted <- Map.get(vector, "before", []) ++ [reply] do
        frame = RawPeer.frame(peer)
        assert contains?(frame, wanted), "#{name}: #{inspect(frame)} lacks #{inspect(wanted)}"
      end
    end
  end

  test "malformed.json: each gets one error, and the next request is served" do
    peer = RawPeer.open()

    for vector <- vectors("malformed.json") do
      reply = RawPeer.exchange(peer, vector_bytes(vector))
      assert %{"success" => false, "error" => text, "error_type" => type} = reply

      assert {vector["name"], reply["id"], type} ==
               {vector["name"], vector["id"], vector["error_type"]}

      assert text =~ (vector["error_has"] || ""), "#{vector["name"]}: #{text}"
      refute text =~ "\n"

      assert %{"id" => 1, "success" => true} =
               RawPeer.exchange(peer, ~s({"id":1,"command":"ping"}))
    end
  end

  @tag :slow
  test "64 MiB both ways at once, and other callers meanwhile" do
    bridge = start_supervised!({Bridge, real_opts()})
    id = String.duplicate("x", 64 * 1024 * 1024 - 1_000)
    pings = Task.async(fn -> for _ <- 1..200, do: Bridge.call(bridge, :ping, %{}, 20_000) end)

    # A program's id comes back.
    definition = %{id: id, signature: "question -> answer"}

    assert {:ok, %{"program_id" => ^id}} =
             Bridge.call(bridge, :create_program, definition, 60_000)

    assert Enum.all?(Task.await(pings, 60_000), &match?({:ok, %{"status" => "ok"}}, &1))
  end

  defp contains?(%{} = reply, %{} = wanted),
    do:
      Enum.all?(wanted, fn {key, value} ->
        is_map_key(reply, key) and contains?(reply[key], value)
      end)

  defp contains?(value, wanted), do: value === wanted
end
