defmodule DSPex.PythonBridge.Telemetry do
  @moduledoc """
  The events under `[:dspex, …]`, for applications with `:telemetry`; docs/telemetry.md lists them.

  Handlers run in the process that emits the event: a caller's, a bridge's, a monitor's. Events have durations,
  outcomes and token counts, never contents of requests or replies.
  """

  # Your application has it, or does not.
  @compile {:no_warn_undefined, :telemetry}

  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Telemetry.{DefaultLogger, Metadata, Metrics}

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
  def attach_default_logger(opts \\ [])
  def attach_default_logger(level) when is_atom(level), do: attach_default_logger(level: level)

  def attach_default_logger(opts) do
    level = {:test, &(&1 in Logger.levels()), "a level of Logger, such as :info"}
    ms? = &(&1 == :infinity or (is_integer(&1) and &1 >= 0))
    ms = {:test, ms?, "a number of ms, or :infinity"}
    table = [level: {level, :warning}, min_duration: {ms, 10_000}]

    case {Table.check(opts, table, "attach_default_logger"), look()} do
      {{:ok, opts}, true} ->
        :telemetry.attach_many(
          DefaultLogger,
          DefaultLogger.events(),
          &DefaultLogger.handle/4,
          Map.new(opts)
        )

      {{:ok, _opts}, false} ->
        raise "DSPex.PythonBridge.Telemetry.attach_default_logger/1 needs :telemetry: " <>
                "add {:telemetry, \"~> 1.0\"} to the dependencies of your application"

      {{:error, error}, _there?} ->
        raise error
    end
  end

  @doc "Stops what `attach_default_logger/1` has started."
  @spec detach_default_logger() :: :ok | {:error, :not_found}
  def detach_default_logger,
    do: if(there?(), do: :telemetry.detach(DefaultLogger), else: {:error, :not_found})

  ## Whether there is :telemetry

  @doc """
  Checks whether there is `:telemetry`, and remembers it: a check takes 16 µs if it is absent, a persistent term 2 ns.
  For the start of the application.
  """
  @spec look() :: boolean()
  def look do
    there? = Code.ensure_loaded?(:telemetry) and function_exported?(:telemetry, :execute, 3)
    :persistent_term.put(__MODULE__, there?)
    there?
  end

  # The same for the start of a bridge, if the application was not started.
  @doc false
  @spec look_once() :: boolean()
  def look_once, do: with(nil <- :persistent_term.get(__MODULE__, nil), do: look())

  @doc false
  @spec there?() :: boolean()
  def there?, do: :persistent_term.get(__MODULE__, false)

  ## Events, for the other modules

  # Emits an event, if there is `:telemetry`. Handlers that raise are handled by :telemetry; this one does not raise if that was
  # stopped, or removed.
  @doc false
  @spec execute([atom()], map(), map()) :: :ok
  def execute(event, measurements, metadata) do
    if there?(), do: :telemetry.execute([:dspex | event], measurements, metadata)
    :ok
  catch
    _kind, _reason -> :ok
  end

  # The events, without their prefix, that have handlers. It is a look at all handlers: 1 µs, and 12 µs if there are 500.
  @doc false
  @spec attached() :: [[atom()]]
  def attached do
    for %{event_name: [:dspex | event]} <- :telemetry.list_handlers([:dspex]), do: event
  catch
    _kind, _reason -> []
  end

  # Emits the event of a checkout that was asked for at `started`, in native time.
  @doc false
  @spec checkout(term(), {:ok, atom()} | {:error, atom()}, integer()) :: :ok
  def checkout(pool, result, started) do
    {bridge, result} =
      with {:ok, bridge} <- result, do: {bridge, :ok}, else: ({:error, reason} -> {nil, reason})

    metadata = %{pool: Metadata.name(pool), bridge: bridge, result: result}
    execute([:pool, :checkout], %{duration: System.monotonic_time() - started}, metadata)
  end
end
