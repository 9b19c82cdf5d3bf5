defmodule DSPex.PythonBridge.Protocol.ProtocolTest do
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Error, Protocol}
  alias DSPex.PythonBridge.Protocol.{Payload}

  doctest Protocol
  doctest Payload

  describe "encode_request/3" do
    for vector <- vectors("requests.json") do
      @vector vector
      test "gives the payload of the wire example: #{vector["name"]}" do
        %{"id" => id, "command" => command, "args" => args} = @vector
        sent = id |> Protocol.encode_request(command, args) |> JSON.decode!()

        # Keys that the example has of its own are there to be ignored by a peer.
        wanted = Map.take(@vector["payload"], ["id", "command", "args"])
        assert Map.take(sent, Map.keys(wanted)) == wanted
        assert Map.keys(sent) == ["args", "command", "id", "timestamp"]
        assert {:ok, %DateTime{}, 0} = DateTime.from_iso8601(sent["timestamp"])
      end
    end

    test "raises ArgumentError for an id or args without a JSON form" do
      for {id, command, args} <- [
            {1.5, :ping, %{}},
            {nil, :ping, %{}},
            {1, nil, %{}},
            {1, 5, %{}},
            {1, :ping, []},
            {1, :ping, %{pid: self()}}
          ] do
        assert_raise ArgumentError, fn -> Protocol.encode_request(id, command, args) end
      end
    end
  end

  describe "encode_body/3" do
    test "names the argument that has no JSON form, and never raises" do
      for {args, text} <- [
            {%{a: self()}, "args.a: it has no JSON form"},
            {%{a: %{b: [fn -> 1 end]}}, "args.a.b[0]: a function has no JSON form"},
            {%{a: "cut " <> <<0xC5>>}, "args.a: a string that is not valid UTF-8"},
            {%{a: [1 | 2]}, "args.a: it has no JSON form"},
            {%{{1, 2} => 1}, "args: expected a map whose keys are strings"},
            {%{a: %URI{}}, "no JSON form"},
            {[a: 1], "expected a map"},
            {nil, "expected a map"},
            {"text", "expected a map"}
          ] do
        assert {:error, %Error{type: :invalid_args, message: message}} =
                 Protocol.encode_body(:ping, args)

        assert message =~ "args"
        assert message =~ text
      end
    end

    test "asks for meta, for the LM calls in it, and for chunks, by options" do
      for opts <- [
            [],
            [meta: true],
            [stream: true, meta: true],
            [meta: true, history: true],
            [meta: true, lm_events: true],
            [meta: false, retry: true]
          ] do
        {:ok, body} = Protocol.encode_body(:ping, %{}, opts)
        sent = JSON.decode!(~s({"id":1) <> body)
        asked = Map.take(sent, ["meta", "history", "lm_events", "stream"])
        assert asked == for({key, true} <- opts, key != :retry, into: %{}, do: {"#{key}", true})
      end
    end

    test "has the trace, if there is one" do
      trace = ~S(01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-"\x)

      for {opts, expected} <- [{[traceparent: trace, meta: true], trace}, {[meta: true], nil}] do
        {:ok, body} = Protocol.encode_body(:ping, %{}, opts)
        sent = JSON.decode!(~s({"id":1) <> body)
        assert {sent["traceparent"], sent["meta"], sent["command"]} == {expected, true, "ping"}
      end
    end
  end

  describe "decode_response/1 and decode_reply/1" do
    for vector <- vectors("replies.json") do
      @vector vector
      test "on the wire example: #{vector["name"]}" do
        %{"payload" => payload, "decoded" => decoded} = @vector

        case decoded do
          %{"malformed" => true} ->
            assert {:error, {kind, text}} = Protocol.decode_response(payload)
            assert kind in [:invalid_json, :not_a_reply] and is_binary(text)
            assert {:error, {^kind, ^text}} = Protocol.decode_reply(payload)

          %{"ok" => true, "id" => id, "result" => result} ->
            assert Protocol.decode_response(payload) == {:ok, id, result}
            assert Protocol.decode_reply(payload) == {:ok, id, result, decoded["meta"] || %{}}

          %{"ok" => false, "id" => id, "error" => text} ->
            assert Protocol.decode_response(payload) == {:error, id, text}
            assert {:error, ^id, %Error{} = error} = Protocol.decode_reply(payload)
            assert Atom.to_string(error.type) == decoded["error_type"]
            assert error.message == text
            assert error.retryable == (decoded["retryable"] || false)
            assert error.meta == decoded["meta"]
        end
      end
    end

    test "a success is read alike, in whatever form it is written" do
      {result, meta} = {%{"a" => [1, nil, %{"b" => "c"}]}, %{"lm_calls" => 2}}

      for {payload, expected} <- [
            {~s({"id":7,"success":true,"result":{"a":[1,null,{"b":"c"}]},"meta":{"lm_calls":2}}),
             {:ok, 7, result, meta}},
            {~s({"id":7,"success":true,"meta":{"lm_calls":2},"result":{"a":[1,null,{"b":"c"}]}}),
             {:ok, 7, result, meta}},
            {~s({"id": 7, "success": true, "result": 1.5e1, "meta": {"lm_calls": 2}}),
             {:ok, 7, 15.0, meta}},
            {~s({"success":true,"result":null,"id":"x"}), {:ok, "x", nil, %{}}},
            {~s({"id":7,"success":true,"result":"a" , "more":0} ), {:ok, 7, "a", %{}}},
            {~s({"id":7,"success":true,"result":1,"meta":null}), {:ok, 7, 1, %{}}},
            {~s({"id":7,"success":true,"result":1,"meta":{"lm_calls":2},"more":0}),
             {:ok, 7, 1, meta}}
          ] do
        assert Protocol.decode_reply(payload) == expected
      end
    end

    test "nesting a million deep gives an answer" do
      assert {:error, {:invalid_json, _}} =
               Protocol.decode_response(String.duplicate("[", 1_000_000))

      deep = String.duplicate("[", 100_000) <> String.duplicate("]", 100_000)
      assert {:error, {:not_a_reply, _}} = Protocol.decode_response(deep)
    end

    test "an integer past the system's limit gives an answer" do
      digits = String.duplicate("9", 5_000_000)
      assert {:error, {:invalid_json, _}} = Protocol.decode_response(~s({"id":#{digits}}))
    end

    test "every cut of a good frame gives an error, and a route that is right or none" do
      for {good, decode, routes} <- [
            {~s({"id":7,"success":true,"result":{"a":"ž \\" 🐎","b":[1.5,null,true]},"meta":{}}),
             &Protocol.decode_response/1, []},
            {~s({"log":{"level":"info","logger":"a","message":"ž"}}), &Protocol.decode_log/1,
             [:log]},
            {~s({"id":7,"stream":{"field":"answer","chunk":"ž"}}), &Protocol.decode_chunk/1,
             [{:stream, 7}]},
            {~s({"id":7,"tool_call":{"call_id":7,"name":"t","args":{"a":"ž"}}}),
             &Protocol.decode_tool_call/1, [{:tool_call, 7}]}
          ] do
        assert elem(decode.(good), 0) == :ok

        for size <- 0..(byte_size(good) - 1) do
          cut = binary_part(good, 0, size)
          assert {:error, {:invalid_json, _}} = decode.(cut)
          assert Protocol.route(cut) in [:none, {:reply, 7} | routes]
        end
      end
    end

    test "any bytes give one of the three answers (seeded)" do
      :rand.seed(:exsss, {1, 2, 3})
      good = ~s({"id":7,"success":false,"error":"x","error_type":"timeout","retryable":false})

      for round <- 1..3_000 do
        bytes = if rem(round, 2) == 0, do: :rand.bytes(:rand.uniform(64)), else: mutate(good)

        case Protocol.decode_response(bytes) do
          {:ok, id, _result} ->
            assert is_integer(id) or is_binary(id)

          {:error, id, text} ->
            assert (is_integer(id) or is_binary(id) or is_nil(id)) and is_binary(text)

          {:error, {kind, text}} ->
            assert is_atom(kind) and is_binary(text)
        end

        assert Protocol.route(bytes) == :none or match?({:reply, _}, Protocol.route(bytes))
        assert match?({:error, {_, _}}, Protocol.decode_chunk(bytes))
        assert match?({:error, {_, _}}, Protocol.decode_tool_call(bytes))
        assert match?({:error, {_, _}}, Protocol.decode_log(bytes))
      end
    end
  end

  describe "route/1" do
    test "finds an integer id with and without a space before it" do
      assert Protocol.route(~s({"id":0,"x":1})) == {:reply, 0}
      assert Protocol.route(~s({"id": 42, "x": 1})) == {:reply, 42}
      assert Protocol.route(~s({"id":42})) == {:reply, 42}
    end

    test "distinguishes chunks and tool calls by the second key" do
      assert Protocol.route(~s({"id":7,"stream":{}})) == {:stream, 7}
      assert Protocol.route(~s({"id": 7, "stream": {}})) == {:stream, 7}
      assert Protocol.route(~s({"id":7,"tool_call":{}})) == {:tool_call, 7}
      assert Protocol.route(~s({"id": 7, "tool_call": {}})) == {:tool_call, 7}
      # A reply, whatever is in it; and a missing number is not a call of ours.
      assert Protocol.route(~s({"id":7,"success":true,"stream":{}})) == {:reply, 7}
      assert Protocol.route(~s({"id":7,"streams":{}})) == {:reply, 7}
      assert Protocol.route(~s({"id":null,"stream":{}})) == :none
      assert Protocol.route(~s({"id":"7","tool_call":{}})) == :none
      assert Protocol.route(~s({"stream":{},"id":7})) == :none
    end
  end

  describe "decode_log/1" do
    test "knows Python's levels; all others are :info" do
      for {level, meant} <- [
            {"debug", :debug},
            {"info", :info},
            {"warning", :warning},
            {"error", :error},
            {"critical", :critical},
            {"level 25", :info},
            {"emergency", :info},
            {nil, :info},
            {%{}, :info}
          ] do
        frame = JSON.encode!(%{log: %{level: level, logger: "ž", message: "m", more: 1}})
        assert Protocol.route(frame) == :log
        assert Protocol.decode_log(frame) == {:ok, meant, "m", [python_logger: "ž"]}
      end

      # As Python's json.dumps writes it.
      assert Protocol.route(~s({"log": {"message": "m"}})) == :log

      assert Protocol.decode_log(~s({"log": {"message": "m"}})) ==
               {:ok, :info, "m", [python_logger: nil]}
    end

    test "has the trace, if it is a string" do
      for {trace, expected} <- [{"00-a-b-01", "00-a-b-01"}, {nil, nil}, {5, nil}] do
        frame = JSON.encode!(%{log: %{logger: "a", message: "m", traceparent: trace}})
        assert {:ok, :info, "m", metadata} = Protocol.decode_log(frame)
        assert metadata[:traceparent] == expected
        assert Keyword.has_key?(metadata, :traceparent) == (expected != nil)
      end
    end

    test "gives errors for everything else" do
      for other <- ["[]", "{}", ~s({"log":1}), ~s({"log":{}}), ~s({"log":{"message":1}})],
          do: assert({:error, {:not_a_log, _}} = Protocol.decode_log(other))
    end
  end

  describe "decode_chunk/1 and decode_tool_call/1" do
    test "return the contents of the frame, with any other keys" do
      chunk = %{"field" => "answer", "chunk" => "ž 🐎", "of" => ["tomorrow"]}
      frame = JSON.encode!(%{id: 7, stream: chunk, more: 1})
      assert Protocol.decode_chunk(frame) == {:ok, 7, chunk}
      call = %{call_id: "c", name: "t", args: %{a: %{b: [nil]}}, more: 1}
      frame = JSON.encode!(%{id: 7, tool_call: call, more: 1})
      assert Protocol.decode_tool_call(frame) == {:ok, "c", "t", %{"a" => %{"b" => [nil]}}}
    end

    test "give errors for everything else" do
      for decode <- [&Protocol.decode_chunk/1, &Protocol.decode_tool_call/1],
          rest <- ["", ~s(,"stream":[]), ~s(,"tool_call":[]), ~s(,"tool_call":{"call_id":1.5})],
          other <- ["[]", "1", "{}", ~s({"id":null,"stream":{}}), ~s({"id":7#{rest}})] do
        assert {:error, {reason, text}} = decode.(other)
        assert reason in [:not_a_chunk, :not_a_tool_call, :invalid_json] and is_binary(text)
      end
    end
  end

  describe "encode_tool_result/2" do
    test "names what has no JSON form, in results and in error messages" do
      for {result, text} <- [
            {{:ok, self()}, "result: it has no JSON form"},
            {{:ok, <<255>>}, "result: a string that is not valid UTF-8"},
            {{:error, <<255>>}, "error: a string that is not valid UTF-8"}
          ] do
        assert {:error, %Error{message: message}} = Protocol.encode_tool_result(7, result)
        assert message =~ text
      end
    end
  end

  defp mutate(bytes) do
    at = :rand.uniform(byte_size(bytes)) - 1
    <<before::binary-size(^at), _byte, rest::binary>> = bytes

    case :rand.uniform(3) do
      1 -> before <> rest
      2 -> before <> :rand.bytes(1) <> rest
      3 -> before <> :rand.bytes(3) <> binary_part(bytes, at, byte_size(bytes) - at)
    end
  end
end
