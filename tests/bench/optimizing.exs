# Runs and pings of others while a program is optimized: 8 threads that ask an LM which takes its time, and a metric in
# the BEAM.

defmodule Bench.Optimizing do
  import Bench

  alias DSPex.PythonBridge.Bridge

  @threads 8
  @callers 16
  # Of the LM, in seconds: an answer has some 100 tokens.
  @lm_takes 0.075

  def figures do
    bridge = bridge(lm(@lm_takes))
    # Its answers begin with a reasoning.
    create(bridge, "qa", %{program_type: "chain_of_thought"})
    # DSPy's optimizers are imported by now, too.
    during_optimization(bridge, fn -> others(bridge, 2) end)

    figures =
      rounds(5, [ratio: {:ms, :alone_ms}], fn ->
        alone = others(bridge, 16)
        meanwhile = during_optimization(bridge, fn -> others(bridge, 16) end)

        %{
          alone_ms: alone.ms,
          ms: meanwhile.ms,
          alone_ping_p99_ms: alone.ping_p99_ms,
          ping_p99_ms: meanwhile.ping_p99_ms,
          busy: meanwhile.busy
        }
      end)

    Bridge.stop(bridge)
    figures
  end

  # The median of the runs of 16 callers, each of which makes so many, and the p99 of pings meanwhile.
  defp others(bridge, each) do
    run = fn number -> bridge |> timed_runs(number, each) end

    {p99, took} =
      ping_p99_during(bridge, 5, fn ->
        1..@callers |> Task.async_stream(run, max_concurrency: @callers, timeout: :infinity) |> Enum.flat_map(&elem(&1, 1))
      end)

    %{ms: took |> Enum.sort() |> Enum.at(div(length(took), 2)), ping_p99_ms: p99}
  end

  defp timed_runs(bridge, number, count), do: for(_ <- 1..count, do: elem(ms(fn -> execute(bridge, "qa", number) end), 0))

  # `busy`: how many of the optimizer's threads had a request at the LM, in the mean.
  defp during_optimization(bridge, fun) do
    scored = :counters.new(1, [])
    optimizer = Task.async(fn -> optimize(bridge, scored) end)
    wait_until(fn -> :counters.get(scored, 1) >= 4 * @threads end)
    before = :counters.get(scored, 1)
    {ms, figures} = ms(fun)
    busy = (:counters.get(scored, 1) - before) * @lm_takes * 1000 / ms
    nil = Task.shutdown(optimizer, :brutal_kill)
    wait_until(fn -> threads(bridge) == 0 end)
    Map.put(figures, :busy, busy)
  end

  # Does not end by itself.
  defp optimize(bridge, scored) do
    metric = fn %{"purpose" => purpose} ->
      if purpose == "score", do: :counters.add(scored, 1, 1)
      1.0
    end

    args =
      Map.merge(%{program_id: "qa", metric: %{tool: "metric"}}, examples(50))
      |> Map.put(:optimize, %{
        optimizer: "random_search",
        options: %{num_candidate_programs: 1000},
        valset: examples(200),
        num_threads: @threads
      })

    opts = [timeout: :infinity, tools: %{"metric" => metric}, on_chunk: fn _progress -> :ok end]
    Bridge.request(bridge, :execute_program, args, opts)
  end

  defp examples(count) do
    %{
      inputs: for(number <- 1..count, do: %{question: "What is the capital of country #{number}, and since when?"}),
      expected: List.duplicate(%{answer: "Paris"}, count)
    }
  end

  defp threads(bridge) do
    {:ok, stats} = Bridge.call(bridge, :get_stats, %{}, 30_000)
    stats["threads"]["running"]
  end
end
