# What a unit of work costs as there is more of it: `make growth`. It is the CPU of Python: the machine is shared, and a
# BEAM that has little to do spends CPU on waiting.

defmodule Bench.Growth do
  import Bench

  alias DSPex.PythonBridge.Bridge

  def rows do
    [
      {"programs", &by_programs/0},
      {"in-flight", &by_in_flight/0},
      {"streams", &by_streams/0},
      {"calls", &by_calls/0}
    ]
  end

  @runs 2_000

  # A run, in µs, and the memory of the peer, in MB, with so many programs.
  defp by_programs do
    bridge = bridge(lm(0))
    create(bridge, "p1")
    warm(bridge)

    sizes(bridge, [1, 10, 100, 1_000, 10_000], fn size ->
      have = programs(bridge)
      if size > have, do: spread(size - have, 64, &create(bridge, "p#{have + &1}"))
      one = fn number -> execute(bridge, "p#{1 + rem(number * 7_919, size)}", number) end
      # Each of the programs that are called has run once.
      spread(min(size, @runs), 64, &execute(bridge, "p#{1 + rem(&1 * 7_919, size)}", &1))
      cpu_us(bridge, @runs, fn -> spread(@runs, 64, one) end)
    end)
  end

  defp programs(bridge) do
    {:ok, stats} = Bridge.call(bridge, :get_stats, %{}, 30_000)
    stats["programs_count"]
  end

  # With so many at once, of an LM that takes 0.1 s.
  defp by_in_flight do
    bridge = bridge(lm(0.1), env: %{"DSPY_BRIDGE_MAX_IN_FLIGHT" => "2048"})
    create(bridge, "p1")
    warm(bridge)

    sizes(bridge, [1, 16, 256, 2_048], fn size ->
      count = min(@runs, size * 50) |> max(size)
      spread(size, size, &execute(bridge, "p1", &1))
      cpu_us(bridge, count, fn -> spread(count, size, &execute(bridge, "p1", &1)) end)
    end)
  end

  # A token, with so many streams at once.
  defp by_streams do
    bridge = bridge(lm(0))
    create(bridge, "p1")
    warm(bridge)

    sizes(bridge, [1, 16, 256], fn size ->
      count = max(size, 64)
      stream = fn number -> 300 = tokens(bridge, number) end
      spread(size, size, stream)
      cpu_us(bridge, count * 300, fn -> spread(count, size, stream) end)
    end)
  end

  defp tokens(bridge, number) do
    args = %{program_id: "p1", inputs: %{question: "question #{number}"}}
    bridge |> Bridge.stream(args, timeout: 120_000) |> Enum.count(&match?({:chunk, "answer", _}, &1))
  end

  # After so many calls of all kinds: pings, runs, streams, programs made and removed, lists, stats, and wrong ones.
  defp by_calls do
    bridge = bridge(lm(0))
    create(bridge, "p1")
    warm(bridge)
    {_, figures} = Enum.reduce([10_000, 100_000, 1_000_000], {0, %{}}, &after_calls(bridge, &1, &2))
    Bridge.stop(bridge)
    figures
  end

  defp after_calls(bridge, count, {done, figures}) do
    before = System.monotonic_time(:millisecond)
    spread(div(count - done, 1_000), 64, fn thousand -> for n <- 1..1_000, do: any(bridge, rem(n, 100), thousand * 1_000 + n) end)
    seconds = (System.monotonic_time(:millisecond) - before) / 1000
    {count, Map.merge(figures, %{"#{count} MB": rss(bridge) / 1_048_576, "#{count} s": seconds})}
  end

  defp any(bridge, kind, number) when kind < 8, do: execute(bridge, "p1", number)
  defp any(bridge, 8, number), do: 300 = tokens(bridge, number)

  defp any(bridge, 9, number) do
    create(bridge, "q#{number}")
    {:ok, _} = Bridge.call(bridge, :cleanup, %{program_ids: ["q#{number}"]}, 60_000)
  end

  defp any(bridge, 10, _number), do: {:ok, _} = Bridge.call(bridge, :get_stats, %{}, 60_000)
  defp any(bridge, 11, _number), do: {:ok, _} = Bridge.call(bridge, :list_programs, %{}, 60_000)
  defp any(bridge, 12, _number), do: {:error, _} = Bridge.call(bridge, :execute_program, %{program_id: "none", inputs: %{}}, 60_000)
  defp any(bridge, 13, _number), do: {:error, _} = Bridge.call(bridge, :unheard_of, %{}, 60_000)
  defp any(bridge, _ping, number), do: {:ok, _} = Bridge.call(bridge, :ping, %{n: number}, 60_000)

  defp warm(bridge), do: spread(256, 64, &execute(bridge, "p1", &1))

  defp sizes(bridge, sizes, measure) do
    figures =
      for size <- sizes, into: %{} do
        rounds = for _ <- 1..3, do: measure.(size)
        {size, %{us: rounds, mb: rss(bridge) / 1_048_576}}
      end

    Bridge.stop(bridge)
    for {size, %{us: us, mb: mb}} <- figures, {name, value} <- ["#{size} µs": us, "#{size} MB": mb], into: %{}, do: {name, value}
  end

  defp cpu_us(bridge, count, fun) do
    cpu(bridge, fun).peer * 1000 / count
  end
end
