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

defmodule MyApp.Repo do
  @moduledoc """
  In the place of an Ecto repository: one connection to SQLite, in the standard library of Python, which understands the SQL that
  docs/guide/durable.md has for PostgreSQL.
  """

  use Agent

  @sqlite """
  import json, sqlite3, sys
  db = sqlite3.connect(":memory:", isolation_level=None)
  db.execute("PRAGMA foreign_keys = ON")
  for line in sys.stdin:
      sql, params = json.loads(line)
      cursor = db.execute(sql, {str(n): value for n, value in enumerate(params, 1)})
      rows = cursor.fetchall()
      print(json.dumps([rows, max(cursor.rowcount, len(rows))]), flush=True)
  """

  def start_link(python) do
    opts = [:binary, line: 100_000_000, args: ["-c", @sqlite]]
    Agent.start_link(fn -> Port.open({:spawn_executable, python}, opts) end, name: __MODULE__)
  end

  def query!(sql, params), do: within(&ask(&1, sql, params))

  def transaction(fun) do
    within(fn port ->
      Process.put(__MODULE__, port)
      [_, result, _] = [ask(port, "BEGIN", []), fun.(), ask(port, "COMMIT", [])]
      {:ok, result}
    end)
  end

  # A transaction's function is in the process that has the connection.
  defp within(fun),
    do: if(port = Process.get(__MODULE__), do: fun.(port), else: Agent.get(__MODULE__, fun))

  defp ask(port, sql, params) do
    Port.command(port, [JSON.encode!([sql, params]), ?\n])
    [rows, count] = receive(do: ({^port, {:data, {:eol, line}}} -> JSON.decode!(line)))
    %{rows: rows, num_rows: count}
  end
end
