defmodule DSPex.PythonBridge.Backoff do
  @moduledoc """
  When to start a peer again that has died: after 50 ms; after early deaths in a row, after 100 ms,
  200 ms, … up to 5 s; and after `max_retries` of those no more. What death is early, its user says.
  """

  @first_ms 50
  @max_ms 5_000
  # 50 ms doubled seven times is past the maximum; the exponent need not grow with the count.
  @max_doublings 7

  @enforce_keys [:max_retries]
  defstruct [:max_retries, early_deaths: 0]

  @type t :: %__MODULE__{max_retries: non_neg_integer(), early_deaths: non_neg_integer()}

  @doc "Nothing has died yet."
  @spec new(non_neg_integer()) :: t()
  def new(max_retries), do: %__MODULE__{max_retries: max_retries}

  @doc "Somebody wants a fresh beginning."
  @spec reset(t()) :: t()
  def reset(%__MODULE__{} = backoff), do: %{backoff | early_deaths: 0}

  @doc """
  A peer died. `early?` tells whether it had been of no use. Gives the delay in ms until the next
  start.

      iex> backoff = DSPex.PythonBridge.Backoff.new(1)
      iex> {:retry, 50, backoff} = DSPex.PythonBridge.Backoff.died(backoff, true)
      iex> DSPex.PythonBridge.Backoff.died(backoff, true)
      :give_up
  """
  @spec died(t(), boolean()) :: {:retry, pos_integer(), t()} | :give_up
  def died(%__MODULE__{} = backoff, false), do: {:retry, @first_ms, reset(backoff)}

  def died(%__MODULE__{early_deaths: n, max_retries: n}, true), do: :give_up

  def died(%__MODULE__{early_deaths: n} = backoff, true) do
    delay = min(@first_ms * 2 ** min(n, @max_doublings), @max_ms)
    {:retry, delay, %{backoff | early_deaths: n + 1}}
  end
end
