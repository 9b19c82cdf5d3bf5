defmodule DSPex.PythonBridge.Optimize.TelemetryTest do
  @moduledoc "The events of optimizations, by a fake peer."

  # Whether the application has `:telemetry` is global to the BEAM.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Optimize}
  alias DSPex.Test.Telemetry, as: Host

  @secret "the contents"
  @trainset for n <- 1..4, do: {%{question: "#{n} #{@secret}"}, %{n: n}}
  @events [[:optimize, :start], [:optimize, :progress], [:optimize, :stop]] ++
            [[:optimize, :exception], [:bridge, :call, :start], [:bridge, :call, :stop]] ++
            [[:bridge, :call, :exception], [:bridge, :resend]]

  setup do
    Host.install()
    on_exit(&Host.remove/0)
    Host.attach(@events)
    file = Path.join(System.tmp_dir!(), "optimize#{System.unique_integer([:positive])}")
    on_exit(fn -> for path <- Path.wildcard(file <> "*"), do: File.rm!(path) end)
    opts = fake_opts("optimizes", env: %{"FAKE_FILE" => file}) |> Keyword.put(:name, :optimized)
    start_supervised!({Bridge, opts})
    :ok
  end

  defp optimize(opts) do
    definition = %{id: "qa", signature: "question -> answer"}
    metric = fn %{"n" => n}, _prediction -> n / 10 end
    given = [trainset: @trainset, metric: metric, optimizer: :copro]
    Optimize.run(:optimized, definition, Keyword.merge(given, opts))
  end

  defp events do
    receive do
      {event, measured, metadata} when event in @events ->
        [{event, measured, metadata} | events()]
    after
      0 -> []
    end
  end

  test "are a span with progress, around that of the one call, without contents" do
    assert {:ok, _} = optimize(telemetry_metadata: %{tenant: "acme"})
    all = events()

    assert [{[:optimize, :start], _, start}, {[:bridge, :call, :start], _, call} | rest] = all
    assert %{bridge: :optimized, pool: nil, program_id: "qa", optimizer: "copro"} = start
    assert start.telemetry_metadata == %{tenant: "acme"} and map_size(start) == 6

    assert %{command: "execute_program", program_id: "qa", telemetry_metadata: %{tenant: _}} =
             call

    assert {progress, [called, stopped]} = Enum.split(rest, -2)
    assert {[:bridge, :call, :stop], %{lm_calls: 4}, %{result: :ok}} = called

    for {event, measured, metadata} <- progress do
      assert event == [:optimize, :progress] and metadata == start
      assert %{done: _, total: 4, lm_calls: _, candidates: _, duration: _} = measured
    end

    assert Enum.map(progress, &elem(&1, 1)[:score]) == [nil, nil, 0.2, 0.2, 0.2, 0.4]
    assert {[:optimize, :stop], measured, stop} = stopped
    assert stop == Map.put(start, :result, :ok)
    assert %{score: 0.25, baseline: +0.0, candidates: 2, lm_calls: 4, metric_calls: 4} = measured
    refute inspect(all) =~ @secret
  end

  test "tell how it ended" do
    for {opts, result, called} <- [
          {[on_progress: fn _ -> :stop end], :ok, :cancelled},
          {[options: %{refuse: "lm_error"}], :lm_error, :lm_error},
          {[options: %{die: [[1, 1]]}, retry: false], :python_process_died, :python_process_died}
        ] do
      optimize(opts)
      assert [_start, _call | rest] = events()

      assert [{[:bridge, :call, :stop], _, call}, {[:optimize, :stop], _, stop}] =
               Enum.take(rest, -2)

      assert {stop.result, call.result} == {result, called}
    end

    assert catch_throw(optimize(on_progress: fn _ -> throw({:mine, @secret}) end))
    all = events()
    assert {[:optimize, :exception], _, %{kind: :throw, reason: :mine}} = List.last(all)

    assert [{[:bridge, :call, :exception], _, _}] =
             for({[_, _, :exception], _, _} = e <- all, do: e)

    refute inspect(all) =~ @secret

    assert {:error, %Error{}} = optimize(metric: nil)
    assert events() == []
  end

  test "have each death of a peer after which it is made again" do
    assert {:ok, _} = optimize(options: %{die: [[0, 1], [3, 1]]})
    resends = for {[:bridge, :resend], measured, metadata} <- events(), do: {measured, metadata}
    resend = {%{count: 1}, %{bridge: :optimized, pool: nil, reason: :died}}
    assert resends == [resend, resend]
  end
end
