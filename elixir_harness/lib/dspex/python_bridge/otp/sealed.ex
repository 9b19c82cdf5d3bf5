defmodule DSPex.PythonBridge.OTP.Sealed do
  @moduledoc false
  # A value that may hold secrets, wrapped in a function, so that printing and logging do not show it.
  #
  # A function belongs to the code that made it, and a process that holds one is killed when that code is loaded
  # a second time, unless the new code is the same. So it is made in this module, which does not change.

  @type t(value) :: (-> value)

  @doc """
  Seals a value; a call of the function returns it.

      iex> sealed = DSPex.PythonBridge.OTP.Sealed.new("sk-…")
      iex> {inspect(sealed) =~ "sk-", sealed.()}
      {false, "sk-…"}
  """
  @spec new(value) :: t(value) when value: term()
  def new(value), do: fn -> value end
end
