defmodule DSPex.PythonBridge.Client.EventStream do
  @moduledoc false
  # The enumerable of `DSPex.PythonBridge.Bridge.stream/3`.

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Client.StreamReducer

  @doc "The enumerable: a function, so that inspection does not show the caller's contents."
  @spec new(StreamReducer.request()) :: Enumerable.t()
  def new(request), do: &reduce(request, &1, &2)

  defp reduce(request, acc, fun) do
    StreamReducer.reduce(request, acc, fn
      {:chunk, chunk}, acc ->
        case element(chunk) do
          nil -> {:cont, acc}
          element -> fun.(element, acc)
        end

      {:over, {:ok, _id, result, meta}}, acc ->
        fun.({:ok, result, meta}, acc)

      {:over, {:error, error}}, acc ->
        fun.({:error, error}, acc)
    end)
  end

  defp element(%{"field" => field, "chunk" => text}) when is_binary(field) and is_binary(text),
    do: {:chunk, field, text}

  defp element(%{"status" => text}) when is_binary(text), do: {:status, text}

  defp element(%{"index" => index, "success" => true, "result" => result})
       when is_integer(index) and index >= 0 and is_map(result),
       do: {:item, index, {:ok, result}}

  defp element(%{"index" => index, "success" => false, "error" => text} = item)
       when is_integer(index) and index >= 0 and is_binary(text) do
    {:item, index, {:error, Error.from_peer(item["error_type"], text, item["retryable"])}}
  end

  # From a later version of the peer.
  defp element(_unknown), do: nil
end
