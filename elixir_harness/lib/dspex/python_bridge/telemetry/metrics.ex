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
  @ms [unit: {:native, :millisecond}]
  # The commands of the peer. A caller may pass anything, of which each value would be a time series.
  @commands ~w(ping create_program execute_program list_programs get_stats cleanup)

  @doc "As `DSPex.PythonBridge.Telemetry.metrics/0`."
  @spec list() :: [struct()]
  def list do
    unless Code.ensure_loaded?(Telemetry.Metrics) do
      raise "DSPex.PythonBridge.Telemetry.metrics/0 needs Telemetry.Metrics: " <>
              "add {:telemetry_metrics, \"~> 1.0\"} to the dependencies of your application"
    end

    List.flatten([
      Enum.map([:bridge, :pool], &of_calls/1),
      counter([:lm, :stop], [:model, :result, :cached]),
      duration([:lm, :stop], [:model], @calls_ms, keep: &(not &1.cached)),
      for(
        used <- ~w(input_tokens output_tokens cost_usd wait_ms)a,
        do: sum([:lm, :stop], used, [:model])
      ),
      counter([:tool, :stop], [:tool, :result, :remembered?]),
      duration([:tool, :stop], [:tool], @calls_ms, keep: &(not &1.remembered?)),
      counter([:tool, :exception], [:tool]),
      # What they have used is in the metrics of their calls.
      for kind <- [:evaluate, :optimize] do
        [
          counter([kind, :stop], [:result]),
          metric(:last_value, [kind, :stop], :score, [:program_id], keep: &(&1.result == :ok))
        ]
      end,
      metric(:last_value, [:bridge, :peer, :up], :duration, [:bridge], @ms),
      counter([:bridge, :peer, :down], [:bridge, :reason], :uptime),
      sum([:bridge, :resend], :count, [:bridge, :reason]),
      duration([:monitor, :check], [:bridge, :result], @checks_ms),
      counter([:pool, :checkout], [:pool, :result])
    ])
  end

  defp of_calls(kind) do
    event = [kind, :call, :stop]

    [
      counter(event, [kind, :command, :result]),
      duration(event, [kind, :command], @calls_ms),
      for used <- ~w(input_tokens output_tokens lm_calls cache_hits)a do
        sum(event, used, [kind, :program_id], keep: &run?/1)
      end
    ]
  end

  # Ids that there are: those of callers may be any strings.
  defp run?(metadata),
    do: metadata.command == "execute_program" and metadata.result != :program_not_found

  # LiveDashboard counts only events that have the measurement.
  defp counter(event, tags, measurement \\ :duration),
    do: metric(:counter, event, :count, tags, measurement: measurement)

  defp sum(event, measurement, tags, options \\ []),
    do: metric(:sum, event, measurement, tags, options)

  defp duration(event, tags, buckets, options \\ []) do
    options = [reporter_options: [buckets: buckets]] ++ @ms ++ options
    metric(:distribution, event, :duration, tags, options)
  end

  defp metric(kind, event, measurement, tags, options) do
    event = [:dspex | event]
    options = [event_name: event, tags: tags, tag_values: &tag_values/1] ++ options
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
