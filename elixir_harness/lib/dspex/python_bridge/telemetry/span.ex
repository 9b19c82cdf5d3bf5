defmodule DSPex.PythonBridge.Telemetry.Span do
  @moduledoc false
  # A span as `:telemetry.span/3` makes one, which may end in another function than the one that began it, and has no contents
  # of calls.

  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Telemetry
  alias DSPex.PythonBridge.Telemetry.Metadata

  @enforce_keys [:event, :started, :metadata]
  defstruct @enforce_keys

  @typedoc "`started`: in native time. `metadata`: that of its start."
  @type t :: %__MODULE__{event: [atom()], started: integer(), metadata: map()}

  @doc "Begins a span: `[:tool]` emits `[:dspex, :tool, :start]`."
  @spec start([atom()], map(), map()) :: t()
  def start(event, metadata, measurements \\ %{}) do
    metadata = Map.put(metadata, :telemetry_span_context, make_ref())
    started = System.monotonic_time()
    times = %{monotonic_time: started, system_time: System.system_time()}
    Telemetry.execute(event ++ [:start], Map.merge(measurements, times), metadata)
    %__MODULE__{event: event, started: started, metadata: metadata}
  end

  @doc "Emits an event of a span, such as its `:stop`, with what it has in addition to its times and the metadata of the start."
  @spec emit(t(), atom(), map(), map()) :: :ok
  def emit(%__MODULE__{} = span, name, measurements, metadata) do
    now = System.monotonic_time()
    times = %{duration: now - span.started, monotonic_time: now}
    metadata = Map.merge(span.metadata, metadata)
    Telemetry.execute(span.event ++ [name], Map.merge(measurements, times), metadata)
  end

  @doc "Emits the end of a span by what was raised, thrown, or exited with."
  @spec exception(t(), :error | :exit | :throw, term(), Exception.stacktrace(), map()) :: :ok
  def exception(span, kind, reason, stacktrace, measurements \\ %{}) do
    stacktrace = ServerGuard.stacktrace(stacktrace)
    what = %{kind: kind, reason: Metadata.reason(reason), stacktrace: stacktrace}
    emit(span, :exception, measurements, what)
  end
end
