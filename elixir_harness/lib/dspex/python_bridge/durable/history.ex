defmodule DSPex.PythonBridge.Durable.History do
  @moduledoc false
  # What the records of a run say, the oldest first. A record is a JSON object, whose first key says what it is:
  #
  #   * `run`: the arguments, and the id that the keys of its tool calls are made from
  #   * `lm`: an entry of the journal, as a peer has written it
  #   * `began`, `answer`, `wait`, `approve`: of a tool call, by its key
  #   * `budget`: what the run may spend from now on
  #   * `keep`: of the entries up to now only the first ones count
  #   * `over`: the result, or that it was cancelled

  alias DSPex.PythonBridge.Protocol.Payload

  @lm ~s({"lm":)
  # The key of what waits for more budget.
  @budget "budget"

  defstruct [:id, :args, :began_at, :budget, :over] ++
              [entries: [], answers: %{}, begun: %{}, waiting: %{}, approved: MapSet.new()] ++
              [tools: MapSet.new()]

  @typedoc """
  `id`: nil if there is no run. `entries`: the newest first. `answers`, `begun`, `waiting`, `approved`: by the keys of tool calls.
  `tools`: the names of those that it has called. `over`: `{:done, result, meta}` or `:cancelled`.
  """
  @type t :: %__MODULE__{
          id: String.t() | nil,
          args: map() | nil,
          began_at: integer() | nil,
          budget: map() | nil,
          over: {:done, term(), map()} | :cancelled | nil,
          entries: [binary()],
          answers: %{String.t() => {:ok, term()} | {:error, String.t()}},
          begun: %{String.t() => true},
          waiting: %{String.t() => map()},
          approved: MapSet.t(String.t()),
          tools: MapSet.t(String.t())
        }

  @doc "Reads records; the text of an error says which one is wrong."
  @spec read([binary()]) :: {:ok, t()} | {:error, String.t()}
  def read(records) do
    records
    |> Enum.with_index(1)
    |> Enum.reduce_while({:ok, %__MODULE__{}}, fn {record, number}, {:ok, history} ->
      case add(history, record) do
        {:ok, history} -> {:cont, {:ok, history}}
        :error -> {:halt, {:error, "record #{number} of #{length(records)} is none of a run"}}
      end
    end)
  end

  @doc "Adds a record."
  @spec add(t(), binary()) :: {:ok, t()} | :error
  def add(%__MODULE__{id: id} = history, @lm <> rest = record) when id != nil do
    if String.ends_with?(record, "}"),
      do: {:ok, %{history | entries: [binary_slice(rest, 0..-2//1) | history.entries]}},
      else: :error
  end

  def add(history, record) do
    with {:ok, %{} = record} <- Payload.decode(record),
         do: fold(history, record),
         else: (_ -> :error)
  end

  defp fold(%{id: nil} = history, %{"run" => id, "args" => %{} = args, "at" => at})
       when is_binary(id) and is_integer(at),
       do: {:ok, %{history | id: id, args: args, began_at: at}}

  defp fold(%{id: nil}, _other), do: :error

  defp fold(history, %{"began" => key, "tool" => name}) when is_binary(name) do
    {:ok, %{called(history, name) | begun: Map.put(history.begun, key, true)}}
  end

  defp fold(history, %{"answer" => key} = answer) do
    case answer do
      %{"ok" => value} -> {:ok, answered(history, key, {:ok, value})}
      %{"error" => text} when is_binary(text) -> {:ok, answered(history, key, {:error, text})}
      _other -> :error
    end
  end

  defp fold(history, %{"wait" => key, "tool" => name, "args" => args, "why" => why}) do
    history = if name, do: called(history, name), else: history
    call = %{key: key, tool: name, args: args, why: why}
    approved = MapSet.delete(history.approved, key)
    begun = Map.delete(history.begun, key)

    {:ok,
     %{history | waiting: Map.put(history.waiting, key, call), approved: approved, begun: begun}}
  end

  defp fold(history, %{"approve" => key}),
    do: {:ok, %{settled(history, key) | approved: MapSet.put(history.approved, key)}}

  defp fold(history, %{"budget" => budget}) when is_map(budget) or budget == nil,
    do: {:ok, %{settled(history, @budget) | budget: budget}}

  defp fold(history, %{"keep" => n}) when is_integer(n) and n >= 0,
    do: {:ok, %{history | entries: Enum.take(history.entries, -n)}}

  defp fold(history, %{"over" => "cancelled"}), do: {:ok, %{history | over: :cancelled}}

  defp fold(history, %{"over" => "done", "result" => result, "meta" => %{} = meta}),
    do: {:ok, %{history | over: {:done, result, meta}}}

  defp fold(_history, _unknown), do: :error

  defp called(history, name), do: %{history | tools: MapSet.put(history.tools, name)}

  defp answered(history, key, answer),
    do: %{settled(history, key) | answers: Map.put(history.answers, key, answer)}

  defp settled(history, key), do: %{history | waiting: Map.delete(history.waiting, key)}

  @doc "What waits for a decision, in the order of its keys."
  @spec waiting(t()) :: [map()]
  def waiting(history), do: history.waiting |> Map.values() |> Enum.sort_by(& &1.key)

  @doc "The key of what waits for more budget."
  @spec budget_key() :: String.t()
  def budget_key, do: @budget

  ## Records

  @doc "The record of an entry."
  @spec entry(binary()) :: binary()
  def entry(entry), do: @lm <> entry <> "}"

  @doc "The record of the arguments of a new run."
  @spec run(map()) :: binary()
  def run(args) do
    id = Base.encode16(:crypto.strong_rand_bytes(16), case: :lower)
    JSON.encode!(%{run: id, args: args, at: System.os_time(:millisecond)})
  end

  @doc "Any other record, of terms that have a JSON form."
  @spec record(map()) :: binary()
  def record(map), do: JSON.encode!(map)
end
