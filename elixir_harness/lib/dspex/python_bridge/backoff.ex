defmodule DSPex.PythonBridge.Backoff do
  @moduledoc """
  When to start a peer again that has died: after 50 ms; after deaths in a row of peers that were
  never up, after 100 ms, 200 ms, … up to 5 s; and after `max_retries` of those no more.
  """

  @first_ms 50
  @max_ms 5_000
  # 50 ms doubled seven times is past the maximum; the exponent need not grow with the count.
  @max_doublings 7

  @enforce_keys [:max_retries]
  defstruct [:max_retries, failed_starts: 0]

  @type t :: %__MODULE__{max_retries: non_neg_integer(), failed_starts: non_neg_integer()}

  @doc "Nothing has died yet."
  @spec new(non_neg_integer()) :: t()
  def new(max_retries), do: %__MODULE__{max_retries: max_retries}

  @doc "A peer is up, or somebody wants a fresh beginning."
  @spec reset(t()) :: t()
  def reset(%__MODULE__{} = backoff), do: %{backoff | failed_starts: 0}

  @doc """
  A peer died. `up?` tells whether it had ever been up. Gives the delay in ms until the next start.

      iex> backoff = DSPex.PythonBridge.Backoff.new(1)
      iex> {:retry, 50, backoff} = DSPex.PythonBridge.Backoff.died(backoff, false)
      iex> DSPex.PythonBridge.Backoff.died(backoff, false)
      :give_up
  """
  @spec died(t(), boolean()) :: {:retry, pos_integer(), t()} | :give_up
  def died(%__MODULE__{} = backoff, true), do: {:retry, @first_ms, reset(backoff)}

  def died(%__MODULE__{failed_starts: n, max_retries: n}, false), do: :give_up

  def died(%__MODULE__{failed_starts: n} = backoff, false) do
    delay = min(@first_ms * 2 ** min(n, @max_doublings), @max_ms)
    {:retry, delay, %{backoff | failed_starts: n + 1}}
  end
end
