defmodule DSPex.PythonBridge.Program.Typespec do
  @moduledoc false
  # A type that was read, as the quoted type of Elixir that its values have.

  alias DSPex.PythonBridge.Program.{Field, Spec}

  # An enum of more values is a type without its values.
  @most 50

  @doc "The fields of the type of a program's struct: `%__MODULE__{…}`."
  @spec of(Spec.t()) :: keyword(Macro.t())
  def of(spec), do: spec |> Spec.fields() |> Enum.map(&{&1.key, field(&1)})

  defp field(%Field{name: name, type: {:optional, :any}})
       when name in ["reasoning", "rationale", "final_reasoning"],
       do: quote(do: String.t() | nil)

  defp field(%Field{name: "trajectory", type: {:optional, :any}}), do: quote(do: map() | nil)
  defp field(%Field{name: "tool_calls", type: {:optional, :any}}), do: quote(do: [map()] | nil)
  defp field(%Field{type: type}), do: type(type)

  defp type(type) when type in [:string, :uuid], do: quote(do: String.t())
  defp type(:integer), do: quote(do: integer())
  defp type(:float), do: quote(do: float())
  defp type(:boolean), do: quote(do: boolean())
  defp type(:map), do: quote(do: map())
  defp type(:any), do: quote(do: term())
  defp type({:media, _kind}), do: quote(do: term())
  defp type({:time, :date}), do: quote(do: Date.t())
  defp type({:time, :time}), do: quote(do: Time.t())
  defp type({:time, :datetime}), do: quote(do: DateTime.t())
  defp type({:time, :naive_datetime}), do: quote(do: NaiveDateTime.t())
  defp type({:list, type}), do: [type(type)]
  defp type({:map, type}), do: quote(do: %{optional(String.t()) => unquote(type(type))})
  defp type({:optional, type}), do: quote(do: unquote(type(type)) | nil)
  defp type({:loaded, _type, _loader}), do: quote(do: term())

  defp type({:object, nil, fields}), do: {:%{}, [], Enum.map(fields, &{&1.key, type(&1.type)})}

  defp type({:object, module, _fields}), do: {:%, [], [module, {:%{}, [], []}]}

  defp type({:enum, values, terms, _dumps}) do
    case Enum.map(values, &Map.fetch!(terms, &1)) do
      [text | _] when is_binary(text) -> quote(do: String.t())
      [number | _] = values when is_integer(number) -> union(values, quote(do: integer()))
      values -> union(values, quote(do: atom()))
    end
  end

  defp union(values, _many) when length(values) <= @most do
    values
    |> Enum.reverse()
    |> Enum.reduce(fn value, others -> quote(do: unquote(value) | unquote(others)) end)
  end

  defp union(_values, many), do: many
end
