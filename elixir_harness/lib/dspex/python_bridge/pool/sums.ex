defmodule DSPex.PythonBridge.Pool.Sums do
  @moduledoc false
  # The commands that ask how the peers are, for a whole pool: all peers of this node are asked, and their answers are
  # added. What one of them answers would be a part, and another one each time.

  alias DSPex.PythonBridge.{Error, Programs, Protocol}
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Pool.{Handle, Parallel}

  # A peer answers in milliseconds, unless it hangs, or is being started.
  @patience_ms 2_000

  @doc "Whether the answers to a command are added."
  defguard is_summed(command)
           when command in [:get_stats, "get_stats", :list_programs, "list_programs"]

  @doc """
  Asks all peers of this node, at most until the deadline, and adds what has come within `@patience_ms`, or the first
  answer after it.
  """
  @spec run(Handle.t(), Protocol.command(), map(), Deadline.t(), keyword()) :: Caller.result()
  def run(%Handle{} = handle, command, args, deadline, opts) do
    opts = Keyword.take(opts, [:traceparent])
    bridges = Tuple.to_list(handle.bridges)
    timeout = Deadline.left(deadline)
    soon = min(deadline, Deadline.new(@patience_ms))
    ask = &Caller.exchange(&1, command, args, timeout, opts)
    answers = Parallel.map(bridges, ask, soon, &ok?/1)
    sum(handle, for(bridge <- bridges, do: {bridge, answers[bridge]}))
  end

  defp ok?({:ok, _id, _result, _meta}), do: true
  defp ok?(_error), do: false

  ## The sum

  defp sum(handle, answers) do
    results = for {_bridge, {:ok, _id, %{} = result, _meta}} <- answers, do: result
    refused = for {_bridge, {:error, error}} <- answers, do: error

    cond do
      results != [] ->
        missing = for {bridge, answer} <- answers, not ok?(answer), do: inspect(bridge)
        {:ok, 0, total(handle, results, missing), %{}}

      # A refusal says more than a peer that did not answer.
      refused != [] ->
        {:error, Enum.find(refused, hd(refused), &(&1.type != :timeout))}

      true ->
        {:error, Error.new(:timeout)}
    end
  rescue
    # The table of programs has ended with the pool.
    ArgumentError -> {:error, Error.not_running(:pool, handle.name)}
  end

  defp total(handle, results, missing) do
    total = results |> Enum.reduce(&merge(&2, &1)) |> Map.delete("pid")

    total =
      if is_map_key(total, "programs_count"),
        do: %{total | "programs_count" => Programs.Store.count(handle.programs)},
        else: total

    Map.merge(total, %{"peers" => length(results), "missing" => missing})
  end

  defp merge(one, other), do: Map.merge(one, other, &combine/3)

  # A peer that was replaced has created the program again; the state is the same in all.
  defp combine("created_at", one, other), do: min(one, other)
  defp combine("state", one, _other), do: one
  # Null where no program has been loaded yet.
  defp combine("default_adapter", one, other), do: one || other

  defp combine("details", one, other) when is_list(one) and is_list(other),
    do: by_id(one ++ other)

  defp combine(key, one, other)
       when key in ["uptime", "last_executed", "p50_ms", "p99_ms"],
       do: [one, other] |> Enum.reject(&is_nil/1) |> Enum.max(fn -> nil end)

  defp combine(_key, one, other) when is_number(one) and is_number(other), do: one + other
  defp combine(_key, %{} = one, %{} = other), do: merge(one, other)

  defp combine(_key, one, other) when is_list(one) and is_list(other),
    do: Enum.uniq(one ++ other)

  defp combine(_key, one, _other), do: one

  # In the order of their first occurrence.
  defp by_id(details) do
    details = Enum.filter(details, &is_map/1)
    same = Enum.group_by(details, & &1["id"])

    for id <- details |> Enum.map(& &1["id"]) |> Enum.uniq(),
        do: same |> Map.fetch!(id) |> Enum.reduce(&merge(&2, &1))
  end
end
