defmodule DSPex.PythonBridge.Evaluate.Examples do
  @moduledoc false
  # Examples as the caller gives them, and as the wire has them: two lists, the inputs and what is expected.

  alias DSPex.PythonBridge.Program
  alias DSPex.PythonBridge.Program.{Dump, Spec}
  alias DSPex.PythonBridge.Tools.Answer

  @type pair :: {inputs :: map() | keyword(), expected :: map() | nil}

  @doc """
  The examples of an enumerable, which is asked for no more than are taken; or the text that refuses what is none. If it
  raises, that is thrown as `{DSPex.PythonBridge.Evaluate.Examples, text}`.
  """
  @spec stream(term()) :: {:ok, Enumerable.t()} | {:error, String.t()}
  def stream(examples) when is_list(examples) do
    if List.improper?(examples), do: {:error, "expected a proper list"}, else: {:ok, examples}
  end

  # The streams of Elixir are functions of two arguments.
  def stream(examples) do
    if Enumerable.impl_for(examples) == nil or
         (is_function(examples) and not is_function(examples, 2)) do
      {:error, "expected an enumerable of examples"}
    else
      start = &Enumerable.reduce(examples, &1, fn example, _acc -> {:suspend, example} end)
      {:ok, Stream.resource(fn -> start end, &next/1, &(&1 && &1.({:halt, nil})))}
    end
  end

  defp next(continue) do
    case continue.({:cont, nil}) do
      {:suspended, example, continue} -> {[example], continue}
      {ended, _acc} when ended in [:done, :halted] -> {:halt, nil}
    end
  catch
    kind, reason -> throw({__MODULE__, Answer.message(kind, reason, __STACKTRACE__)})
  end

  @doc """
  The columns of a list of examples for the program of a module, as they are sent; the second is nil if nothing is expected
  of any. The error is the index of what is not an example.

      iex> alias DSPex.PythonBridge.Evaluate.Examples
      iex> Examples.columns([{%{q: 1}, %{a: 2}}, %{q: 3}])
      {:ok, [%{q: 1}, %{q: 3}], [%{a: 2}, %{}]}
      iex> Examples.columns([%{q: 3}, :none])
      {:error, 1}
  """
  @spec columns([term()], Spec.t() | nil) ::
          {:ok, [map()], [map()] | nil} | {:error, non_neg_integer()}
  def columns(examples, spec \\ nil) do
    pairs = Enum.map(examples, &(&1 |> pair() |> as_sent(spec)))

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

  defp as_sent(nil, _spec), do: nil

  defp as_sent({inputs, expected}, spec),
    do: {Program.Inputs.example(spec, inputs), expected && Dump.any(expected)}

  @doc "The text that refuses what is not an example."
  @spec refusal(String.t(), non_neg_integer()) :: String.t()
  def refusal(name, index),
    do: "#{name}[#{index}]: expected {inputs, expected}, two maps, or a map of inputs"

  @doc "The inputs of an example and what is expected, nil without; or nil for what is not an example."
  @spec pair(term()) :: pair() | nil
  def pair({inputs, expected}) when is_map(expected) or expected == nil do
    if is_map(inputs) or (inputs != [] and Keyword.keyword?(inputs)), do: {inputs, expected}
  end

  def pair(inputs) when is_map(inputs), do: {inputs, nil}
  def pair(_other), do: nil
end
