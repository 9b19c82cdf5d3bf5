defmodule DSPex.PythonBridge.Telemetry do
  @moduledoc """
  The events under `[:dspex, …]`, for applications with `:telemetry`; docs/telemetry.md lists them.

  Handlers run in the process that emits the event: a caller's, a bridge's, a monitor's. Events have durations and
  outcomes, never contents of requests or replies.
  """

  # Your application has it, or does not.
  @compile {:no_warn_undefined, :telemetry}

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Programs.Change
  alias DSPex.PythonBridge.Protocol.Payload

  @typedoc "A call that is running; nil without `:telemetry`."
  @type span :: {:bridge | :pool, started :: integer(), metadata :: map()} | nil

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

  @doc "The same for the start of a bridge, if the application was not started."
  @spec look_once() :: boolean()
  def look_once do
    with nil <- :persistent_term.get(__MODULE__, nil), do: look()
  end

  @compile {:inline, there?: 0}
  defp there?, do: :persistent_term.get(__MODULE__, false)

  ## Events

  @doc "Emits an event, if there is `:telemetry`; it never raises."
  @spec execute([atom()], map(), map()) :: :ok
  def execute(event, measurements, metadata) do
    if there?(), do: emit(event, measurements, metadata), else: :ok
  end

  # Handlers that raise are handled by :telemetry. This is for a :telemetry that was stopped, or removed.
  defp emit(event, measurements, metadata) do
    :telemetry.execute([:dspex | event], measurements, metadata)
    :ok
  catch
    _kind, _reason -> :ok
  end

  @doc "Emits the event of a checkout that was asked for at `started`, in native time."
  @spec checkout(term(), {:ok, atom()} | {:error, atom()}, integer()) :: :ok
  def checkout(pool, result, started) do
    if there?() do
      {bridge, result} =
        with {:ok, bridge} <- result, do: {bridge, :ok}, else: ({:error, reason} -> {nil, reason})

      metadata = %{pool: name(pool), bridge: bridge, result: result}
      emit([:pool, :checkout], %{duration: System.monotonic_time() - started}, metadata)
    else
      :ok
    end
  end

  ## Calls: a span each, as :telemetry.span/3 makes them

  @doc "Makes a call to a bridge or a pool, with its events."
  @spec call(:bridge | :pool, term(), term(), term(), (-> result)) :: result
        when result: {:ok, term(), term(), map()} | {:error, Error.t()}
  def call(kind, server, command, args, fun) do
    if there?(),
      do: observe(begin(kind, server, command, args), fun),
      else: fun.()
  end

  defp observe(span, fun) do
    result = fun.()
    over(span, result)
    result
  catch
    kind, reason ->
      failed(span, kind, reason, __STACKTRACE__)
      :erlang.raise(kind, reason, __STACKTRACE__)
  end

  @doc "Emits the start of a call; one of the next two functions emits its end."
  @spec begin(:bridge | :pool, term(), term(), term()) :: span()
  def begin(kind, server, command, args) do
    if there?() do
      metadata = %{
        bridge: nil,
        pool: nil,
        command: Payload.string(command),
        program_id: Change.program_id(command, args),
        telemetry_span_context: make_ref()
      }

      metadata = %{metadata | kind => name(server)}
      started = System.monotonic_time()
      measurements = %{monotonic_time: started, system_time: System.system_time()}
      emit([kind, :call, :start], measurements, metadata)
      {kind, started, metadata}
    end
  end

  @doc "Emits the end of a call: with a result or an error, or `:cancelled` by its caller."
  @spec over(span(), tuple() | :cancelled) :: :ok
  def over(nil, _result), do: :ok

  def over({kind, started, metadata}, result) do
    metadata = Map.put(metadata, :result, result_type(result))
    emit([kind, :call, :stop], since(started), metadata)
  end

  @doc "Emits the end of a call by an exception in the caller's code that takes the chunks."
  @spec failed(span(), :error | :exit | :throw, term(), Exception.stacktrace()) :: :ok
  def failed(nil, _kind, _reason, _stacktrace), do: :ok

  def failed({server, started, metadata}, kind, reason, stacktrace) do
    what = %{kind: kind, reason: kind_of(reason), stacktrace: ServerGuard.stacktrace(stacktrace)}
    emit([server, :call, :exception], since(started), Map.merge(metadata, what))
  end

  defp since(started) do
    now = System.monotonic_time()
    %{duration: now - started, monotonic_time: now}
  end

  defp result_type({:error, %Error{type: type}}), do: type
  defp result_type(:cancelled), do: :cancelled
  defp result_type(_ok), do: :ok

  # An exception may have contents of a reply.
  defp kind_of(%module{} = error) when is_exception(error), do: module
  defp kind_of(reason) when is_atom(reason), do: reason
  defp kind_of(reason) when is_tuple(reason) and is_atom(elem(reason, 0)), do: elem(reason, 0)
  defp kind_of(_contents), do: :other

  ## Metadata of a call

  # The name of a process, if it has one, as in its own events.
  defp name({name, node}) when node == node(), do: name

  defp name(pid) when is_pid(pid) and node(pid) == node() do
    case Process.info(pid, :registered_name) do
      {:registered_name, name} when is_atom(name) -> name
      _none -> pid
    end
  end

  defp name(server), do: server
end
