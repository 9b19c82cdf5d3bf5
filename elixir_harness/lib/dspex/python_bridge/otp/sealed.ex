defmodule DSPex.PythonBridge.OTP.Sealed do
  @moduledoc """
  A value that may hold secrets, in a function: where it is stored or printed it does not show.

  Such a function belongs to the code that made it, and whoever holds it is killed when that code is loaded
  for the second time, unless the new code is the same. So it is made here, where nothing else changes.
  """

  @type t(value) :: (-> value)

  @doc """
  Seals a value; a call of the function gives it back.

      iex> sealed = DSPex.PythonBridge.OTP.Sealed.new("sk-…")
      iex> {inspect(sealed) =~ "sk-", sealed.()}
      {false, "sk-…"}
  """
  @spec new(value) :: t(value) when value: term()
  def new(value), do: fn -> value end
end
