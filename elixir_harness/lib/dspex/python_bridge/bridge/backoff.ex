defmodule DSPex.PythonBridge.Bridge.Backoff do
  @moduledoc """
  When to start a peer again that has died: after 50 ms; after early deaths in a row, after 100 ms,
  200 ms, … up to 5 s. What death is early, its user says.
  """

  @first_ms 50
  @max_ms 5_000
  # 50 ms doubled seven times is past the maximum; the exponent need not grow with the count.
  @max_doublings 7

  defstruct early_deaths: 0

  @type t :: %__MODULE__{early_deaths: non_neg_integer()}

  @doc "Nothing has died yet, or somebody wants a fresh beginning."
  @spec new() :: t()
  def new, do: %__MODULE__{}

  @doc """
  A peer died. `early?` tells whether it had been of no use. Gives the delay in ms until the next
  start.

      iex> {50, backoff} = DSPex.PythonBridge.Bridge.Backoff.died(DSPex.PythonBridge.Bridge.Backoff.new(), true)
      iex> {100, backoff} = DSPex.PythonBridge.Bridge.Backoff.died(backoff, true)
      iex> {50, _backoff} = DSPex.PythonBridge.Bridge.Backoff.died(backoff, false)
  """
  @spec died(t(), boolean()) :: {pos_integer(), t()}
  def died(%__MODULE__{}, false), do: {@first_ms, new()}

  def died(%__MODULE__{early_deaths: n}, true),
    do: {min(@first_ms * 2 ** min(n, @max_doublings), @max_ms), %__MODULE__{early_deaths: n + 1}}

  @doc "Whether so many early deaths in a row are more than bad luck."
  @spec hopeless?(t(), non_neg_integer()) :: boolean()
  def hopeless?(%__MODULE__{early_deaths: n}, most), do: n > most
end
