defmodule DSPex.PythonBridge.Telemetry do
  @moduledoc """
  The events under `[:dspex, …]`, for applications with `:telemetry`; docs/telemetry.md lists them.

  Handlers run in the process that emits the event: a caller's, a bridge's, a monitor's. Events have durations,
  outcomes and token counts, never contents of requests or replies.
  """

  alias DSPex.PythonBridge.Telemetry.{CallSpan, Emitter}

  ## Whether there is :telemetry

  @doc """
  Checks whether there is `:telemetry`, and remembers it: a check takes 16 µs if it is absent, a persistent term 2 ns.
  For the start of the application.
  """
  @spec look() :: boolean()
  defdelegate look(), to: Emitter

  @doc "The same for the start of a bridge, if the application was not started."
  @spec look_once() :: boolean()
  defdelegate look_once(), to: Emitter

  ## Events

  @doc "Emits an event, if there is `:telemetry`; it never raises."
  @spec execute([atom()], map(), map()) :: :ok
  defdelegate execute(event, measurements, metadata), to: Emitter

  @doc "Emits the event of a checkout that was asked for at `started`, in native time."
  @spec checkout(term(), {:ok, atom()} | {:error, atom()}, integer()) :: :ok
  def checkout(pool, result, started) do
    if Emitter.there?() do
      {bridge, result} =
        with {:ok, bridge} <- result, do: {bridge, :ok}, else: ({:error, reason} -> {nil, reason})

      metadata = %{pool: CallSpan.name(pool), bridge: bridge, result: result}
      Emitter.emit([:pool, :checkout], %{duration: System.monotonic_time() - started}, metadata)
    else
      :ok
    end
  end
end
