defmodule DSPex.PythonBridge.Protocol.PayloadTest do
  @moduledoc "What is decoded does not keep much more alive than itself: frames are large, answers may be small."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Protocol}
  alias DSPex.PythonBridge.Programs.Change
  alias DSPex.PythonBridge.Protocol.Payload

  # Bytes in which no text has a part.
  @space String.duplicate(" ", 1_000_000)

  # Every text in a term, keys included.
  defp strings(text) when is_binary(text), do: [text]
  defp strings(list) when is_list(list), do: Enum.flat_map(list, &strings/1)
  defp strings(%_{} = struct), do: struct |> Map.from_struct() |> strings()

  defp strings(%{} = map),
    do: Enum.flat_map(map, fn {key, value} -> strings(key) ++ strings(value) end)

  defp strings(tuple) when is_tuple(tuple), do: tuple |> Tuple.to_list() |> strings()
  defp strings(_other), do: []

  defp holds_little(term) do
    for text <- strings(term) do
      held = :binary.referenced_byte_size(text)
      # OTP 27 reports bits, not bytes, for those that are too small to be shared.
      assert held <= max(2 * byte_size(text), 512), "#{byte_size(text)} bytes hold #{held}"
    end

    term
  end

  # Longer than what the runtime may copy by itself.
  @text String.duplicate("lorem ipsum ", 17)

  test "a string of less than half of its frame is a copy, as a key, a value or in a list" do
    term = %{@text => [@text, %{"two" => @text <> "\n"}, ""], "n" => 1.5}
    assert {:ok, ^term} = decoded = Payload.decode(JSON.encode!(term) <> @space)
    holds_little(decoded)
  end

  test "a string that is most of its frame is not copied" do
    long = String.duplicate("x", 1_000_000)
    json = ~s({"long": "#{long}", "short": "y"})
    assert {:ok, %{"long" => ^long, "short" => "y"} = term} = Payload.decode(json)
    holds_little(term)
    assert :binary.referenced_byte_size(term["long"]) == byte_size(json)
  end

  test "this holds for all frames of a peer" do
    pad = fn json -> String.replace(json, "{", "{" <> @space, global: false) end
    reply = ~s({"id":"#{@text}","success":true,"result":{"a":"#{@text}"},"meta":{"m":"#{@text}"}})
    assert {:ok, @text, %{"a" => @text}, _meta} = holds_little(Protocol.decode_reply(pad.(reply)))
    error = ~s({"id":1,"success":false,"error":"#{@text}","error_type":"internal"})
    assert {:error, 1, %{message: @text}} = holds_little(Protocol.decode_reply(pad.(error)))
    chunk = ~s({"id":1,"stream":{"field":"answer","chunk":"#{@text}"}})
    assert {:ok, 1, %{"chunk" => @text}} = holds_little(Protocol.decode_chunk(pad.(chunk)))
    tool = ~s({"id":1,"tool_call":{"call_id":"c","name":"#{@text}","args":{"x":"#{@text}"}}})
    assert {:ok, "c", @text, _args} = holds_little(Protocol.decode_tool_call(pad.(tool)))

    log =
      ~s({"log":{"level":"info","logger":"#{@text}","message":"#{@text}","traceparent":"#{@text}"}})

    assert {:ok, :info, @text, _metadata} = holds_little(Protocol.decode_log(pad.(log)))
  end

  test "large payloads that are not JSON are errors with the place" do
    assert Payload.decode(~s({"a" 1}) <> @space) ==
             {:error, {:invalid_json, "not JSON: invalid byte at 5"}}

    assert Payload.decode("[1]" <> @space <> "x") ==
             {:error, {:invalid_json, "not JSON: invalid byte at 3"}}

    assert Payload.decode("[1" <> @space) == {:error, {:invalid_json, "JSON that ends too early"}}
  end

  test "a part of a large answer can be kept without the rest" do
    bridge = start_supervised!({Bridge, fake_opts("echo")})

    large = String.duplicate("x", 300_000)
    args = %{large: large, more: large <> "x", small: @text}

    assert {:ok, %{"args" => %{"small" => @text} = kept}} =
             Bridge.call(bridge, :echo, args, 20_000)

    holds_little(kept)
  end

  test "a program's id is kept without the binary that it is a part of" do
    id = binary_part(String.duplicate(@text, 5_000), 0, byte_size(@text))
    assert {:create, @text, nil} = holds_little(Change.new(:create_program, %{id: id}))
    args = %{program_ids: [id]}
    assert {:cleanup, [@text], nil} = holds_little(Change.new(:cleanup, args))
  end
end
