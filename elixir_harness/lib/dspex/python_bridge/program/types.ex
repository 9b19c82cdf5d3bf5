defmodule DSPex.PythonBridge.Program.Types do
  @moduledoc false
  # Reads types and fields that are written as Elixir terms. `DSPex.PythonBridge.Program` documents them.

  import DSPex.PythonBridge.Program.Refusal

  alias DSPex.PythonBridge.Program.{EctoSchema, Field}

  @plain [:string, :integer, :float, :boolean, :map, :any, :uuid]
  @media [:image, :audio, :file, :history]
  @times [:date, :time, :datetime, :naive_datetime]
  @known @plain ++ @media ++ @times
  @constructors [:list, :map, :optional, :enum]
  # What the types are called elsewhere, where the names are not alike.
  @meant %{
    text: ":string",
    atom: "{:enum, [:a, :b]}",
    enum: "{:enum, [\"a\", \"b\"]}",
    number: ":float",
    object: ":map",
    list: "{:list, type}",
    optional: "{:optional, type}"
  }

  @doc "Reads the fields of one side of a signature, a keyword list. Refuses what is wrong, by name."
  @spec fields(term(), String.t(), [module()]) :: [Field.t()]
  def fields(fields, where, inside \\ []) do
    if not Keyword.keyword?(fields),
      do:
        refuse(where, "expected a keyword list such as [question: :string], got #{shown(fields)}")

    case fields |> Keyword.keys() |> then(&(&1 -- Enum.uniq(&1))) do
      [] -> Enum.map(fields, fn {key, given} -> field(key, given, "#{where}.#{key}", inside) end)
      [twice | _] -> refuse("#{where}.#{twice}", "there twice; expected distinct names")
    end
  end

  @doc "Reads one field: a type, `{type, description}` or `{type, options}`."
  @spec field(atom(), term(), String.t(), [module()]) :: Field.t()
  def field(key, given, where, inside) do
    {type, opts} = parts(given)
    type = type(type, where, inside)
    for {key, value} <- opts, do: option(key, value, limited(type), where)

    if opts[:min] && opts[:max] && opts[:min] > opts[:max],
      do: refuse(where, "min: expected at most max, #{opts[:max]}, got #{opts[:min]}")

    required? = not match?({:optional, _}, type)
    {description, limits} = Keyword.pop(opts, :description)

    %Field{
      key: key,
      name: Atom.to_string(key),
      type: type,
      required?: required?,
      description: description,
      limits: limits
    }
  end

  defp parts({type, description}) when is_binary(description),
    do: {type, description: description}

  defp parts({type, [_ | _] = opts} = given) do
    if Keyword.keyword?(opts) and (type == :map or type not in @constructors),
      do: {type, opts},
      else: {given, []}
  end

  defp parts(type), do: {type, []}

  defp limited({:optional, type}), do: limited(type)
  defp limited(type) when type in [:integer, :float], do: :number
  defp limited(:string), do: :length
  defp limited({:list, _type}), do: :length
  defp limited(_type), do: nil

  defp option(:description, text, _limited, _where) when is_binary(text), do: :ok

  defp option(:description, _other, _limited, where),
    do: refuse(where, "description: expected a string")

  defp option(key, value, :number, _where) when key in [:min, :max] and is_number(value), do: :ok

  defp option(key, value, :length, _where)
       when key in [:min, :max] and is_integer(value) and value >= 0,
       do: :ok

  defp option(key, _value, nil, where) when key in [:min, :max],
    do: refuse(where, "#{key}: only for numbers, strings and lists")

  defp option(key, value, _limited, where) when key in [:min, :max],
    do: refuse(where, "#{key}: expected a number, of a length 0 or more, got #{shown(value)}")

  defp option(key, _value, _limited, where) do
    meant = meant(key, [:description, :min, :max])
    refuse(where, "unknown option #{inspect(key)} of a field#{meant}")
  end

  @doc "Reads a type. `inside`: the struct modules that contain it."
  @spec type(term(), String.t(), [module()]) :: Field.type()
  def type(type, _where, _inside) when type in @plain, do: type
  def type(type, _where, _inside) when type in @media, do: {:media, type}
  def type(type, _where, _inside) when type in @times, do: {:time, type}
  def type({:list, type}, where, inside), do: {:list, type(type, where, inside)}
  def type({:map, type}, where, inside), do: {:map, type(type, where, inside)}

  def type({:optional, type}, where, inside) do
    with type when not (is_tuple(type) and elem(type, 0) == :optional) <-
           type(type, where, inside),
         do: {:optional, type}
  end

  def type({:enum, values}, where, _inside), do: enum(values, where)
  # These two are only in what EctoSchema returns.
  def type({:enum_of, pairs}, _where, _inside) do
    dumps = for {json, key} <- pairs, json != Atom.to_string(key), into: %{}, do: {key, json}
    {:enum, Enum.map(pairs, &elem(&1, 0)), Map.new(pairs), dumps}
  end

  def type({:loaded, type, loader}, where, inside),
    do: {:loaded, type(type, where, inside), loader}

  def type(%{} = map, where, inside) when not is_struct(map) do
    if map == %{} or not Enum.all?(map, fn {key, _type} -> is_atom(key) and key != nil end),
      do: refuse(where, "expected a map of names, which are atoms, to types; got #{shown(map)}")

    {:object, nil, map |> Enum.sort() |> fields(where, inside)}
  end

  def type(module, where, inside) when is_atom(module) do
    case Atom.to_string(module) do
      "Elixir." <> _name -> struct_type(module, where, inside)
      _no_module -> unknown(module, where)
    end
  end

  def type(type, where, _inside), do: unknown(type, where)

  @spec unknown(term(), String.t()) :: no_return()
  defp unknown(type, where) do
    meant =
      case @meant do
        %{^type => meant} -> ", did you mean #{meant}?"
        _other when is_atom(type) -> meant(type, @known)
        _other -> ""
      end

    expected = "expected one such as :string, {:list, :integer} or {:enum, [\"a\", \"b\"]}"

    refuse(
      where,
      "unknown type #{shown(type)}#{if meant == "", do: "; #{expected}", else: meant}"
    )
  end

  defp enum(values, where) do
    list? = is_list(values) and not List.improper?(values)
    kinds = if list?, do: Enum.uniq(Enum.map(values, &kind/1)), else: [nil]

    cond do
      kinds == [] -> refuse(where, "an enum without values")
      nil in kinds -> refuse(where, "an enum takes a list of strings, atoms or whole numbers")
      tl(kinds) != [] -> refuse(where, "an enum of values of several kinds; expected one kind")
      true -> :ok
    end

    case values -- Enum.uniq(values) do
      [] -> {:enum, Enum.map(values, &json/1), Map.new(values, &{json(&1), &1}), %{}}
      [twice | _] -> refuse(where, "#{inspect(twice)} is in the enum twice")
    end
  end

  defp kind(value) when is_binary(value), do: if(String.valid?(value), do: :string)
  defp kind(value) when is_integer(value), do: :integer
  defp kind(value) when is_atom(value) and value not in [nil, true, false], do: :atom
  defp kind(_other), do: nil

  defp json(value) when is_atom(value), do: Atom.to_string(value)
  defp json(value), do: value

  ## Structs

  defp struct_type(module, where, inside) do
    if module in inside,
      do: refuse(where, "#{inspect(module)} contains itself, which a type here cannot")

    case Code.ensure_compiled(module) do
      {:module, _module} ->
        :ok

      {:error, :unavailable} ->
        refuse(where, "#{inspect(module)} cannot be compiled first: it needs this module")

      {:error, _reason} ->
        refuse(where, "there is no module #{inspect(module)}")
    end

    asked(module, where, inside)
  end

  defp asked(module, where, inside) do
    cond do
      function_exported?(module, :__dspex__, 1) ->
        {:object, module, declared(module, where, [module | inside])}

      EctoSchema.kind(module) == :embedded ->
        {:object, module, of_schema(module, where, [module | inside])}

      EctoSchema.kind(module) == :with_table ->
        refuse(where, "#{inspect(module)} is a schema with a table; expected an embedded schema")

      true ->
        text =
          "#{inspect(module)} is not a type: it exports no __dspex__/1, and is not an Ecto schema"

        refuse(where, text)
    end
  rescue
    error -> refuse(where, "asked for its fields, #{inspect(module)} #{raised(error)}")
  end

  defp raised(error), do: "raised #{inspect(error.__struct__)}: #{Exception.message(error)}"

  defp declared(module, where, inside) do
    where = "#{where}: #{inspect(module)}"
    struct = default_struct(module, where)
    fields = module |> ask_fields(where) |> fields(where, inside)

    for field <- fields, not is_map_key(struct, field.key) do
      refuse("#{where}.#{field.key}", "its struct has no such field")
    end

    fields
  end

  defp ask_fields(module, where) do
    module.__dspex__(:fields)
  rescue
    error -> refuse(where, "__dspex__(:fields) raised #{Exception.message(error)}")
  end

  # In Ecto a field without a value is nil, whatever its type. What has a default may be left out.
  defp of_schema(module, where, inside) do
    struct = default_struct(module, where)

    for {key, read} <- EctoSchema.fields(module) do
      here = "#{where}: #{inspect(module)}.#{key}"

      case read do
        {:ok, type} -> %{field(key, type, here, inside) | required?: Map.get(struct, key) == nil}
        {:error, text} -> refuse(here, text)
      end
    end
  end

  defp default_struct(module, where) do
    if function_exported?(module, :__struct__, 0),
      do: module.__struct__(),
      else: refuse(where, "#{inspect(module)} is not a struct")
  end

  @doc "Whether a struct module says its fields, by itself or as an embedded schema."
  @spec declared?(module()) :: boolean()
  def declared?(module) do
    Code.ensure_loaded?(module) and
      (function_exported?(module, :__dspex__, 1) or EctoSchema.kind(module) == :embedded)
  end
end
