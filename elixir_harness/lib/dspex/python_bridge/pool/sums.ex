defmodule DSPex.PythonBridge.Pool.Sums do
  @moduledoc false
  # The commands that ask how the peers are, for a whole pool: all peers of this node are asked, and their answers are
  # added. What one of them answers would be a part, and another one each time.

  alias DSPex.PythonBridge.{Error, Programs, Protocol}
  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Pool.{Handle, LocalCall}

  # A peer answers in milliseconds, unless it hangs, or is being started.
  @patience_ms 2_000

  @doc "Whether the answers to a command are added."
  defguard is_summed(command)
           when command in [:get_stats, "get_stats", :list_programs, "list_programs"]

  @doc """
  Asks all peers of this node, at most until the deadline, and adds what has come within `@patience_ms`, or the first
  answer after it.
  """
  @spec run(Handle.t(), Protocol.command(), map(), Deadline.t(), keyword()) :: LocalCall.reply()
  def run(%Handle{} = handle, command, args, deadline, opts) do
    opts = Keyword.take(opts, [:traceparent])
    indexes = LoadCounters.indexes(handle.counters)
    timeout = Deadline.left(deadline)

    asked =
      Map.new(indexes, &{ask(Handle.bridge(handle, &1), command, args, timeout, opts), &1})

    soon = min(deadline, Deadline.new(@patience_ms))
    {asked, answers} = await(asked, %{}, soon, fn _answers -> false end)
    {asked, answers} = await(asked, answers, deadline, &any?/1)
    for {{ref, pid}, _index} <- asked, do: stop(ref, pid)
    sum(handle, for(index <- indexes, do: {index, answers[index]}))
  end

  # In a process of its own, which exits with the answer.
  defp ask(bridge, command, args, timeout, opts) do
    {pid, ref} =
      spawn_monitor(fn ->
        Process.flag(:sensitive, true)
        exit({:answer, Caller.exchange(bridge, command, args, timeout, opts)})
      end)

    {ref, pid}
  end

  defp await(asked, answers, deadline, enough?) do
    if asked == %{} or enough?.(answers) do
      {asked, answers}
    else
      receive do
        {:DOWN, ref, :process, pid, reason} when is_map_key(asked, {ref, pid}) ->
          {index, asked} = Map.pop!(asked, {ref, pid})
          await(asked, Map.put(answers, index, reason), deadline, enough?)
      after
        Deadline.left(deadline) -> {asked, answers}
      end
    end
  end

  defp any?(answers), do: Enum.any?(answers, fn {_index, answer} -> ok?(answer) end)

  defp ok?({:answer, {:ok, _id, _result, _meta}}), do: true
  defp ok?(_error), do: false

  # The bridge cancels its call.
  defp stop(ref, pid) do
    Process.exit(pid, :kill)
    Process.demonitor(ref, [:flush])
  end

  ## The sum

  defp sum(handle, answers) do
    results = for {_index, {:answer, {:ok, _id, %{} = result, _meta}}} <- answers, do: result
    refused = for {_index, {:answer, {:error, %Error{} = error}}} <- answers, do: error

    cond do
      results != [] ->
        missing = for {index, answer} <- answers, not ok?(answer), do: name(handle, index)
        {:ok, 0, total(handle, results, missing), %{}}

      # A refusal says more than a peer that did not answer.
      refused != [] ->
        {:error, Enum.find(refused, hd(refused), &(&1.type != :timeout))}

      true ->
        {:error, Error.new(:timeout)}
    end
  end

  defp name(handle, index), do: inspect(Handle.bridge(handle, index))

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
