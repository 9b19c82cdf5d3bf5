defmodule DSPex.PythonBridge.Calls.EventsVectorsTest do
  @moduledoc "What goes between a request and its reply, by the wire examples that both sides read."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Calls.Journal
  alias DSPex.PythonBridge.Protocol

  for vector <- vectors("interim.json") do
    @vector vector
    test "from the peer: #{vector["name"]}" do
      %{"payload" => payload, "id" => id} = @vector

      case @vector do
        %{"stream" => chunk} ->
          assert Protocol.route(payload) == {:stream, id}
          assert Protocol.decode_chunk(payload) == {:ok, id, chunk}

        %{"journal" => entry} ->
          assert Protocol.route(payload) == {:journal, id}
          # As it was written, it goes to the next peer.
          assert payload =~ Protocol.journal_entry(payload)
          assert JSON.decode!(Protocol.journal_entry(payload)) == entry

        %{"tool_call" => %{"call_id" => call_id, "name" => name, "args" => args}} ->
          assert Protocol.route(payload) == {:tool_call, id}
          assert Protocol.decode_tool_call(payload) == {:ok, call_id, name, args}
      end
    end
  end

  for %{"payload" => %{"journal" => _}} = vector <- vectors("requests.json") do
    @vector vector
    test "to the peer, with its entries: #{vector["name"]}" do
      %{"command" => command, "args" => args, "payload" => payload} = @vector
      opts = [journal: Enum.map(payload["journal"], &JSON.encode!/1)]
      {:ok, body} = Protocol.encode_body(command, args)
      body = opts |> Journal.new(command, args, 0) |> Journal.body(body)
      assert JSON.decode!(~s({"id":#{@vector["id"]}#{body})) == payload
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
