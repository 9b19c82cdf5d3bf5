defmodule DSPex.PythonBridge.Program.Wire do
  @moduledoc false
  # A type that was read, as the peer takes it: its name, or a JSON Schema. docs/protocol.md has both.

  import DSPex.PythonBridge.Program.Refusal

  alias DSPex.PythonBridge.Program.Field

  @named [:string, :integer, :float, :boolean, :map, :any]
  @formats %{date: "date", time: "time", datetime: "date-time", naive_datetime: "date-time"}

  @limits %{
    {"string", :min} => :minLength,
    {"string", :max} => :maxLength,
    {"array", :min} => :minItems,
    {"array", :max} => :maxItems,
    {"number", :min} => :minimum,
    {"number", :max} => :maximum
  }

  @typedoc "What is not declared is refused in an input, and left out of an output, which an LM writes."
  @type side :: :inputs | :outputs

  @doc "A field of a signature, or an argument of a tool. Refuses media inside of objects."
  @spec field(Field.t(), side(), String.t()) :: map()
  def field(%Field{} = field, side, where) do
    Map.merge(%{name: field.name, type: type(field, side, where)}, described(field))
  end

  defp type(%Field{type: type, limits: []}, _side, _where) when type in @named,
    do: Atom.to_string(type)

  defp type(%Field{type: type} = field, side, where),
    do: media(type) || limited(schema(type, {side, where}), field.limits)

  # Its Python name. A JSON Schema cannot have media.
  defp media({:media, {:code, language}}), do: "code[#{inspect(language)}]"
  defp media({:media, kind}), do: Atom.to_string(kind)
  defp media({:list, type}), do: with(of when of != nil <- media(type), do: "list[#{of}]")
  defp media({:map, type}), do: with(of when of != nil <- media(type), do: "dict[str, #{of}]")
  defp media({:optional, type}), do: with(of when of != nil <- media(type), do: "Optional[#{of}]")
  defp media(_type), do: nil

  defp schema(:string, _at), do: %{type: "string"}
  defp schema(:uuid, _at), do: %{type: "string", format: "uuid"}
  defp schema(:integer, _at), do: %{type: "integer"}
  defp schema(:float, _at), do: %{type: "number"}
  defp schema(:boolean, _at), do: %{type: "boolean"}
  defp schema(:map, _at), do: %{type: "object"}
  defp schema(:any, _at), do: %{}

  defp schema({:time, kind}, _at),
    do: %{type: "string", format: Map.fetch!(@formats, kind)}

  defp schema({:enum, values, _terms, _dumps}, _at), do: %{enum: values}
  defp schema({:list, type}, at), do: %{type: "array", items: schema(type, at)}

  defp schema({:map, type}, at),
    do: %{type: "object", additionalProperties: schema(type, at)}

  defp schema({:optional, type}, at) do
    case schema(type, at) do
      any when any == %{} -> any
      schema -> %{anyOf: [schema, %{type: "null"}]}
    end
  end

  defp schema({:loaded, type, _loader}, at), do: schema(type, at)

  defp schema({:object, module, fields}, {side, _where} = at) do
    title = if module, do: %{title: module |> Module.split() |> List.last()}, else: %{}
    closed = if side == :inputs, do: %{additionalProperties: false}, else: %{}

    %{
      type: "object",
      properties: Map.new(fields, &{&1.key, property(&1, at)}),
      required: for(field <- fields, field.required?, do: field.name)
    }
    |> Map.merge(Map.merge(title, closed))
  end

  defp schema({:media, kind}, {_side, where}) do
    text =
      "#{inspect(kind)} is the type of a field, alone or in a list; it cannot be inside of a map or struct"

    refuse(where, text)
  end

  defp property(field, at),
    do: field.type |> schema(at) |> limited(field.limits) |> Map.merge(described(field))

  defp described(%Field{description: nil}), do: %{}
  defp described(%Field{description: text}), do: %{description: text}

  defp limited(schema, limits),
    do: Enum.reduce(limits, schema, fn {key, limit}, schema -> limit(schema, key, limit) end)

  defp limit(%{anyOf: [schema, null]}, key, limit),
    do: %{anyOf: [limit(schema, key, limit), null]}

  defp limit(%{type: type} = schema, key, limit),
    do: Map.put(schema, Map.get(@limits, {type, key}, @limits[{"number", key}]), limit)
end
