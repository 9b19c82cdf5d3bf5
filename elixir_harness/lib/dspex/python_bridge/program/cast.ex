defmodule DSPex.PythonBridge.Program.Cast do
  @moduledoc false
  # Decoded JSON to the terms of a type: structs, atoms of enums, dates. Total, and linear in the size of the value. The
  # peer has validated an answer; one that does not fit is of another definition of the program, or of a stub.

  alias DSPex.PythonBridge.Program.{EctoSchema, Field}

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
      for step <- Enum.reverse(path), into: "" do
        cond do
          is_integer(step) -> "[#{step}]"
          word?(step) -> ".#{step}"
          true -> "[#{inspect(step, printable_limit: 60)}]"
        end
      end

    String.trim_leading(name <> steps, ".")
  end

  defp word?(step), do: is_binary(step) and String.valid?(step) and step =~ ~r/\A\w{1,60}\z/u

  defp misfit(path, expected), do: throw({__MODULE__, path, expected})

  defp value(:string, text, _path) when is_binary(text), do: text
  defp value(:string, _other, path), do: misfit(path, "expected a string")
  defp value(:uuid, text, path), do: value(:string, text, path)
  defp value(:integer, number, _path) when is_integer(number), do: number
  defp value(:integer, _other, path), do: misfit(path, "expected a whole number")
  defp value(:float, number, _path) when is_float(number), do: number
  defp value(:float, number, path) when is_integer(number), do: float(number, path)
  defp value(:float, _other, path), do: misfit(path, "expected a number")
  defp value(:boolean, value, _path) when is_boolean(value), do: value
  defp value(:boolean, _other, path), do: misfit(path, "expected true or false")
  defp value(:map, map, _path) when is_map(map) and not is_struct(map), do: map
  defp value(:map, _other, path), do: misfit(path, "expected a map")
  defp value(:any, value, _path), do: value
  defp value({:media, _kind}, value, _path), do: value
  defp value({:optional, _type}, nil, _path), do: nil
  defp value({:optional, type}, value, path), do: value(type, value, path)
  defp value({:list, type}, items, path) when is_list(items), do: items(items, type, path, 0)
  defp value({:list, _type}, _other, path), do: misfit(path, "expected a list")

  defp value({:map, type}, map, path) when is_map(map) and not is_struct(map),
    do: Map.new(map, fn {key, value} -> {key, value(type, value, [key | path])} end)

  defp value({:map, _type}, _other, path), do: misfit(path, "expected a map")

  # Keys of a map are the same or not: 1.0 is not 1.
  defp value({:enum, values, terms, _dumps}, value, path) do
    case terms do
      %{^value => term} ->
        term

      _none ->
        shown = values |> Enum.take(@most_shown) |> Enum.map_join(" or ", &inspect/1)
        more = if length(values) > @most_shown, do: " or another of #{length(values)}", else: ""
        misfit(path, "expected #{shown}#{more}")
    end
  end

  defp value({:time, kind}, text, path) when is_binary(text) do
    case time(kind, text) do
      {:ok, time} -> time
      {:error, _reason} -> misfit(path, expected(kind))
    end
  end

  defp value({:time, kind}, _other, path), do: misfit(path, expected(kind))

  defp value({:loaded, type, loader}, value, path) do
    case EctoSchema.load(loader, value(type, value, path)) do
      {:ok, value} -> value
      :error -> misfit(path, "expected another value: its type cannot load this one")
    end
  end

  defp value({:object, module, fields}, map, path) when is_map(map) and not is_struct(map) do
    values =
      for %Field{name: name} = field <- fields, reduce: [] do
        values ->
          case map do
            %{^name => nil} when not field.required? -> null(field, module, values)
            %{^name => value} -> [{field.key, value(field.type, value, [name | path])} | values]
            _none when not field.required? -> absent(field, module, values)
            _none -> misfit([name | path], "missing")
          end
      end

    # As struct/2, without its checks: the fields were compared with the struct's when the type was read.
    if module, do: Map.merge(module.__struct__(), Map.new(values)), else: Map.new(values)
  end

  defp value({:object, _module, _fields}, _other, path), do: misfit(path, "expected a map")

  defp null(%Field{key: key, type: {:optional, _type}}, _module, values),
    do: [{key, nil} | values]

  defp null(field, module, values), do: absent(field, module, values)

  # A struct keeps its default.
  defp absent(field, nil, values), do: [{field.key, nil} | values]
  defp absent(_field, _module, values), do: values

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
  defp time(:time, text), do: text |> without_offset() |> Time.from_iso8601()
  defp time(:naive_datetime, text), do: NaiveDateTime.from_iso8601(text)

  defp time(:datetime, text) do
    case DateTime.from_iso8601(text) do
      {:ok, time, _offset} ->
        {:ok, time}

      {:error, :missing_offset} ->
        with {:ok, time} <- NaiveDateTime.from_iso8601(text),
             do: DateTime.from_naive(time, "Etc/UTC")

      {:error, reason} ->
        {:error, reason}
    end
  end

  defp without_offset(text), do: String.replace(text, ~r/([Zz]|[+-]\d\d:\d\d)\z/, "")

  defp expected(:date), do: "expected a date in ISO 8601"
  defp expected(:time), do: "expected a time of day in ISO 8601"
  defp expected(_datetime), do: "expected a date and time in ISO 8601"
end
