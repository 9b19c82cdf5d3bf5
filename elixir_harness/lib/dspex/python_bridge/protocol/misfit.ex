defmodule DSPex.PythonBridge.Protocol.Misfit do
  @moduledoc false
  # Where a term has a value without a JSON form, in words that do not show it: it may be a key.

  alias DSPex.PythonBridge.Protocol.Payload

  @doc """
  The place of the innermost value without a JSON form, and what is wrong with it.

      iex> DSPex.PythonBridge.Protocol.Misfit.text(%{inputs: [%{q: "a"}, %{q: {:b, 1}}]})
      "inputs[1].q: a tuple has no JSON form; a keyword list has to be written as a map"
  """
  @spec text(term()) :: String.t()
  def text(term) do
    {path, kind} = misfit(term, [])
    place = path |> Enum.reverse() |> Enum.map_join(&part/1) |> String.trim_leading(".")
    "#{place}: #{kind}"
  end

  defp part(index) when is_integer(index), do: "[#{index}]"
  defp part(name), do: "." <> name

  defp misfit(value, path) do
    with {:error, _error} <- Payload.encode(value, "") do
      Enum.find_value(parts(value), {path, kind(value)}, fn {key, part} ->
        misfit(part, [key | path]) |> found()
      end)
    end
  end

  defp found({:ok, _json}), do: nil
  defp found(place), do: place

  defp parts(value) when is_struct(value), do: []
  defp parts(%{} = map), do: for({key, value} <- map, do: {Payload.string(key) || "?", value})

  defp parts(list) when is_list(list) do
    if List.improper?(list),
      do: [],
      else: Enum.map(Enum.with_index(list), fn {v, n} -> {n, v} end)
  end

  defp parts(_other), do: []

  defp kind(tuple) when is_tuple(tuple),
    do: "a tuple has no JSON form; a keyword list has to be written as a map"

  defp kind(%module{}), do: "a struct #{inspect(module)} has no JSON form"
  defp kind(%{}), do: "expected a map whose keys are strings"
  defp kind(text) when is_binary(text), do: "a string that is not valid UTF-8"
  defp kind(function) when is_function(function), do: "a function has no JSON form"
  defp kind(_other), do: "it has no JSON form"
end
