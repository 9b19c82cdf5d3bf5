defmodule DSPex.PythonBridge.Tools.Span do
  @moduledoc false
  # The events of a tool call: a span, as `:telemetry.span/3` makes one, in the process of the tool. They have no arguments
  # and no results.

  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Telemetry
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
          bridge: name(bridge),
          tool: tool || @unknown,
          remembered?: remembered?,
          telemetry_span_context: make_ref()
        })

      started = System.monotonic_time()
      measurements = %{monotonic_time: started, system_time: System.system_time()}
      Telemetry.execute([:tool, :start], measurements, metadata)
      {started, metadata}
    end
  end

  @doc "Emits the end of a call with an answer, or by an exception, whose message that is."
  @spec over(t(), Answer.t(), Outcome.how()) :: :ok
  def over(nil, _answer, _how), do: :ok

  def over({started, metadata}, answer, :returned) do
    metadata = Map.put(metadata, :result, answer.result)
    Telemetry.execute([:tool, :stop], since(started), metadata)
  end

  def over({started, metadata}, _answer, {kind, reason, stacktrace}) do
    what = %{kind: kind, reason: kind_of(reason), stacktrace: ServerGuard.stacktrace(stacktrace)}
    Telemetry.execute([:tool, :exception], since(started), Map.merge(metadata, what))
  end

  defp since(started) do
    now = System.monotonic_time()
    %{duration: now - started, monotonic_time: now}
  end

  # The rest may have arguments.
  defp kind_of(%module{} = error) when is_exception(error), do: module
  defp kind_of(reason) when is_atom(reason), do: reason
  defp kind_of(reason) when is_tuple(reason) and is_atom(elem(reason, 0)), do: elem(reason, 0)
  defp kind_of(_contents), do: :other

  # In a pool it is the one that the call is at.
  defp name({name, node}) when node == node(), do: name

  defp name(pid) when is_pid(pid) and node(pid) == node() do
    case Process.info(pid, :registered_name) do
      {:registered_name, name} when is_atom(name) -> name
      _none -> pid
    end
  end

  defp name(bridge), do: bridge
end
