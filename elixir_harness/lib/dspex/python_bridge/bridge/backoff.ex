defmodule DSPex.PythonBridge.Bridge.Backoff do
  @moduledoc false
  # The delay before a peer that has died is started again: 50 ms; after early deaths in a row 100 ms, 200 ms, …
  # up to 5 s.

  @first_ms 50
  @max_ms 5_000
  # 50 ms doubled seven times is past the maximum.
  @max_doublings 7

  # idle_deaths: those in a row of peers that had no work.
  defstruct early_deaths: 0, idle_deaths: 0

  @type t :: %__MODULE__{early_deaths: non_neg_integer(), idle_deaths: non_neg_integer()}

  @doc "The start: no early deaths."
  @spec new() :: t()
  def new, do: %__MODULE__{}

  @doc """
  The delay in ms after a death. `early?`: whether the peer had been of no use. `working?`: whether it had work, which
  may have killed it.

      iex> alias DSPex.PythonBridge.Bridge.Backoff
      iex> {50, backoff} = Backoff.died(Backoff.new(), true)
      iex> {100, backoff} = Backoff.died(backoff, true)
      iex> {50, _backoff} = Backoff.died(backoff, false)
  """
  @spec died(t(), boolean(), boolean()) :: {pos_integer(), t()}
  def died(backoff, early?, working? \\ false)
  def died(%__MODULE__{}, false, _working?), do: {@first_ms, new()}

  def died(%__MODULE__{early_deaths: n, idle_deaths: idle}, true, working?) do
    delay = min(@first_ms * 2 ** min(n, @max_doublings), @max_ms)
    {delay, %__MODULE__{early_deaths: n + 1, idle_deaths: if(working?, do: 0, else: idle + 1)}}
  end

  @doc "Whether more than `most` peers in a row died early and without work: Python does not start."
  @spec hopeless?(t(), non_neg_integer()) :: boolean()
  def hopeless?(%__MODULE__{idle_deaths: n}, most), do: n > most
end
