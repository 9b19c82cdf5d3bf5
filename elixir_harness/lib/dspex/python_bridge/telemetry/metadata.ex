defmodule DSPex.PythonBridge.Telemetry.Metadata do
  @moduledoc false
  # What the events of several kinds have in common.

  alias DSPex.PythonBridge.OTP.ServerGuard

  @doc "The measurements of the end of a span that began at `started`, in native time."
  @spec since(integer()) :: %{duration: integer(), monotonic_time: integer()}
  def since(started) do
    now = System.monotonic_time()
    %{duration: now - started, monotonic_time: now}
  end

  @doc "The measurements of the start of a span, in native time."
  @spec start() :: %{monotonic_time: integer(), system_time: integer()}
  def start, do: %{monotonic_time: System.monotonic_time(), system_time: System.system_time()}

  @doc "The metadata of a span that ends by an exception: without contents."
  @spec exception(:error | :exit | :throw, term(), Exception.stacktrace()) :: map()
  def exception(kind, reason, stacktrace),
    do: %{kind: kind, reason: reason(reason), stacktrace: ServerGuard.stacktrace(stacktrace)}

  @doc "What can be said of a reason: an exception may have contents of a call."
  @spec reason(term()) :: atom()
  def reason(%module{} = error) when is_exception(error), do: module
  def reason(reason) when is_atom(reason), do: reason
  def reason(reason) when is_tuple(reason) and is_atom(elem(reason, 0)), do: elem(reason, 0)
  def reason(_contents), do: :other

  @doc "The name of a process, if it has one, as in its own events."
  @spec name(term()) :: term()
  def name({name, node}) when node == node(), do: name

  def name(pid) when is_pid(pid) and node(pid) == node() do
    case Process.info(pid, :registered_name) do
      {:registered_name, name} when is_atom(name) -> name
      _none -> pid
    end
  end

  def name(server), do: server
end
