defmodule DSPex.PythonBridge.Telemetry do
  @moduledoc """
  The events under `[:dspex, …]`, for applications with `:telemetry`; docs/telemetry.md lists them.

  Handlers run in the process that emits the event: a caller's, a bridge's, a monitor's. Events have durations,
  outcomes and token counts, never contents of requests or replies.
  """

  alias DSPex.PythonBridge.Telemetry.{DefaultLogger, Emitter, Metadata, Metrics}

  ## For applications

  @doc """
  Metrics of these events, for the reporters of `Telemetry.Metrics` and for LiveDashboard: counts, durations, tokens by
  program and by model, and what happens to peers. Raises if your application does not have `:telemetry_metrics`.

      def metrics, do: DSPex.PythonBridge.Telemetry.metrics() ++ [...]

  They are plain lists of structs: leave some out, or change their tags. A reporter that has those of `[:dspex, :lm, :stop]`
  makes peers report each LM call.
  """
  @spec metrics() :: [struct()]
  defdelegate metrics(), to: Metrics, as: :list

  @doc """
  Logs one line for each call that failed or was slow, and each time that calls are sent again after a peer's end, which
  the bridge logs itself. Lines have the name of the bridge or pool, the command, the program's id, the outcome and the
  tokens, and no contents.

  Options, or a level of Logger:

    * `:level` – by default `:warning`
    * `:min_duration` – how long a call takes that is slow, in ms; by default 10,000. With `:infinity` only failed calls
      are logged

  Returns `{:error, :already_exists}` if it is attached. Raises `ArgumentError` for a wrong option, and if your
  application does not have `:telemetry`.
  """
  @spec attach_default_logger(Logger.level() | keyword()) :: :ok | {:error, :already_exists}
  def attach_default_logger(opts \\ []), do: DefaultLogger.attach(opts)

  @doc "Stops what `attach_default_logger/1` has started."
  @spec detach_default_logger() :: :ok | {:error, :not_found}
  defdelegate detach_default_logger(), to: DefaultLogger, as: :detach

  ## Whether there is :telemetry

  @doc """
  Checks whether there is `:telemetry`, and remembers it: a check takes 16 µs if it is absent, a persistent term 2 ns.
  For the start of the application.
  """
  @spec look() :: boolean()
  defdelegate look(), to: Emitter

  # The same for the start of a bridge, if the application was not started.
  @doc false
  @spec look_once() :: boolean()
  defdelegate look_once(), to: Emitter

  ## Events, for the other modules

  # Emits an event, if there is `:telemetry`; it never raises.
  @doc false
  @spec execute([atom()], map(), map()) :: :ok
  defdelegate execute(event, measurements, metadata), to: Emitter

  # Emits the event of a checkout that was asked for at `started`, in native time.
  @doc false
  @spec checkout(term(), {:ok, atom()} | {:error, atom()}, integer()) :: :ok
  def checkout(pool, result, started) do
    if Emitter.there?() do
      {bridge, result} =
        with {:ok, bridge} <- result, do: {bridge, :ok}, else: ({:error, reason} -> {nil, reason})

      metadata = %{pool: Metadata.name(pool), bridge: bridge, result: result}
      Emitter.emit([:pool, :checkout], %{duration: System.monotonic_time() - started}, metadata)
    else
      :ok
    end
  end
end
