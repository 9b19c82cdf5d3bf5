defmodule DSPex.PythonBridge.Telemetry.MetricsTest do
  @moduledoc "The metrics against the events of real work, as reporters read them."

  # Whether the application has `:telemetry`, and its metrics, is global to the BEAM.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import DSPex.Test.Telemetry, only: [events: 0]

  alias DSPex.PythonBridge.{Bridge, Evaluate, Monitor, Pool, Telemetry}
  alias DSPex.PythonBridge.Telemetry.RunSpan
  alias DSPex.Test.FakePeer
  alias DSPex.Test.Telemetry, as: Host

  @source Path.expand("../../../support/telemetry_metrics.exs", __DIR__)
  @create %{id: "qa", signature: "question -> answer"}
  @ask %{program_id: "qa", inputs: %{question: "Why?"}}

  defp install do
    Code.compile_file(@source)

    on_exit(fn ->
      :code.delete(Elixir.Telemetry.Metrics)
      :code.purge(Elixir.Telemetry.Metrics)
    end)
  end

  test "an application without Telemetry.Metrics is told what to add" do
    error = assert_raise RuntimeError, fn -> Telemetry.metrics() end
    assert error.message =~ "metrics/0 needs Telemetry.Metrics: add {:telemetry_metrics"
  end

  test "the durations of LMs and tools are of calls that were made, not of remembered answers" do
    install()

    for {event, measured, not_measured} <- [
          {[:lm, :stop], %{cached: false}, %{cached: true}},
          {[:tool, :stop], %{remembered?: false}, %{remembered?: true}}
        ] do
      name = [:dspex | event] ++ [:duration]
      assert %{keep: keep} = Enum.find(Telemetry.metrics(), &(&1.name == name))
      assert {keep.(measured), keep.(not_measured)} == {true, false}
    end
  end

  @tag timeout: 120_000
  test "each has what it measures and its tags in the events that it is of" do
    install()
    Host.install()
    on_exit(&Host.remove/0)
    metrics = Telemetry.metrics()
    Host.attach(metrics |> Enum.map(&tl(&1.event_name)) |> Enum.uniq())

    # Without a name: its tag is made of a pid.
    bridge = start_supervised!({Bridge, real_opts()})
    {:ok, _} = Bridge.call(bridge, :create_program, @create)
    {:ok, _} = Bridge.call(bridge, :execute_program, @ask)
    {:error, _} = Bridge.call(bridge, "anything", %{})
    {:error, _} = Bridge.call(bridge, :execute_program, %{@ask | program_id: "any"})
    agent = %{id: "agent", program_type: "react", tools: [%{name: "look", args: %{}}]}
    {:ok, _} = Bridge.call(bridge, :create_program, Map.merge(@create, agent))

    for look <- [fn _ -> 1 end, fn _ -> raise "no" end],
        do: {:ok, _, _} = run_agent(bridge, look)

    monitor = start_supervised!({Monitor, name: nil, bridge: bridge})
    %{status: :healthy} = Monitor.force_health_check(monitor)
    start_supervised!({Pool, real_opts(name: :observed_pool, pool_size: 1)})
    {:ok, _} = Pool.call(:observed_pool, :create_program, @create, 60_000)
    {:ok, _} = Pool.call(:observed_pool, :execute_program, @ask)
    {:ok, _} = Pool.checkout(:observed_pool)
    metric = {:field, :answer, :equals}

    {:ok, %{score: score}} =
      Evaluate.run(bridge, "qa", [{@ask.inputs, %{answer: "x"}}], metric: metric)

    {:error, _} = Evaluate.run(bridge, "any", [@ask.inputs], metric: fn _, _ -> 1 end)
    optimized = %{program_id: "qa", telemetry_metadata: %{}}

    {:ok, _} =
      RunSpan.run(:optimize, bridge, optimized, %{score: 0.5}, fn _ -> {:ok, :better} end)

    waiting = FakePeer.opts(:silent) |> Keyword.put(:name, :waiting)
    silent = start_supervised!({Bridge, waiting}, id: :waiting)
    call = Task.async(fn -> Bridge.call(silent, :list_programs, %{}, 2_000) end)
    eventually(fn -> match?(%{state: :running, pending: 1}, Bridge.get_status(silent)) end)
    FakePeer.kill(silent)
    Task.await(call)

    events = events()
    values = Map.new(metrics, &{&1.name, values(&1, events)})
    assert map_size(values) == length(metrics), "each has a name of its own"
    assert for({name, []} <- values, do: name) == []

    tokens = values[[:dspex, :bridge, :call, :stop, :input_tokens]]
    assert [{%{program_id: "qa"} = tags, n}, {%{program_id: "agent"}, _} | _] = tokens
    assert n > 0 and tags.bridge == inspect(bridge)
    assert [{tags, ^n} | _] = values[[:dspex, :lm, :stop, :input_tokens]]
    assert tags == %{model: "offline/echo"}
    assert values[[:dspex, :evaluate, :stop, :score]] == [{%{program_id: "qa"}, score}]
    counted = for {tags, _} <- values[[:dspex, :bridge, :call, :stop, :count]], do: tags
    assert %{bridge: inspect(bridge), command: "other", result: :unknown_command} in counted
  end

  test "a reporter for Prometheus takes all of them, and a page of strings is enough for it" do
    install()

    for metric <- Telemetry.metrics() do
      assert metric.kind in [:counter, :sum, :last_value, :distribution]
      # LiveDashboard gives it the metadata alone.
      assert metric.keep == nil or is_function(metric.keep, 1)
    end

    [%{tag_values: tag_values} | _] = Telemetry.metrics()

    assert tag_values.(%{program_id: "a\nb", command: "x\ny", bridge: {:via, A, "b"}, pool: nil}) ==
             %{program_id: "a\\nb", command: "other", bridge: ~s({:via, A, "b"}), pool: nil}
  end

  defp run_agent(bridge, look) do
    args = %{@ask | program_id: "agent"}
    Bridge.request(bridge, :execute_program, args, tools: %{"look" => look})
  end

  # As reporters do.
  defp values(metric, events) do
    for {event, measured, metadata} <- events,
        event == tl(metric.event_name),
        metric.keep == nil or metric.keep.(metadata) do
      value = Map.fetch!(measured, metric.measurement)
      assert is_number(value)
      tags = metric.tag_values.(metadata)
      assert metric.tags -- Map.keys(tags) == []
      for tag <- metric.tags, do: assert(is_binary(to_string(tags[tag])))
      {Map.take(tags, metric.tags), value}
    end
  end
end
