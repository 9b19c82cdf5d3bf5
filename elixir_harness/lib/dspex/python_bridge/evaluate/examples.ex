defmodule DSPex.PythonBridge.Evaluate.Examples do
  @moduledoc false
  # Examples as the caller gives them, and as the wire has them: two lists, the inputs and what is expected.

  @type pair :: {inputs :: map(), expected :: map() | nil}

  @doc """
  The columns of a list of examples; the second is nil if nothing is expected of any. The error is the index of what is
  not an example.

      iex> alias DSPex.PythonBridge.Evaluate.Examples
      iex> Examples.columns([{%{q: 1}, %{a: 2}}, %{q: 3}])
      {:ok, [%{q: 1}, %{q: 3}], [%{a: 2}, %{}]}
      iex> Examples.columns([%{q: 3}, :none])
      {:error, 1}
  """
  @spec columns([term()]) :: {:ok, [map()], [map()] | nil} | {:error, non_neg_integer()}
  def columns(examples) do
    pairs = Enum.map(examples, &pair/1)

    cond do
      index = Enum.find_index(pairs, &(&1 == nil)) ->
        {:error, index}

      Enum.all?(pairs, &(elem(&1, 1) == nil)) ->
        {:ok, Enum.map(pairs, &elem(&1, 0)), nil}

      true ->
        {inputs, expected} = Enum.unzip(pairs)
        {:ok, inputs, Enum.map(expected, &(&1 || %{}))}
    end
  end

  @doc "The text that refuses what is not an example."
  @spec refusal(String.t(), non_neg_integer()) :: String.t()
  def refusal(name, index),
    do: "#{name}[#{index}]: expected {inputs, expected}, two maps, or a map of inputs"

  @doc "The inputs of an example and what is expected, nil without; or nil for what is not an example."
  @spec pair(term()) :: pair() | nil
  def pair({inputs, expected}) when is_map(inputs) and (is_map(expected) or expected == nil),
    do: {inputs, expected}

  def pair(inputs) when is_map(inputs), do: {inputs, nil}
  def pair(_other), do: nil
end
