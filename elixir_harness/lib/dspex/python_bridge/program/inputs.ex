defmodule DSPex.PythonBridge.Program.Inputs do
  @moduledoc false
  # The inputs of a run as the peer takes them. Unknown and missing names are refused here, before anything is sent.

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Program.{Dump, Spec}
  alias DSPex.PythonBridge.Protocol.Payload

  @doc """
  One run's inputs: a map, a struct or a keyword list, also an empty one. A list of such is a batch, whose items the peer
  refuses one by one.
  """
  @spec read(Spec.t(), term()) :: {:ok, map() | [map()]} | {:error, Error.t()}
  def read(spec, [_ | _] = inputs) do
    cond do
      Keyword.keyword?(inputs) -> one(spec, inputs)
      List.improper?(inputs) -> refused("inputs: expected a proper list")
      true -> {:ok, Enum.map(inputs, &item(spec, &1))}
    end
  end

  def read(spec, []), do: one(spec, [])
  def read(spec, inputs) when is_map(inputs), do: one(spec, inputs)
  def read(_spec, _other), do: refused("inputs: expected a map or a keyword list")

  @doc """
  The inputs of an example for a program, or of a module without `use DSPex.PythonBridge.Program` (nil): as of an item of a
  batch.
  """
  @spec example(Spec.t() | nil, term()) :: term()
  def example(nil, inputs) when is_list(inputs), do: example(nil, Map.new(inputs))
  def example(nil, inputs), do: Dump.any(inputs)
  def example(spec, inputs), do: item(spec, inputs)

  # The peer says what is wrong with an item.
  defp item(spec, item) when is_map(item), do: named(spec, fields(item))

  defp item(spec, item) do
    if Keyword.keyword?(item), do: named(spec, item), else: item
  end

  defp one(spec, inputs) do
    inputs = named(spec, fields(inputs))
    unknown = Enum.sort(Map.keys(inputs) -- Enum.map(spec.inputs, & &1.name))

    missing =
      for %{required?: true, name: name} <- spec.inputs, not is_map_key(inputs, name), do: name

    case texts(unknown, "unknown field") ++ texts(missing, "missing") do
      [] -> {:ok, inputs}
      texts -> refused(Enum.join(texts, "; ") <> "; expected " <> expected(spec))
    end
  end

  # A struct has the fields that it declares, or else all.
  defp fields(%_module{} = struct) do
    case Dump.any(struct) do
      %_module{} -> struct |> Map.from_struct() |> Map.to_list()
      map -> Map.to_list(map)
    end
  end

  defp fields(inputs) when is_map(inputs), do: Map.to_list(inputs)
  defp fields(inputs), do: inputs

  # By their names in JSON.
  defp named(spec, pairs) do
    types = Map.new(spec.inputs, &{&1.name, &1.type})
    # DSPy logs a warning for each one that is absent.
    absent = for %{required?: false, name: name} <- spec.inputs, into: %{}, do: {name, nil}

    for {key, value} <- pairs, into: absent do
      name = Payload.string(key) || inspect(key, limit: 3, printable_limit: 60)
      {name, Dump.value(Map.get(types, name), value)}
    end
  end

  defp texts(names, text), do: Enum.map(names, &"inputs.#{shown(&1)}: #{text}")

  defp shown(name) do
    if String.valid?(name) and name =~ ~r/\A\w{1,60}\z/u,
      do: name,
      else: inspect(name, printable_limit: 60)
  end

  defp expected(%{inputs: []}), do: "no inputs"
  defp expected(%{inputs: inputs}), do: Enum.map_join(inputs, ", ", & &1.name)

  defp refused(text), do: {:error, Error.new(:invalid_args, text)}
end
