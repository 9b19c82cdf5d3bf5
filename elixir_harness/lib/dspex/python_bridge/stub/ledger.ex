defmodule DSPex.PythonBridge.Stub.Ledger do
  @moduledoc false
  # What a test still expects of the stubs that it uses, and what has gone wrong in their answers: one table for each
  # process that expects something. A process of its own owns the table: it must outlast the test's process, and the stubs
  # that the test has started, until the callback of `on_exit` has read it.
  #
  # Rows: {row, :expected, stub, program} and {row, :failed, stub, text}.

  @enforce_keys [:table, :holder]
  defstruct [:table, :holder]

  @type t :: %__MODULE__{table: :ets.tid(), holder: pid()}
  @type row :: reference()

  @doc "The ledger of the calling process, which is made by the first call."
  @spec mine() :: t()
  def mine do
    with nil <- Process.get(__MODULE__) do
      ledger = open(self())
      Process.put(__MODULE__, ledger)
      ledger
    end
  end

  defp open(owner) do
    ref = make_ref()
    holder = spawn(fn -> hold(owner, ref) end)

    receive do
      {^ref, table} -> %__MODULE__{table: table, holder: holder}
    end
  end

  defp hold(owner, ref) do
    monitor = Process.monitor(owner)
    send(owner, {ref, :ets.new(__MODULE__, [:public])})

    receive do
      {:DOWN, ^monitor, :process, _owner, _reason} -> :ok
      :keep -> receive do: (:close -> :ok)
    end
  end

  @doc "Keeps a ledger after the end of its process, until it is closed."
  @spec keep(t()) :: :ok
  def keep(%__MODULE__{holder: holder}), do: tell(holder, :keep)

  @doc "Ends a ledger that was kept."
  @spec close(t()) :: :ok
  def close(%__MODULE__{holder: holder}), do: tell(holder, :close)

  defp tell(holder, message) do
    send(holder, message)
    :ok
  end

  @doc "Adds a call that is expected."
  @spec expect(t(), atom(), String.t()) :: row()
  def expect(%__MODULE__{table: table}, stub, program) do
    row = make_ref()
    :ets.insert(table, {row, :expected, stub, program})
    row
  end

  @doc "Removes an expected call, which was made."
  @spec met(t(), row()) :: :ok
  def met(ledger, row), do: write(ledger, &:ets.delete(&1, row))

  @doc "Adds an error of an answer, or of a call that has none."
  @spec failed(t() | nil, atom(), String.t()) :: :ok
  def failed(nil, _stub, _text), do: :ok

  def failed(ledger, stub, text),
    do: write(ledger, &:ets.insert(&1, {make_ref(), :failed, stub, text}))

  # The test may have ended.
  defp write(%__MODULE__{table: table}, fun) do
    fun.(table)
    :ok
  rescue
    ArgumentError -> :ok
  end

  @doc "Raises if a stub, or any, has not got a call that is expected, or an answer has failed."
  @spec verify!(t(), atom() | :all) :: :ok
  def verify!(%__MODULE__{table: table}, which) do
    rows =
      for {_row, _kind, stub, _what} = row <- :ets.tab2list(table), which in [:all, stub], do: row

    missing =
      for {{stub, program}, calls} <- Enum.group_by(rows, &expected/1), stub != nil do
        "#{inspect(stub)}: #{count(length(calls))} of program #{inspect(program)} not made"
      end

    failed = for {_row, :failed, stub, text} <- rows, do: "#{inspect(stub)}: #{text}"
    if missing ++ failed != [], do: raise(Enum.join(["stubs:" | missing ++ failed], "\n  * "))
    :ok
  end

  defp expected({_row, :expected, stub, program}), do: {stub, program}
  defp expected({_row, :failed, _stub, _text}), do: {nil, nil}

  defp count(1), do: "1 expected call"
  defp count(n), do: "#{n} expected calls"
end
