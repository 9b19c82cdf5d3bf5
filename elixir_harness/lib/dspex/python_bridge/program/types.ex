defmodule DSPex.PythonBridge.Program.Types do
  @moduledoc false
  # Reads types and fields that are written as Elixir terms. `DSPex.PythonBridge.Program` documents them.

  import DSPex.PythonBridge.Program.Refusal

  alias DSPex.PythonBridge.Program.{EctoSchema, Field}

  @plain [:string, :integer, :float, :boolean, :map, :any, :uuid]
  @media [:image, :audio, :file, :history, :reasoning, :code, :document, :citations]
  @times [:date, :time, :datetime, :naive_datetime]
  @known @plain ++ @media ++ @times
  @constructors [:list, :map, :optional, :enum, :code]

  @doc """
  Reads the fields of one side of a signature, a keyword list. Refuses what is wrong, by name. `inside`: the struct modules that
  contain them; `more`: options that these fields may have in addition to others.
  """
  @spec fields(term(), String.t(), [module()], [atom()]) :: [Field.t()]
  def fields(fields, where, inside \\ [], more \\ []) do
    keyword!(fields, where, :any, "a keyword list such as [question: :string]")
    for {key, given} <- fields, do: field(key, given, "#{where}.#{key}", inside, more)
  end

  @doc "Reads one field: a type, `{type, description}` or `{type, options}`."
  @spec field(atom(), term(), String.t(), [module()], [atom()]) :: Field.t()
  def field(key, given, where, inside, more \\ []) do
    {type, opts} = parts(given)
    type = type(type, where, inside)
    {more, opts} = Keyword.split(opts, more)
    for {key, value} <- opts, do: option(key, value, limited(type), where)

    {description, limits} = Keyword.pop(opts, :description)

    %Field{
      key: key,
      name: Atom.to_string(key),
      type: type,
      required?: not match?({:optional, _}, type),
      description: description,
      limits: limits,
      more: more
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

  defp option(:description, value, _limited, where),
    do: if(not is_binary(value), do: refuse(where, "description: expected a string"))

  defp option(key, value, limited, where) when key in [:min, :max] do
    case limited do
      nil ->
        refuse(where, "#{key}: only for numbers, strings and lists")

      :number when is_number(value) ->
        :ok

      :length when is_integer(value) and value >= 0 ->
        :ok

      _other ->
        refuse(where, "#{key}: expected a number, of a length 0 or more, got #{shown(value)}")
    end
  end

  defp option(key, _value, _limited, where) do
    expected = "expected :description, :min or :max"
    refuse(where, "unknown option #{inspect(key)} of a field; #{expected}")
  end

  @doc "Reads a type. `inside`: the struct modules that contain it."
  @spec type(term(), String.t(), [module()]) :: Field.type()
  def type(type, _where, _inside) when type in @plain, do: type
  def type(type, _where, _inside) when type in @media, do: {:media, type}
  def type(type, _where, _inside) when type in @times, do: {:time, type}

  def type({:code, language}, _where, _inside) when is_binary(language),
    do: {:media, {:code, language}}

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
    known = Enum.map_join(@known, ", ", &inspect/1)
    refuse(where, "unknown type #{shown(type)}; expected one of #{known}, or a list, map or enum")
  end

  defp enum(values, where) do
    case is_list(values) && Enum.uniq(Enum.map(values, &kind/1)) do
      [kind] when kind != nil -> :ok
      _other -> refuse(where, "expected an enum of strings, of atoms or of whole numbers")
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
      {:module, _module} -> {:object, module, asked(module, where, [module | inside])}
      {:error, :nofile} -> refuse(where, "there is no module #{inspect(module)}")
      {:error, why} -> refuse(where, "#{inspect(module)} cannot be compiled first: #{why}")
    end
  end

  defp asked(module, where, inside) do
    cond do
      function_exported?(module, :__dspex__, 1) ->
        declared(module, where, inside)

      EctoSchema.embedded?(module) ->
        of_schema(module, where, inside)

      true ->
        none = "it exports no __dspex__/1, and is no embedded schema of Ecto"
        refuse(where, "#{inspect(module)} is not a type: #{none}")
    end
  rescue
    error ->
      text = Exception.format_banner(:error, error)
      refuse(where, "asked for its fields, #{inspect(module)} raised #{text}")
  end

  defp declared(module, where, inside) do
    where = "#{where}: #{inspect(module)}"
    struct = module.__struct__()
    fields = fields(module.__dspex__(:fields), where, inside)

    for field <- fields,
        not is_map_key(struct, field.key),
        do: refuse("#{where}.#{field.key}", "its struct has no such field")

    fields
  end

  # In Ecto a field without a value is nil, whatever its type. What has a default may be left out.
  defp of_schema(module, where, inside) do
    struct = module.__struct__()
    where = "#{where}: #{inspect(module)}"

    for {key, type} <- EctoSchema.fields(module, where) do
      field = field(key, type, "#{where}.#{key}", inside)
      %{field | required?: Map.get(struct, key) == nil}
    end
  end

  @doc "Whether a struct module says its fields, by itself or as an embedded schema."
  @spec declared?(module()) :: boolean()
  def declared?(module) do
    Code.ensure_loaded?(module) and
      (function_exported?(module, :__dspex__, 1) or EctoSchema.embedded?(module))
  end
end
