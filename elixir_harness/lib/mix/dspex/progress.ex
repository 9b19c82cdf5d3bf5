defmodule Mix.DSPex.Progress do
  @moduledoc false
  # How far an evaluation is, on standard error: a bar where that is a terminal, elsewhere a line for each tenth.

  alias DSPex.PythonBridge.Evaluate.Result

  @bar 20

  @enforce_keys [:total, :columns, :seen]
  defstruct @enforce_keys

  @typedoc "`columns`: of the terminal; nil if there is none. `seen`: the examples that are done, and those that failed."
  @type t :: %__MODULE__{
          total: pos_integer(),
          columns: pos_integer() | nil,
          seen: :counters.counters_ref()
        }

  @doc "Of so many examples."
  @spec new(pos_integer()) :: t()
  def new(total) do
    %__MODULE__{total: total, columns: columns(), seen: :counters.new(2, [])}
  end

  @doc "The columns of the terminal; nil if standard error is not one."
  @spec columns() :: pos_integer() | nil
  def columns do
    with {:ok, columns} <- :io.columns(:standard_error), do: columns, else: (_ -> nil)
  end

  @doc "One more is done."
  @spec add(t(), Result.item()) :: :ok
  def add(%__MODULE__{seen: seen, total: total} = progress, item) do
    before = :counters.get(seen, 1)
    :counters.add(seen, 1, 1)
    if item.error, do: :counters.add(seen, 2, 1)
    # A terminal shows each percent.
    steps = if progress.columns, do: 100, else: 10
    if div((before + 1) * steps, total) > div(before * steps, total), do: show(progress)
    :ok
  end

  @doc "Nothing more comes: what is printed next does not follow a bar."
  @spec finish(t()) :: :ok
  def finish(%__MODULE__{columns: columns}), do: clear(columns)

  @doc "Removes the bar of a terminal."
  @spec clear(pos_integer() | nil) :: :ok
  def clear(nil), do: :ok

  def clear(columns), do: IO.write(:stderr, ["\r", String.duplicate(" ", columns - 1), "\r"])

  @doc "Writes a bar, with a text behind it, over the one before."
  @spec bar(pos_integer(), non_neg_integer(), pos_integer(), String.t()) :: :ok
  def bar(columns, done, total, text) do
    full = min(div(done * @bar, total), @bar)
    bar = ["[", String.duplicate("#", full), String.duplicate(" ", @bar - full), "] "]
    line = String.slice("#{bar}#{text}", 0, columns - 1)
    IO.write(:stderr, ["\r", line])
  end

  defp show(%__MODULE__{columns: nil} = progress), do: IO.puts(:stderr, text(progress))

  defp show(%__MODULE__{columns: columns} = progress),
    do: bar(columns, :counters.get(progress.seen, 1), progress.total, text(progress))

  defp text(%__MODULE__{seen: seen, total: total}) do
    "#{:counters.get(seen, 1)}/#{total} examples, #{:counters.get(seen, 2)} failed"
  end
end
