defmodule DSPex.PythonBridge.Calls.EventsVectorsTest do
  @moduledoc "What goes between a request and its reply, by the wire examples that both sides read."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Protocol

  for vector <- vectors("interim.json") do
    @vector vector
    test "from the peer: #{vector["name"]}" do
      %{"payload" => payload, "id" => id} = @vector

      case @vector do
        %{"stream" => chunk} ->
          assert Protocol.route(payload) == {:stream, id}
          assert Protocol.decode_chunk(payload) == {:ok, id, chunk}

        %{"tool_call" => %{"call_id" => call_id, "name" => name, "args" => args}} ->
          assert Protocol.route(payload) == {:tool_call, id}
          assert Protocol.decode_tool_call(payload) == {:ok, call_id, name, args}
      end
    end
  end

  for vector <- vectors("tool_results.json") do
    @vector vector
    test "to the peer: #{vector["name"]}" do
      result =
        case @vector do
          %{"error" => text} -> {:error, text}
          %{"result" => term} -> {:ok, term}
        end

      assert Protocol.encode_tool_result(@vector["call_id"], result) ==
               {:ok, @vector["payload"]}
    end
  end
end
