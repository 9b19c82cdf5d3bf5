defmodule DSPex.PythonBridge.Optimize.TelemetryTest do
  @moduledoc "The events of optimizations, by a fake peer."

  # Whether the application has `:telemetry` is global to the BEAM.
  use ExUnit.Case, async: false

  alias DSPex.PythonBridge.{Bridge, Optimize}
  alias DSPex.Test.FakePeer
  alias DSPex.Test.Telemetry, as: Host

  @secret "the contents"
  @events [[:optimize, :start], [:optimize, :progress], [:optimize, :stop]] ++
            [[:optimize, :exception], [:bridge, :call, :start], [:bridge, :call, :stop]] ++
            [[:bridge, :call, :exception], [:bridge, :resend]]
  @progress %{progress: %{step: "fake", done: 1, total: 4, lm_calls: 1, best: nil}}
  @candidate %{candidate: %{number: 1, score: 0.2, of: 4, best: true, state: %{a: @secret}}}
  @result %{state: %{}, score: 0.2, baseline: 0.0, candidates: 1, lm_calls: 4, metric_calls: 4}
  @play [["stream", @progress], ["stream", @candidate], ["reply", @result, %{lm_calls: 4}]]

  setup do
    Host.install()
    on_exit(&Host.remove/0)
    Host.attach(@events)
    start_supervised!({Bridge, Keyword.merge(FakePeer.opts(:plays), name: :optimized)})
    :ok
  end

  defp optimize(play, opts \\ []) do
    definition = %{id: "qa", signature: "question -> answer"}
    metric = {:field, :answer, :equals}
    given = [trainset: [{%{question: @secret}, %{answer: @secret}}], metric: metric]
    given = given ++ [optimizer: :copro, options: [play: play]]
    Optimize.run(:optimized, definition, given ++ opts)
  end

  # But for those of the temporary program.
  defp events do
    Enum.reject(Host.events(), fn {_event, _measured, metadata} ->
      Map.get(metadata, :command, "execute_program") != "execute_program"
    end)
  end

  test "are a span with progress, around that of its run, without contents" do
    assert {:ok, _} = optimize(@play, telemetry_metadata: %{tenant: "acme"})

    assert [{[:optimize, :start], _, start}, {[:bridge, :call, :start], _, call} | rest] =
             events()

    assert %{bridge: :optimized, pool: nil, program_id: "qa", optimizer: "copro"} = start
    assert start.telemetry_metadata == %{tenant: "acme"} and map_size(start) == 6
    assert %{program_id: "qa", telemetry_metadata: %{tenant: "acme"}} = call

    assert [
             {[:optimize, :progress], %{done: 1, total: 4, lm_calls: 1, duration: _}, ^start},
             {[:optimize, :progress], %{score: 0.2, candidates: 1}, ^start},
             {[:bridge, :call, :stop], %{lm_calls: 4}, %{result: :ok}},
             {[:optimize, :stop], measured, stop}
           ] = rest

    assert stop == Map.put(start, :result, :ok)
    assert %{score: 0.2, baseline: +0.0, candidates: 1, lm_calls: 4, metric_calls: 4} = measured
    refute inspect([start, call, rest]) =~ @secret
  end

  test "tell how it ended" do
    for {play, opts, result, called} <- [
          {@play, [on_progress: fn _ -> :stop end], :ok, :cancelled},
          {[["fail", "lm_error"]], [], :lm_error, :lm_error},
          {[["die"]], [retry: false], :python_process_died, :python_process_died}
        ] do
      optimize(play, opts)

      assert [{[:bridge, :call, :stop], _, call}, {[:optimize, :stop], _, stop}] =
               Enum.take(events(), -2)

      assert {stop.result, call.result} == {result, called}
    end

    assert catch_throw(optimize(@play, on_progress: fn _ -> throw({:mine, @secret}) end))
    all = events()

    assert [{[:bridge, :call, :exception], _, _}, {[:optimize, :exception], _, what}] =
             Enum.take(all, -2)

    assert %{kind: :throw, reason: :mine} = what
    refute inspect(all) =~ @secret
    assert {:error, _} = optimize(@play, budgets: [])
    assert events() == []
  end

  test "have each death of a peer after which it is made again" do
    assert {:ok, _} = optimize([["first", [["stream", @progress], ["die"]], @play]])
    resends = for {[:bridge, :resend], measured, metadata} <- events(), do: {measured, metadata}
    assert resends == [{%{count: 1}, %{bridge: :optimized, pool: nil, reason: :died}}]
  end
end
