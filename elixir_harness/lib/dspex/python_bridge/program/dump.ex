defmodule DSPex.PythonBridge.Program.Dump do
  @moduledoc false
  # Inputs to values with a JSON form: structs to maps of their declared fields. What is not of its type is left as it
  # is, for the peer to refuse. Linear in the size of the value.

  alias DSPex.PythonBridge.Program.{EctoSchema, Field, Refusal, Types}

  @as_json [Date, Time, DateTime, NaiveDateTime]

  @doc "The value of a field with this type."
  @spec value(Field.type(), term()) :: term()
  def value({:optional, type}, value), do: value(type, value)

  def value({:list, type}, [_ | _] = items) do
    each(items, &value(type, &1))
  end

  def value({:map, type}, map) when is_map(map) and not is_struct(map) do
    Map.new(map, fn {key, item} -> {key, value(type, item)} end)
  end

  def value({:object, module, fields}, %module{} = struct) when module != nil do
    for field <- fields, into: %{} do
      {field.name, value(field.type, Map.get(struct, field.key))}
    end
  end

  def value({:object, _module, fields}, map) when is_map(map) and not is_struct(map) do
    types =
      for field <- fields, type <- [field.key, field.name], into: %{}, do: {type, field.type}

    Map.new(map, fn {key, item} -> {key, value(Map.get(types, key, :any), item)} end)
  end

  def value({:loaded, _type, loader}, value), do: EctoSchema.dump(loader, value)
  # An atom is its name in JSON, unless Ecto.Enum says otherwise.
  def value({:enum, _values, _terms, dumps}, value), do: Map.get(dumps, value, value)
  def value({:media, :history}, value), do: any(value)
  def value(type, value) when type in [:any, :map], do: any(value)
  def value({:object, _module, _fields}, value), do: any(value)
  def value(_type, value), do: value

  @doc "The same for a value of any type: structs that declare their fields become maps."
  @spec any(term()) :: term()
  def any(%{__struct__: Decimal} = decimal), do: EctoSchema.dump(:decimal, decimal)

  def any(%module{} = struct) when module not in @as_json do
    case declared(module) do
      {:ok, type} -> value(type, struct)
      _no_type -> struct
    end
  end

  def any(map) when is_map(map) and not is_struct(map),
    do: Map.new(map, fn {key, item} -> {key, any(item)} end)

  def any([_ | _] = items), do: each(items, &any/1)
  def any(value), do: value

  # It asks the module, which may raise.
  defp declared(module) do
    Types.declared?(module) and
      Refusal.catching(fn -> Types.type(module, inspect(module), []) end)
  catch
    _kind, _reason -> false
  end

  # An improper list has no JSON form, and is refused as it is.
  defp each([item | rest], fun), do: [fun.(item) | each(rest, fun)]
  defp each(rest, _fun), do: rest
end
