defmodule DSPex.PythonBridge.Telemetry.CallSpan do
  @moduledoc false
  # The events of a call: a span as `:telemetry.span/3` makes one, in the caller's process, with what a run has asked of
  # LMs.
  #
  # The peer counts that only if it is asked to, and is asked only for what a handler gets.

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.OTP.Registry
  alias DSPex.PythonBridge.Programs.{Body, Change}
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Telemetry.{Emitter, Metadata, Usage}

  @runs [:execute_program, "execute_program"]
  @lm_stop [:lm, :stop]
  # Of a run without a handler that wants to know it.
  @unknown %{program_type: nil, models: []}

  @enforce_keys [:kind, :server, :started, :metadata, :run?, :asked]
  defstruct @enforce_keys

  @typedoc """
  A call that is under way; nil without `:telemetry`. `metadata`: that of its start. `asked`: what the peer is asked to
  report of a run, as options of `DSPex.PythonBridge.Protocol.encode_body/3`.
  """
  @type t ::
          %__MODULE__{
            kind: kind(),
            server: term(),
            started: integer(),
            metadata: map(),
            run?: boolean(),
            asked: keyword()
          }
          | nil
  @type kind :: :bridge | :pool
  @type result :: {:ok, id :: term(), term(), meta :: map()} | {:error, Error.t()}

  @doc """
  Makes a call to a bridge or a pool, with its events. `fun` gets the options to make it with: `opts`, and what asks
  for that which handlers want to know.
  """
  @spec run(kind(), term(), term(), term(), keyword(), (keyword() -> result())) :: result()
  def run(kind, server, command, args, opts, fun) do
    if Emitter.there?(),
      do: observe(begin(kind, server, command, args, opts), fun),
      else: fun.(opts)
  end

  defp observe({span, opts}, fun) do
    over(span, fun.(opts))
  catch
    kind, reason ->
      failed(span, kind, reason, __STACKTRACE__)
      :erlang.raise(kind, reason, __STACKTRACE__)
  end

  @doc """
  Emits the start of a call; one of the next two functions emits its end. Returns the options to make it with, too, as
  `run/6` gives them to its function.
  """
  @spec begin(kind(), term(), term(), term(), keyword()) :: {t(), keyword()}
  def begin(kind, server, command, args, opts) do
    if Emitter.there?() do
      metadata = %{
        bridge: nil,
        pool: nil,
        command: Payload.string(command),
        program_id: Change.program_id(command, args),
        telemetry_metadata: of_caller(opts),
        telemetry_span_context: make_ref()
      }

      metadata = %{metadata | kind => Metadata.name(server)}
      run? = command in @runs
      asked = if run?, do: asked(kind), else: []
      measurements = Metadata.start()
      Emitter.emit(event(kind, :start), measurements, metadata)

      span = %__MODULE__{
        kind: kind,
        server: server,
        started: measurements.monotonic_time,
        metadata: metadata,
        run?: run?,
        asked: asked
      }

      {span, if(asked == [], do: opts, else: Keyword.merge(opts, asked))}
    else
      {nil, opts}
    end
  end

  defp event(kind, name), do: [kind, :call, name]

  defp of_caller([]), do: %{}
  defp of_caller(opts), do: Keyword.get(opts, :telemetry_metadata, %{})

  defp asked(kind) do
    attached = Emitter.attached()

    cond do
      @lm_stop in attached -> [meta: true, lm_events: true]
      event(kind, :stop) in attached -> [meta: true]
      true -> []
    end
  end

  @doc """
  Emits the end of a call: with a result or an error, or `:cancelled` by its caller. Returns the result for the caller,
  without what was only for the events.
  """
  @spec over(t(), result()) :: result()
  @spec over(t(), :cancelled) :: :cancelled
  def over(nil, result), do: result

  # The usual case: another command, or no handler.
  def over(%__MODULE__{asked: [], kind: kind, started: started} = span, result) do
    metadata = Map.put(span.metadata, :result, result_type(result))
    metadata = if span.run?, do: Map.merge(metadata, @unknown), else: metadata
    Emitter.emit(event(kind, :stop), Metadata.since(started), metadata)
    result
  end

  def over(%__MODULE__{} = span, result) do
    {result, lm_calls} = Usage.take_lm_calls(result)
    meta = Usage.meta(result)
    measurements = Metadata.since(span.started)
    Enum.each(lm_calls, &lm_call(span, Usage.lm_event(&1, measurements.monotonic_time, meta)))
    measurements = Map.merge(measurements, Usage.measurements(meta))
    of_run = %{program_type: program_type(span), models: Usage.models(meta)}
    metadata = span.metadata |> Map.put(:result, result_type(result)) |> Map.merge(of_run)
    Emitter.emit(event(span.kind, :stop), measurements, metadata)
    result
  end

  defp lm_call(span, {measurements, metadata}),
    do: Emitter.emit(@lm_stop, measurements, Map.merge(span.metadata, metadata))

  @doc "Emits the end of a call by an exception in the caller's code that takes the chunks."
  @spec failed(t(), :error | :exit | :throw, term(), Exception.stacktrace()) :: :ok
  def failed(nil, _kind, _reason, _stacktrace), do: :ok

  def failed(%__MODULE__{} = span, kind, reason, stacktrace) do
    metadata = Map.merge(span.metadata, Metadata.exception(kind, reason, stacktrace))
    Emitter.emit(event(span.kind, :exception), Metadata.since(span.started), metadata)
  end

  defp result_type({:error, %Error{type: type}}), do: type
  defp result_type(:cancelled), do: :cancelled
  defp result_type(_ok), do: :ok

  # As far as the program is known here.
  defp program_type(%{metadata: %{program_id: id}} = span) do
    with %{programs: table} <- id && Registry.get(span.kind, process(span)),
         do: Body.program_type(table, id),
         else: (_unknown -> nil)
  end

  # A pool has an entry under its name, too.
  defp process(%{kind: :pool, server: pool}), do: pool
  defp process(%{server: pid}) when is_pid(pid), do: pid

  defp process(%{server: server}) do
    GenServer.whereis(server)
  catch
    # Any term may be given as a server.
    _kind, _reason -> nil
  end
end
