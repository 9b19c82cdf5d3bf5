# Of the packages `ecto` and `decimal`, which this project does not depend on.
unless Code.ensure_loaded?(Decimal) do
  defmodule Decimal do
    @moduledoc false
    defstruct [:text]
    def from_float(float), do: %__MODULE__{text: Float.to_string(float)}
    def to_string(decimal), do: decimal.text
  end
end

defmodule DSPex.ProgramEctoSchemaTest do
  @moduledoc "Embedded schemas of Ecto as types, by its reflection alone."

  use ExUnit.Case, async: true

  import DSPex.Test.EctoStandIn, only: [embed: 2, enum: 1, enum: 2]

  alias DSPex.PythonBridge.Program.{Cast, Dump, Refusal, Types, Wire}
  alias DSPex.Test.EctoStandIn

  defmodule Money do
    @moduledoc "A custom type of Ecto: cents in Elixir, a map in JSON."
    defstruct [:cents]
    def type, do: :map
    def embed_as(:json), do: :dump
    def load(%{"cents" => cents}) when is_integer(cents), do: {:ok, %__MODULE__{cents: cents}}
    def load(_other), do: :error
    def dump(%__MODULE__{cents: cents}), do: {:ok, %{"cents" => cents}}
    def dump(_other), do: :error
  end

  defmodule Upcase do
    @moduledoc "A custom type of Ecto that casts, and raises for some values."
    def type, do: :string
    def embed_as(_format), do: :self
    def cast("boom"), do: raise("boom")
    def cast("no"), do: :error
    def cast(text), do: {:ok, String.upcase(text)}
  end

  defmodule Item do
    @moduledoc false
    use EctoStandIn,
      primary_key: [],
      fields: [sku: :string, size: {:parameterized, Ecto.Enum, %{mappings: [s: "s", m: "m"]}}]
  end

  defmodule Order do
    @moduledoc false
    use EctoStandIn,
      defaults: [items: [], note: "none"],
      fields: [
        customer: :string,
        count: :integer,
        weight: :float,
        urgent: :boolean,
        price: :decimal,
        on: :date,
        at: :utc_datetime,
        at_usec: :utc_datetime_usec,
        naive: :naive_datetime,
        opens: :time,
        tags: {:array, :string},
        sums: {:map, :float},
        extra: :map,
        state: enum(new: "new", paid: "paid"),
        level: enum([low: 1, high: 2], :dump),
        items: embed(:many, Item),
        main: embed(:one, Item),
        paid: Money,
        code: Upcase,
        other_id: :binary_id,
        note: :string
      ]
  end

  defmodule Table do
    @moduledoc false
    use EctoStandIn, source: "orders", fields: [customer: :string]
  end

  defmodule Bytes do
    @moduledoc false
    use EctoStandIn, fields: [blob: :binary]
  end

  defmodule Outer do
    @moduledoc false
    use EctoStandIn, fields: [inner: embed(:one, Bytes)]
  end

  @json %{
    "customer" => "Ann",
    "count" => 2,
    "weight" => 1,
    "urgent" => true,
    "price" => 19.99,
    "on" => "2026-03-01",
    "at" => "2026-03-01T10:30:00.123Z",
    "at_usec" => "2026-03-01T10:30:00Z",
    "naive" => "2026-03-01T10:30:00",
    "opens" => "10:30:00",
    "tags" => ["a"],
    "sums" => %{"x" => 1},
    "extra" => %{"any" => [1]},
    "state" => "paid",
    "level" => 2,
    "items" => [%{"sku" => "a", "size" => "m"}],
    "main" => %{"sku" => "b", "size" => "s"},
    "paid" => %{"cents" => 5},
    "code" => "abc",
    "other_id" => "00000000-0000-4000-8000-000000000000"
  }

  defp type(module), do: Types.type(module, "signature.outputs.order", [])

  defp schema(module),
    do: Wire.type(Types.field(:order, module, "signature.outputs.order", []), :outputs, "order")

  test "the schema has the fields without the primary key; those without a default are required" do
    assert %{type: "object", title: "Order", properties: properties, required: required} =
             schema(Order)

    keys = Order.__schema__(:fields) -- [:id]
    assert Enum.sort(Map.keys(properties)) == Enum.sort(keys)
    assert required == Enum.map(keys -- [:items, :note], &Atom.to_string/1)

    assert %{
             price: %{type: "number"},
             on: %{type: "string", format: "date"},
             at_usec: %{type: "string", format: "date-time"},
             tags: %{type: "array", items: %{type: "string"}},
             sums: %{type: "object", additionalProperties: %{type: "number"}},
             state: %{enum: ["new", "paid"]},
             level: %{enum: [1, 2]},
             items: %{
               type: "array",
               items: %{properties: %{size: %{enum: ["s", "m"]}}, required: ["sku", "size"]}
             },
             main: %{title: "Item"},
             paid: %{type: "object"},
             code: %{type: "string"},
             other_id: %{type: "string", format: "uuid"}
           } = properties
  end

  test "an answer becomes the struct, with the types of its fields" do
    assert {:ok, order} = Cast.cast(@json, type(Order), "order")

    assert %Order{
             id: nil,
             customer: "Ann",
             count: 2,
             weight: 1.0,
             price: price,
             on: ~D[2026-03-01],
             at: ~U[2026-03-01 10:30:00Z],
             at_usec: ~U[2026-03-01 10:30:00.000000Z],
             naive: ~N[2026-03-01 10:30:00],
             opens: ~T[10:30:00],
             sums: %{"x" => 1.0},
             state: :paid,
             level: :high,
             items: [%Item{sku: "a", size: :m}],
             main: %Item{sku: "b", size: :s},
             paid: %Money{cents: 5},
             code: "ABC",
             note: "none"
           } = order

    assert price == Decimal.from_float(19.99)

    assert {:ok, %Order{items: [], note: "none"}} =
             @json
             |> Map.delete("items")
             |> Map.put("note", nil)
             |> Cast.cast(type(Order), "order")
  end

  test "what does not fit is named, whatever the functions of a custom type do" do
    for {key, value, text} <- [
          {"state", "open", ~s(order.state: expected "new" or "paid")},
          {"level", "high", "order.level: expected 1 or 2"},
          {"items", [%{"sku" => "a"}], "order.items[0].size: missing"},
          {"code", "boom", "order.code: expected another value: its type cannot load this one"},
          {"code", "no", "order.code: expected another value: its type cannot load this one"},
          {"paid", %{"cents" => "5"},
           "order.paid: expected another value: its type cannot load this one"},
          {"count", nil, "order.count: expected a whole number"}
        ],
        do: assert(Cast.cast(Map.put(@json, key, value), type(Order), "order") == {:error, text})
  end

  test "an input is dumped without the primary key, and loaded again is the same" do
    {:ok, order} = Cast.cast(@json, type(Order), "order")
    dumped = Dump.value(type(Order), %{order | id: "1"})

    assert dumped["level"] == 2 and dumped["price"] == "19.99" and
             dumped["paid"] == %{"cents" => 5}

    refute is_map_key(dumped, "id")
    json = dumped |> JSON.encode!() |> JSON.decode!() |> Map.put("price", 19.99)
    assert Cast.cast(json, type(Order), "order") == {:ok, order}
  end

  test "a schema with a table, and a type without a JSON form, are refused by name" do
    for {module, text} <- [
          {Table,
           "Table is not a type: it exports no __dspex__/1, and is no embedded schema of Ecto"},
          {Bytes, "Bytes.blob: no JSON form for Ecto's type :binary"},
          {Outer, "Outer.inner: DSPex.ProgramEctoSchemaTest.Bytes.blob: no JSON form"}
        ] do
      assert {:error, refusal} = Refusal.catching(fn -> type(module) end)
      assert refusal =~ "signature.outputs.order: "
      assert refusal =~ text
    end
  end
end
