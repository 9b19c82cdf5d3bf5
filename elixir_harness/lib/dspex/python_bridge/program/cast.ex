defmodule DSPex.PythonBridge.Program.Cast do
  @moduledoc false
  # Decoded JSON to the terms of a type: structs, atoms of enums, dates. Total, and linear in the size of the value. The
  # peer has validated an answer; one that does not fit is of another definition of the program, or of a stub.

  alias DSPex.PythonBridge.Program.{EctoSchema, Field}

  # By the type, or by its constructor.
  @expected %{
    string: "a string",
    uuid: "a string",
    integer: "a whole number",
    float: "a number",
    boolean: "true or false",
    map: "a map",
    object: "a map",
    list: "a list",
    date: "a date in ISO 8601",
    time: "a time of day in ISO 8601",
    datetime: "a date and time in ISO 8601",
    naive_datetime: "a date and time in ISO 8601"
  }
  # Values of an enum that an error repeats.
  @most_shown 10

  @doc """
  The term of a value, or what was expected where.

      iex> alias DSPex.PythonBridge.Program.{Cast, Types}
      iex> type = Types.type(%{size: {:enum, [:s, :m]}, due: {:optional, :date}}, "", [])
      iex> Cast.cast(%{"size" => "m", "due" => "2026-03-01"}, type, "order")
      {:ok, %{size: :m, due: ~D[2026-03-01]}}
      iex> Cast.cast(%{"size" => "XL"}, type, "order")
      {:error, ~s(order.size: expected "s" or "m")}
  """
  @spec cast(term(), Field.type(), String.t()) :: {:ok, term()} | {:error, String.t()}
  def cast(value, type, name) do
    {:ok, value(type, value, [])}
  catch
    {__MODULE__, path, expected} -> {:error, "#{where(name, path)}: #{expected}"}
  end

  # The path is reversed: a step costs the same at any depth, and is written only in an error.
  defp where(name, path) do
    steps =
      for step <- Enum.reverse(path) do
        cond do
          is_integer(step) -> "[#{step}]"
          String.valid?(step) and step =~ ~r/\A\w{1,60}\z/u -> ".#{step}"
          true -> "[#{inspect(step, printable_limit: 60)}]"
        end
      end

    String.trim_leading("#{name}#{steps}", ".")
  end

  defp misfit(path, expected), do: throw({__MODULE__, path, expected})

  defp value(type, text, _path) when type in [:string, :uuid] and is_binary(text), do: text
  defp value(:integer, number, _path) when is_integer(number), do: number
  defp value(:float, number, _path) when is_float(number), do: number
  defp value(:float, number, path) when is_integer(number), do: float(number, path)
  defp value(:boolean, value, _path) when is_boolean(value), do: value
  defp value(:map, map, _path) when is_map(map) and not is_struct(map), do: map
  defp value(:any, value, _path), do: value
  defp value({:media, _kind}, value, _path), do: value
  defp value({:optional, _type}, nil, _path), do: nil
  defp value({:optional, type}, value, path), do: value(type, value, path)
  defp value({:list, type}, items, path) when is_list(items), do: items(items, type, path, 0)

  defp value({:map, type}, map, path) when is_map(map) and not is_struct(map),
    do: Map.new(map, fn {key, value} -> {key, value(type, value, [key | path])} end)

  # Keys of a map are the same or not: 1.0 is not 1.
  defp value({:enum, values, terms, _dumps}, value, path) do
    with :error <- Map.fetch(terms, value) do
      {shown, more} = Enum.split(values, @most_shown)
      more = if more != [], do: " or another of #{length(values)}"
      misfit(path, "expected #{Enum.map_join(shown, " or ", &inspect/1)}#{more}")
    else
      {:ok, term} -> term
    end
  end

  defp value({:time, kind}, text, path) do
    with true <- is_binary(text), {:ok, time} <- time(kind, text) do
      time
    else
      _misfit -> misfit(path, "expected #{@expected[kind]}")
    end
  end

  defp value({:loaded, type, loader}, value, path) do
    case EctoSchema.load(loader, value(type, value, path)) do
      {:ok, value} -> value
      :error -> misfit(path, "expected another value: its type cannot load this one")
    end
  end

  defp value({:object, module, fields}, map, path) when is_map(map) and not is_struct(map) do
    values = for field <- fields, pair = pair(map, field, module, path), into: %{}, do: pair

    # As struct/2, without its checks: the fields were compared with the struct's when the type was read.
    if module, do: Map.merge(module.__struct__(), values), else: values
  end

  defp value(type, _other, path) do
    kind = if is_tuple(type), do: elem(type, 0), else: type
    misfit(path, "expected #{@expected[kind]}")
  end

  defp pair(map, %Field{key: key, name: name, type: type, required?: required?}, module, path) do
    case map do
      %{^name => nil} when elem(type, 0) == :optional -> {key, nil}
      %{^name => value} when value != nil or required? -> {key, value(type, value, [name | path])}
      _absent when required? -> misfit([name | path], "missing")
      # A struct keeps its default.
      _absent -> if module == nil, do: {key, nil}
    end
  end

  defp items([item | rest], type, path, index),
    do: [value(type, item, [index | path]) | items(rest, type, path, index + 1)]

  defp items([], _type, _path, _index), do: []
  # A stub may answer with one.
  defp items(_improper, _type, path, _index), do: misfit(path, "expected a list")

  defp float(number, path) do
    number * 1.0
  rescue
    ArithmeticError -> misfit(path, "expected a number that a float can hold")
  end

  defp time(:date, text), do: Date.from_iso8601(text)
  defp time(:naive_datetime, text), do: NaiveDateTime.from_iso8601(text)

  defp time(:time, text),
    do: text |> String.replace(~r/([Zz]|[+-]\d\d:\d\d)\z/, "") |> Time.from_iso8601()

  defp time(:datetime, text) do
    case DateTime.from_iso8601(text) do
      {:ok, time, _offset} -> {:ok, time}
      {:error, :missing_offset} -> time(:datetime, text <> "Z")
      {:error, reason} -> {:error, reason}
    end
  end
end
