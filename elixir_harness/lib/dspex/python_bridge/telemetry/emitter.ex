defmodule DSPex.PythonBridge.Telemetry.Emitter do
  @moduledoc false
  # Whether the application has `:telemetry`, and what is called of it. Nothing here raises.

  # Your application has it, or does not.
  @compile {:no_warn_undefined, :telemetry}

  @doc "As `DSPex.PythonBridge.Telemetry.look/0`."
  @spec look() :: boolean()
  def look do
    there? = Code.ensure_loaded?(:telemetry) and function_exported?(:telemetry, :execute, 3)
    :persistent_term.put(__MODULE__, there?)
    there?
  end

  @doc "For the start of a bridge: as `look/0`, if the application was not started."
  @spec look_once() :: boolean()
  def look_once do
    with nil <- :persistent_term.get(__MODULE__, nil), do: look()
  end

  @doc "Whether there is `:telemetry`, as last looked."
  @spec there?() :: boolean()
  def there?, do: :persistent_term.get(__MODULE__, false)

  @doc "Emits an event, if there is `:telemetry`; it never raises."
  @spec execute([atom()], map(), map()) :: :ok
  def execute(event, measurements, metadata) do
    if there?(), do: emit(event, measurements, metadata), else: :ok
  end

  @doc "The same, if it is known that there is `:telemetry`."
  # Handlers that raise are handled by :telemetry. This is for a :telemetry that was stopped, or removed.
  @spec emit([atom()], map(), map()) :: :ok
  def emit(event, measurements, metadata) do
    :telemetry.execute([:dspex | event], measurements, metadata)
    :ok
  catch
    _kind, _reason -> :ok
  end

  @doc """
  The events, without their prefix, that have handlers. It is a look at all handlers: 1 µs, and 12 µs if there are 500.
  """
  @spec attached() :: [[atom()]]
  def attached do
    for %{event_name: [:dspex | event]} <- :telemetry.list_handlers([:dspex]), do: event
  catch
    _kind, _reason -> []
  end
end
