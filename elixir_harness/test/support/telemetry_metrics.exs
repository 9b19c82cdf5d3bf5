defmodule Telemetry.Metrics do
  @moduledoc """
  A stand-in for the module of the Hex package `telemetry_metrics` 1.x: its constructors, which give maps here. As
  telemetry.exs, it is compiled where a test asks for it.
  """

  @options [:event_name, :measurement, :tags, :tag_values, :unit, :keep, :reporter_options]

  for kind <- [:counter, :sum, :last_value, :summary, :distribution] do
    def unquote(kind)(name, options), do: metric(unquote(kind), name, options)
  end

  defp metric(kind, name, options) do
    options = Keyword.validate!(options, @options)
    {event, [measurement]} = Enum.split(name, -1)
    true = Enum.all?(name, &is_atom/1) and event != []

    %{event_name: event, measurement: measurement, tags: [], tag_values: & &1, unit: :unit}
    |> Map.merge(%{keep: nil, reporter_options: []})
    |> Map.merge(Map.new(options))
    |> Map.merge(%{kind: kind, name: name})
  end
end
