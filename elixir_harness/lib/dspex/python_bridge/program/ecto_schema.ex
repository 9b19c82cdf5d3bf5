defmodule DSPex.PythonBridge.Program.EctoSchema do
  @moduledoc false
  # Embedded schemas of Ecto as types, read through Ecto's reflection: `__schema__/1`, `__schema__/2`, and `type`, `cast`,
  # `load`, `dump` and `embed_as` of custom types. Ecto itself is not called: it may be absent.
  #
  # A value is that of `Ecto.embedded_dump(struct, :json)` without the primary key.

  # Ecto depends on it.
  @compile {:no_warn_undefined, Decimal}

  @plain [:string, :integer, :float, :boolean, :map, :any]
  # Ecto's type to the type on the wire, and the loader of its values.
  @others %{
    id: {:integer, nil},
    binary_id: {:uuid, nil},
    uuid: {:uuid, nil},
    decimal: {:float, :decimal},
    date: {:date, nil},
    time: {:time, {:precision, 0}},
    time_usec: {:time, {:precision, 6}},
    naive_datetime: {:naive_datetime, {:precision, 0}},
    naive_datetime_usec: {:naive_datetime, {:precision, 6}},
    utc_datetime: {:datetime, {:precision, 0}},
    utc_datetime_usec: {:datetime, {:precision, 6}}
  }

  @typedoc "A type term of `DSPex.PythonBridge.Program.Types`, or one of these, which only this module makes."
  @type term_of_type :: term() | {:loaded, term(), loader()} | {:enum_of, [{term(), atom()}]}
  @type loader :: :decimal | {:precision, 0 | 6} | {:custom, module(), :cast | :load}

  @doc "Whether a module, which is loaded, is an embedded schema of Ecto."
  @spec embedded?(module()) :: boolean()
  def embedded?(module),
    do: function_exported?(module, :__schema__, 2) and module.__schema__(:source) == nil

  @doc "The type terms of the fields without the primary key; an error for a type that has no form on the wire."
  @spec fields(module()) :: [{atom(), {:ok, term_of_type()} | {:error, String.t()}}]
  def fields(module) do
    keys = module.__schema__(:fields) -- module.__schema__(:primary_key)
    for key <- keys, do: {key, type(module.__schema__(:type, key))}
  end

  defp type(type) when type in @plain, do: {:ok, type}

  defp type(type) when is_map_key(@others, type) do
    case Map.fetch!(@others, type) do
      {wire, nil} -> {:ok, wire}
      {wire, loader} -> {:ok, {:loaded, wire, loader}}
    end
  end

  defp type({:array, type}), do: with({:ok, of} <- type(type), do: {:ok, {:list, of}})
  defp type({:map, type}), do: with({:ok, of} <- type(type), do: {:ok, {:map, of}})
  defp type({:parameterized, {module, params}}), do: parameterized(module, params)
  # Before Ecto 3.12.
  defp type({:parameterized, module, params}), do: parameterized(module, params)
  defp type(type) when is_atom(type), do: custom(type)
  defp type(type), do: no_form(type)

  defp parameterized(Ecto.Enum, %{mappings: mappings} = params) do
    dumped? = Map.get(params, :embed_as, :self) == :dump

    {:ok,
     {:enum_of,
      for({key, value} <- mappings, do: {if(dumped?, do: value, else: Atom.to_string(key)), key})}}
  end

  defp parameterized(Ecto.Embedded, %{cardinality: :one, related: module}), do: {:ok, module}

  defp parameterized(Ecto.Embedded, %{cardinality: :many, related: module}),
    do: {:ok, {:list, module}}

  defp parameterized(module, _params), do: no_form(module)

  defp custom(module) do
    with true <- Code.ensure_loaded?(module) and function_exported?(module, :type, 0),
         base when base != module <- module.type(),
         {:ok, wire} <- type(base) do
      wire = with {:loaded, wire, _loader} <- wire, do: wire
      {:ok, {:loaded, wire, {:custom, module, if(self?(module), do: :cast, else: :load)}}}
    else
      _none -> no_form(module)
    end
  end

  defp self?(module),
    do: not function_exported?(module, :embed_as, 1) or module.embed_as(:json) == :self

  defp no_form(type), do: {:error, "no JSON form for Ecto's type #{inspect(type, limit: 5)}"}

  @doc "What a loader makes of a value that has the type on the wire. Total, whatever the functions of a custom type do."
  @spec load(loader(), term()) :: {:ok, term()} | :error
  def load(:decimal, value) do
    {:ok, Decimal.from_float(value)}
  catch
    _kind, _reason -> :error
  end

  def load({:precision, digits}, %{microsecond: {microseconds, _digits}} = value) do
    kept = if digits == 0, do: {0, 0}, else: {microseconds, digits}
    {:ok, %{value | microsecond: kept}}
  end

  def load({:custom, module, function}, value) do
    with {:ok, _value} = loaded <- apply(module, function, [plain(value)]),
         do: loaded,
         else: (_other -> :error)
  catch
    _kind, _reason -> :error
  end

  # As JSON has it.
  defp plain(%module{} = value) when module in [Date, Time, DateTime, NaiveDateTime],
    do: module.to_iso8601(value)

  defp plain(value), do: value

  @doc "The reverse of `load/2`, up to a value with a JSON form; a value that is not of the type is returned."
  @spec dump(loader(), term()) :: term()
  def dump({:custom, module, :load}, value) when value != nil do
    case module.dump(value) do
      {:ok, dumped} -> dumped
      _other -> value
    end
  catch
    _kind, _reason -> value
  end

  def dump(:decimal, %{__struct__: Decimal} = value), do: Decimal.to_string(value)
  def dump(_loader, value), do: value
end
