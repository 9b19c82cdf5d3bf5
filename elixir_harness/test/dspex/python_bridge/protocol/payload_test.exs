defmodule DSPex.PythonBridge.Protocol.PayloadTest do
  @moduledoc "What is decoded does not keep much more alive than itself: frames are large, answers may be small."

  use ExUnit.Case, async: true

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
end
