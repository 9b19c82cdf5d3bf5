defmodule Mix.DSPex.Progress do
  @moduledoc false
  # How far a task is, on standard error: one line, written anew where that is a terminal; elsewhere some lines.

  # Without a terminal, a line of an optimization is printed so often.
  @every_ms 30_000

  @enforce_keys [:terminal?, :printed]
  defstruct [:terminal?, :printed]

  @typedoc "`printed`: when the last line was."
  @type t :: %__MODULE__{terminal?: boolean(), printed: integer()}

  @spec new() :: t()
  def new do
    terminal? = match?({:ok, _columns}, :io.columns(:standard_error))
    %__MODULE__{terminal?: terminal?, printed: now()}
  end

  @doc """
  Shows a text in place of the last one; without a terminal if it is `due?`, or when nothing was printed for half a minute.
  """
  @spec show(t(), String.t(), boolean()) :: t()
  def show(progress, text, due? \\ false)

  def show(%__MODULE__{terminal?: true} = progress, text, _due?) do
    {:ok, columns} = :io.columns(:standard_error)
    IO.write(:stderr, ["\r", IO.ANSI.clear_line(), String.slice(text, 0, columns - 1)])
    progress
  end

  def show(%__MODULE__{printed: printed} = progress, text, due?),
    do: if(due? or now() - printed >= @every_ms, do: line(progress, text), else: progress)

  @doc "Prints a line that stays."
  @spec line(t(), String.t()) :: t()
  def line(progress, text) do
    finish(progress)
    IO.puts(:stderr, text)
    %{progress | printed: now()}
  end

  @doc "Nothing more comes: what is printed next does not follow the progress."
  @spec finish(t()) :: :ok
  def finish(%__MODULE__{terminal?: false}), do: :ok
  def finish(_terminal), do: IO.write(:stderr, ["\r", IO.ANSI.clear_line()])

  defp now, do: System.monotonic_time(:millisecond)
end
