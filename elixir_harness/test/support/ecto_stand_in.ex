defmodule DSPex.Test.EctoStandIn do
  @moduledoc """
  What Ecto's `embedded_schema` makes of its fields, as far as reflection shows it. This project does not depend on Ecto.
  """

  @doc """
  `use DSPex.Test.EctoStandIn, fields: [name: type], defaults: [name: value], primary_key: [:id], source: nil`.
  """
  defmacro __using__(opts) do
    quote bind_quoted: [opts: opts] do
      fields = opts[:fields]
      primary_key = Keyword.get(opts, :primary_key, [:id])
      fields = Enum.map(primary_key, &{&1, :binary_id}) ++ fields

      defstruct Keyword.merge(
                  Enum.map(fields, fn {name, _type} -> {name, nil} end),
                  opts[:defaults] || []
                )

      def __schema__(:source), do: unquote(opts[:source])
      def __schema__(:primary_key), do: unquote(primary_key)
      def __schema__(:fields), do: unquote(Keyword.keys(fields))

      for {name, type} <- fields do
        def __schema__(:type, unquote(name)), do: unquote(Macro.escape(type))
      end
    end
  end

  @doc "The type of an embed, as Ecto 3.12 has it."
  @spec embed(:one | :many, module()) :: tuple()
  def embed(cardinality, module),
    do: {:parameterized, {Ecto.Embedded, %{cardinality: cardinality, related: module}}}

  @doc "The type of an `Ecto.Enum`."
  @spec enum(keyword(), :self | :dump) :: tuple()
  def enum(mappings, embed_as \\ :self),
    do: {:parameterized, {Ecto.Enum, %{mappings: mappings, embed_as: embed_as, type: :string}}}
end
