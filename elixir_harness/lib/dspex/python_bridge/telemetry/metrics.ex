defmodule DSPex.PythonBridge.Telemetry.Metrics do
  @moduledoc false
  # The metrics of `DSPex.PythonBridge.Telemetry.metrics/0`. `Telemetry.Metrics` is the application's: it is found when
  # they are asked for.
  #
  # Each has a name of its own, and none is a summary: the reporter for Prometheus takes neither a name twice nor
  # summaries. Rules for which events count take metadata alone: LiveDashboard calls them so.

  @compile {:no_warn_undefined, Telemetry.Metrics}

  @calls_ms [1, 10, 100, 1_000, 10_000, 60_000]
  @checks_ms [1, 10, 100, 1_000, 5_000]
  # The commands of the peer. A caller may pass anything, of which each value would be a time series.
  @commands ~w(ping create_program execute_program list_programs get_stats cleanup)

  @doc "As `DSPex.PythonBridge.Telemetry.metrics/0`."
  @spec list() :: [struct()]
  def list do
    unless Code.ensure_loaded?(Telemetry.Metrics) do
      raise "DSPex.PythonBridge.Telemetry.metrics/0 needs Telemetry.Metrics: " <>
              "add {:telemetry_metrics, \"~> 1.0\"} to the dependencies of your application"
    end

    Enum.flat_map([:bridge, :pool], &of_calls/1) ++
      of_lms() ++
      of_tools() ++
      Enum.flat_map([:evaluate, :optimize], &of_runs/1) ++
      of_peers()
  end

  defp of_calls(kind) do
    event = [:dspex, kind, :call, :stop]

    [
      counter(event, [kind, :command, :result]),
      duration(event, [kind, :command], @calls_ms),
      metric(:sum, event, :input_tokens, [kind, :program_id], keep: &run?/1),
      metric(:sum, event, :output_tokens, [kind, :program_id], keep: &run?/1),
      metric(:sum, event, :lm_calls, [kind, :program_id], keep: &run?/1),
      metric(:sum, event, :cache_hits, [kind, :program_id], keep: &run?/1)
    ]
  end

  # Ids that there are: those of callers may be any strings.
  defp run?(metadata),
    do: metadata.command == "execute_program" and metadata.result != :program_not_found

  defp of_lms do
    event = [:dspex, :lm, :stop]

    [
      counter(event, [:model, :result, :cached]),
      duration(event, [:model], @calls_ms, keep: &(not &1.cached)),
      metric(:sum, event, :input_tokens, [:model]),
      metric(:sum, event, :output_tokens, [:model]),
      metric(:sum, event, :cost_usd, [:model]),
      metric(:sum, event, :wait_ms, [:model])
    ]
  end

  defp of_tools do
    event = [:dspex, :tool, :stop]

    [
      counter(event, [:tool, :result, :remembered?]),
      duration(event, [:tool], @calls_ms, keep: &(not &1.remembered?)),
      counter([:dspex, :tool, :exception], [:tool])
    ]
  end

  # What they have used is in the metrics of their calls.
  defp of_runs(kind) do
    event = [:dspex, kind, :stop]

    [
      counter(event, [:result]),
      metric(:last_value, event, :score, [:program_id], keep: &(&1.result == :ok))
    ]
  end

  defp of_peers do
    up = [unit: {:native, :millisecond}]

    [
      metric(:last_value, [:dspex, :bridge, :peer, :up], :duration, [:bridge], up),
      counter([:dspex, :bridge, :peer, :down], [:bridge, :reason], :uptime),
      metric(:sum, [:dspex, :bridge, :resend], :count, [:bridge, :reason]),
      duration([:dspex, :monitor, :check], [:bridge, :result], @checks_ms),
      counter([:dspex, :pool, :checkout], [:pool, :result])
    ]
  end

  # LiveDashboard counts only events that have the measurement.
  defp counter(event, tags, measurement \\ :duration) do
    options = [event_name: event, measurement: measurement]
    metric(:counter, event, :count, tags, options)
  end

  defp duration(event, tags, buckets, options \\ []) do
    options = [unit: {:native, :millisecond}, reporter_options: [buckets: buckets]] ++ options
    metric(:distribution, event, :duration, tags, options)
  end

  defp metric(kind, event, measurement, tags, options \\ []) do
    options = [tags: tags, tag_values: &tag_values/1] ++ options
    apply(Telemetry.Metrics, kind, [event ++ [measurement], options])
  end

  # Reporters make strings of these values, and cannot of a pid.
  defp tag_values(metadata), do: Map.new(metadata, fn {key, value} -> {key, tag(key, value)} end)

  defp tag(:command, command), do: if(command in @commands, do: command, else: "other")
  defp tag(key, name) when key in [:bridge, :pool] and name != nil, do: inspect(name)
  # Prometheus has one series a line.
  defp tag(:program_id, id) when is_binary(id), do: id |> inspect() |> String.trim("\"")
  defp tag(_key, value), do: value
end
