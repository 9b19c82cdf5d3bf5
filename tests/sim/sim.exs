# The figures of docs/cluster.md, for `make sim`: splits and single events at several sizes, and runs with faults of all kinds, by
# many seeds. Exit status 1 if anything is wrong. SIM_SEEDS= for more or fewer runs.

Code.require_file("all.exs", __DIR__)
Logger.configure(level: :error)
Sim.Instrument.load(Sim.Of)

defmodule Sim.Report do
  alias Sim.Scenarios

  @sizes [3, 12, 50, 100, 200]

  def run do
    seeds = String.to_integer(System.get_env("SIM_SEEDS", "200"))
    wrong = for(size <- [3, 12, 40], seeds > 0, do: faults(size, div(seeds, div(size, 3)))) ++ [sizes()]
    if Enum.sum(wrong) > 0, do: System.halt(1)
  end

  defp faults(nodes, count) do
    results = all(for seed <- 1..count//1, do: {:faults, [nodes: nodes, seed: seed]})
    sum = fn key -> Enum.sum(Enum.map(results, &Map.get(&1, key, 0))) end
    faults = Enum.sum(Enum.flat_map(results, fn r -> Map.values(r[:faults] || %{}) end))
    late = Enum.count(results, &((&1[:equal_ms] || 0) > 1_000))

    IO.puts(
      "#{nodes} nodes, #{length(results)} runs with faults: #{sum.(:calls)} calls (#{sum.(:elsewhere)} by another node), #{sum.(:changes)} changes, " <>
        "#{faults} faults; equal later than 1 s after all was connected: #{late}; wrong: #{length(Enum.flat_map(results, & &1.wrong))}"
    )

    wrong(results)
  end

  defp sizes do
    costs = all(for n <- @sizes, do: {:costs, [nodes: n, seed: 1]})
    splits = all(for n <- @sizes, seed <- 1..if(n > 50, do: 1, else: 5), do: {:split, [nodes: n, seed: seed]})

    if wrong(costs) + wrong(splits) == 0 do
      row("nodes", @sizes)
      row("messages of one create_program", for(r <- costs, do: r.create.messages.change))
      row("bytes of it", for(r <- costs, do: r.create.bytes))
      row("ms until all nodes have it", for(r <- costs, do: r.create.everywhere_ms))
      row("ms until its caller has the reply", for(r <- costs, do: r.create.replied_ms))
      row("messages when a node joins", for(r <- costs, do: r.join.messages.hello + r.join.messages.serves))
      row("KB that it receives", for(r <- costs, do: round(r.join.received_bytes / 1000)))
      row("ms until it has all programs", for(r <- costs, do: r.join.knows_ms))
      row("messages when all 3 peers of a node die and start", for(r <- costs, do: r.peers.messages.serves))
      of = fn n, key -> for({s, m} <- Enum.zip(splits, for(n <- @sizes, _ <- 1..if(n > 50, do: 1, else: 5), do: n)), m == n, do: Map.fetch!(s, key)) end
      row("split: changes in it", for(n <- @sizes, do: Enum.sum(of.(n, :changes))))
      row("split: calls in it, none lost", for(n <- @sizes, do: Enum.sum(of.(n, :calls))))
      row("split: ms from its end until all are equal (slowest run)", for(n <- @sizes, do: Enum.max(of.(n, :equal_ms))))
      row("split: messages to heal", for(n <- @sizes, do: Enum.max(of.(n, :messages))))
      row("split: ms of CPU of a coordinator to heal", for(n <- @sizes, do: Float.round(Enum.max(of.(n, :cpu_ms)), 1)))
    end

    wrong(costs) + wrong(splits)
  end

  defp all(runs) do
    runs
    |> Task.async_stream(fn {name, options} -> Scenarios.run(name, options) end, timeout: :infinity)
    |> Enum.map(fn {:ok, result} -> result end)
  end

  defp wrong(results) do
    wrong = Enum.flat_map(results, & &1.wrong)
    for text <- Enum.take(wrong, 20), do: IO.puts("  wrong: #{text}")
    length(wrong)
  end

  defp row(name, values), do: IO.puts("| #{name} | #{Enum.map_join(values, " | ", &to_string/1)} |")
end

Sim.Report.run()
