defmodule DSPex.PythonBridge.OTP.Deadline do
  @moduledoc false
  # The end of a timeout, in monotonic ms.

  @type t :: integer() | :infinity

  @doc "The present time."
  @spec now() :: integer()
  def now, do: :erlang.monotonic_time(:millisecond)

  @doc "The end of a timeout that began at `from`."
  @spec new(timeout(), integer()) :: t()
  def new(timeout, from \\ now())
  def new(:infinity, _from), do: :infinity
  def new(timeout, from), do: from + timeout

  @doc "The ms until a deadline; 0 if it has passed."
  @spec left(t()) :: timeout()
  def left(:infinity), do: :infinity
  def left(deadline), do: max(deadline - :erlang.monotonic_time(:millisecond), 0)
end
