defmodule DSPex.PythonBridge.Options.Table do
  @moduledoc false
  # Checks keyword lists of options against a table of their names, types and defaults:
  # `[retry: {:boolean, true}, timeout: :ms]`.

  # The longest timeout of `receive`.
  @max_ms 4_294_967_295
  # Names that are more alike than this are taken for one that was misspelt.
  @alike 0.8

  @typedoc """
  `:test` accepts a value or not. A function returns `:ok`, the value to use instead, or the text that refuses it, and is
  for values that may be secret: they are not shown.
  """
  @type type ::
          :any
          | :atom
          | :boolean
          | :map
          | :keyword
          | :count
          | :positive
          | :ms
          | :timeout
          | Range.t()
          | {:test, (term() -> boolean()), expected :: String.t()}
          | (term() -> :ok | {:ok, term()} | {:error, String.t()})
  @type t :: [{atom(), type() | {type(), default :: term()}}]

  @doc """
  The options with their defaults, or the text that refuses them. If an option is given twice, the first counts, as for
  `Keyword`.

      iex> alias DSPex.PythonBridge.Options.Table
      iex> Table.check([n: 2], n: 1..9, retry: {:boolean, true})
      {:ok, [retry: true, n: 2]}
      iex> Table.check([n: 0], n: 1..9)
      {:error, ":n: expected 1 to 9, got 0"}
      iex> Table.check([retyr: true], retry: :boolean)
      {:error, "unknown option :retyr, did you mean :retry?"}
  """
  @spec check(term(), t()) :: {:ok, keyword()} | {:error, String.t()}
  def check(opts, table) do
    if Keyword.keyword?(opts) do
      defaults = for {key, {_type, default}} <- table, do: {key, default}

      with {:ok, opts} <- checked(Enum.uniq_by(opts, &elem(&1, 0)), table),
           do: {:ok, Keyword.merge(defaults, opts)}
    else
      {:error, "options: expected a keyword list"}
    end
  end

  @doc "The same over those of a key of the application's configuration; the error has a text that begins with `whose`."
  @spec check(term(), t(), String.t(), atom() | nil) ::
          {:ok, keyword()} | {:error, Exception.t()}
  def check(opts, table, whose, key \\ nil) do
    config = if key, do: Application.get_env(:dspex, key, []), else: []

    with true <- Keyword.keyword?(config) || {:error, "config: expected a keyword list"},
         {:ok, opts} <- check(if(Keyword.keyword?(opts), do: opts ++ config, else: opts), table) do
      {:ok, opts}
    else
      {:error, text} -> {:error, ArgumentError.exception("#{whose}: #{text}")}
    end
  end

  defp checked([], _table), do: {:ok, []}

  defp checked([{key, value} | opts], table) do
    with {:ok, type} <- Keyword.fetch(table, key),
         {:ok, value} <- one(type, value),
         {:ok, opts} <- checked(opts, table) do
      {:ok, [{key, value} | opts]}
    else
      :error -> {:error, unknown(key, Keyword.keys(table))}
      {:refused, text} -> {:error, "#{inspect(key)}: #{text}"}
      {:error, text} -> {:error, text}
    end
  end

  defp one({:test, _test, _expected} = type, value), do: tested(type, value)
  defp one({type, _default}, value), do: one(type, value)

  defp one(check, value) when is_function(check, 1) do
    case check.(value) do
      :ok -> {:ok, value}
      {:ok, value} -> {:ok, value}
      {:error, text} -> {:refused, text}
    end
  end

  defp one(type, value), do: tested(test(type), value)

  defp tested({:test, test, expected}, value) do
    if test.(value),
      do: {:ok, value},
      else: {:refused, "expected #{expected}, got #{shown(value)}"}
  end

  defp test(:any), do: {:test, fn _value -> true end, "anything"}
  defp test(:atom), do: {:test, &(is_atom(&1) and &1 != nil), "an atom"}
  defp test(:boolean), do: {:test, &is_boolean/1, "true or false"}
  defp test(:map), do: {:test, &(is_map(&1) and not is_struct(&1)), "a map"}
  defp test(:keyword), do: {:test, &Keyword.keyword?/1, "a keyword list"}
  defp test(:count), do: {:test, &(is_integer(&1) and &1 >= 0), "0 or more"}
  defp test(:positive), do: {:test, &(is_integer(&1) and &1 > 0), "1 or more"}
  defp test(:ms), do: {:test, &(&1 in 1..@max_ms), "1 to #{@max_ms} ms"}

  defp test(:timeout),
    do: {:test, &(&1 == :infinity or &1 in 1..@max_ms), "1 to #{@max_ms} ms or :infinity"}

  defp test(%Range{} = range),
    do: {:test, &(is_integer(&1) and &1 in range), "#{range.first} to #{range.last}"}

  @doc """
  The type of a budget with these limits, a map or a keyword list, which becomes a map.

      iex> alias DSPex.PythonBridge.Options.Table
      iex> Table.check([budget: [usd: 0.5]], budget: Table.budget([:lm_calls, :usd]))
      {:ok, [budget: %{usd: 0.5}]}
      iex> Table.check([budget: %{tokens: 5}], budget: Table.budget([:lm_calls, :usd]))
      {:error, ":budget: unknown option :tokens"}
  """
  @spec budget([atom()]) :: (term() -> {:ok, map()} | {:error, String.t()})
  def budget(limits) do
    amount = {:test, &(is_number(&1) and &1 > 0), "a number above 0"}

    types =
      Keyword.take([lm_calls: :positive, tokens: :positive, seconds: amount, usd: amount], limits)

    fn budget ->
      budget = if is_map(budget) and not is_struct(budget), do: Map.to_list(budget), else: budget

      with {:ok, [_ | _] = checked} <- check(budget, types),
           do: {:ok, Map.new(checked)},
           else: (
             {:ok, []} -> {:error, "expected one of #{Enum.map_join(limits, ", ", &inspect/1)}"}
             error -> error
           )
    end
  end

  @doc "A value for a text, cut short."
  @spec shown(term()) :: String.t()
  def shown(value), do: inspect(value, limit: 5, printable_limit: 80)

  @doc """
  The text that refuses an unknown option, with the known one that is most alike.

      iex> DSPex.PythonBridge.Options.Table.unknown(:max_retrys, [:name, :max_retries])
      "unknown option :max_retrys, did you mean :max_retries?"
  """
  @spec unknown(atom(), [atom()]) :: String.t()
  def unknown(key, known), do: "unknown option #{inspect(key)}#{meant(key, known, @alike)}"

  @doc "The end of a text about an unknown word: the known one that is most alike, if it is more so than `alike`."
  @spec meant(atom() | String.t(), [atom() | String.t()], float()) :: String.t()
  def meant(word, known, alike) do
    likeness = &String.jaro_distance(to_string(word), to_string(&1))
    nearest = Enum.max_by(known, likeness)
    if likeness.(nearest) > alike, do: ", did you mean #{inspect(nearest)}?", else: ""
  end
end
