defmodule DSPex.PythonBridge.Tools.Span do
  @moduledoc false
  # The events of a tool call: a span, as `:telemetry.span/3` makes one, in the process of the tool. They have no arguments
  # and no results.

  alias DSPex.PythonBridge.Telemetry
  alias DSPex.PythonBridge.Telemetry.Metadata
  alias DSPex.PythonBridge.Tools.{Answer, Outcome}

  # The names that are not in :tools are written by an LM.
  @unknown "unknown"

  @typedoc "Of the whole call, as its own events have it."
  @type about :: %{
          pool: term(),
          program_id: String.t() | nil,
          telemetry_metadata: map()
        }
  @typedoc "A tool call under way; nil without `:telemetry`."
  @type t :: {started :: integer(), metadata :: map()} | nil

  @doc """
  Emits the start of a call of a tool, nil for one that there is not. `remembered?`: whether the answer is that of an
  earlier peer's call.
  """
  @spec begin(about(), pid() | {atom(), node()}, String.t() | nil, boolean()) :: t()
  def begin(about, bridge, tool, remembered?) do
    if Telemetry.look_once() do
      metadata =
        Map.merge(about, %{
          bridge: Metadata.name(bridge),
          tool: tool || @unknown,
          remembered?: remembered?,
          telemetry_span_context: make_ref()
        })

      measurements = Metadata.start()
      Telemetry.execute([:tool, :start], measurements, metadata)
      {measurements.monotonic_time, metadata}
    end
  end

  @doc "Emits the end of a call with an answer, or by an exception, whose message that is."
  @spec over(t(), Answer.t(), Outcome.how()) :: :ok
  def over(nil, _answer, _how), do: :ok

  def over({started, metadata}, answer, :returned) do
    metadata = Map.put(metadata, :result, answer.result)
    Telemetry.execute([:tool, :stop], Metadata.since(started), metadata)
  end

  def over({started, metadata}, _answer, {kind, reason, stacktrace}) do
    metadata = Map.merge(metadata, Metadata.exception(kind, reason, stacktrace))
    Telemetry.execute([:tool, :exception], Metadata.since(started), metadata)
  end
end
