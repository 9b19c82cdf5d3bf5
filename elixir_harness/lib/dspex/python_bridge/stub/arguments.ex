defmodule DSPex.PythonBridge.Stub.Arguments do
  @moduledoc false
  # Checks of single arguments of commands, with the peer's words.

  alias DSPex.PythonBridge.Error

  # A name that is so similar was probably meant.
  @near 0.85

  @doc "Checks that an argument is a string that is not empty."
  @spec text(map(), String.t()) :: :ok | {:error, Error.t()}
  def text(args, name) do
    if is_binary(args[name]) and args[name] != "", do: :ok, else: refuse("#{name}: expected text")
  end

  @doc "Checks that an argument is an object, or absent."
  @spec object(map(), String.t(), String.t()) :: :ok | {:error, Error.t()}
  def object(args, name, expected) do
    if args[name] == nil or is_map(args[name]),
      do: :ok,
      else: refuse("#{name}: expected #{expected}")
  end

  @doc "Refuses keys that are not known. `where`: the object that has them; the arguments if empty."
  @spec known(map(), [String.t()], String.t()) :: :ok | {:error, Error.t()}
  def known(given, known, where) do
    case Enum.find(Map.keys(given), &(&1 not in known)) do
      nil ->
        :ok

      name ->
        text =
          if where == "", do: "#{name}: unknown argument", else: "#{where}: unknown key '#{name}'"

        near = nearest(name, known)
        meant = if near, do: "did you mean #{near}? ", else: ""
        refuse("#{text}; #{meant}expected #{Enum.join(known, ", ")}")
    end
  end

  @doc "The name that a misspelt one probably means, or nil."
  @spec nearest(String.t(), [String.t()]) :: String.t() | nil
  def nearest(name, known) do
    nearest = Enum.max_by(known, &likeness(name, &1))
    if likeness(name, nearest) >= @near, do: nearest
  end

  # As Python's difflib: of all characters, those in common.
  defp likeness(one, other) do
    same = for {:eq, text} <- String.myers_difference(one, other), do: String.length(text)
    2 * Enum.sum(same) / (String.length(one) + String.length(other))
  end

  @doc "The error of a wrong argument."
  @spec refuse(String.t()) :: {:error, Error.t()}
  def refuse(text), do: {:error, Error.new(:invalid_args, text)}
end
