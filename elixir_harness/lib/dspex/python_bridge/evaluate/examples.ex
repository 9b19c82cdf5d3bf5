defmodule DSPex.PythonBridge.Evaluate.Examples do
  @moduledoc false
  # Examples as the caller gives them, and as the wire has them: two lists, the inputs and what is expected.

  alias DSPex.PythonBridge.Program
  alias DSPex.PythonBridge.Program.{Dump, Spec}

  @type pair :: {inputs :: map() | keyword(), expected :: map() | nil}

  @typedoc "What is left of an enumerable; nil at its end."
  @type reader :: (Enumerable.acc() -> Enumerable.result()) | nil

  @doc "For `take/2`."
  @spec reader(term()) :: reader()
  def reader(examples) do
    &Enumerable.reduce(examples, &1, fn
      example, {1, taken} -> {:suspend, {0, [example | taken]}}
      example, {left, taken} -> {:cont, {left - 1, [example | taken]}}
    end)
  end

  @doc """
  The next `count` examples and what is left, of which nothing has been asked yet; with 0, all of them. The error is the
  text of what the enumerable has raised.

      iex> alias DSPex.PythonBridge.Evaluate.Examples
      iex> {:ok, [1, 2], left} = Examples.take(Examples.reader(1..3), 2)
      iex> Examples.take(left, 2)
      {:ok, [3], nil}
      iex> Examples.take(Examples.reader(fn _acc, _fun -> raise "no file" end), 2)
      {:error, "** (RuntimeError) no file"}
  """
  @spec take(reader(), non_neg_integer()) :: {:ok, [term()], reader()} | {:error, String.t()}
  def take(reader, count) do
    case reader.({:cont, {count, []}}) do
      {:suspended, {_left, taken}, reader} -> {:ok, Enum.reverse(taken), reader}
      {ended, {_left, taken}} when ended in [:done, :halted] -> {:ok, Enum.reverse(taken), nil}
    end
  catch
    kind, reason ->
      [line | _more] = String.split(Exception.format_banner(kind, reason, __STACKTRACE__), "\n")
      {:error, line}
  end

  @doc "Ends an enumerable of which no more is needed, such as a file."
  @spec close(reader()) :: term()
  def close(reader) do
    reader && reader.({:halt, nil})
  catch
    kind, reason -> {kind, reason}
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
