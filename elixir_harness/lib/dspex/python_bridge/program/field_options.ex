defmodule DSPex.PythonBridge.Program.FieldOptions do
  @moduledoc false
  # The options of a field: `{type, description: "…", min: 1, max: 5}`.

  import DSPex.PythonBridge.Program.Refusal

  alias DSPex.PythonBridge.Program.Field

  @doc "Checks the options of a field with this type. Refuses what is wrong, by name."
  @spec check(keyword(), Field.type(), String.t()) :: :ok
  def check(opts, type, where) do
    for {key, value} <- opts, do: option(key, value, limited(type), where)

    if opts[:min] && opts[:max] && opts[:min] > opts[:max],
      do: refuse(where, "min: expected at most max, #{opts[:max]}, got #{opts[:min]}")

    :ok
  end

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
end
