defmodule DSPex.PythonBridge.Telemetry.CallSpan do
  @moduledoc false
  # The events of a call: a span in the caller's process, with what a run has asked of LMs.
  #
  # The peer counts that only if it is asked to, and is asked only for what a handler gets.

  alias DSPex.PythonBridge.{Error, Telemetry}
  alias DSPex.PythonBridge.OTP.{Registry, Server}
  alias DSPex.PythonBridge.Programs.{Body, Change}
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Telemetry.{Metadata, Span, Usage}

  @run "execute_program"
  @lm_stop [:lm, :stop]

  @typedoc """
  A call that is under way, and what the peer is asked to report of a run, as options of
  `DSPex.PythonBridge.Protocol.encode_body/3`; nil without `:telemetry`.
  """
  @type t :: {Span.t(), asked :: keyword()} | nil
  @type kind :: :bridge | :pool
  @type result :: {:ok, id :: term(), term(), meta :: map()} | {:error, Error.t()}

  @doc """
  Makes a call to a bridge or a pool, with its events. `fun` gets the options to make it with: `opts`, and what asks
  for that which handlers want to know.
  """
  @spec run(kind(), term(), term(), term(), keyword(), (keyword() -> result())) :: result()
  def run(kind, server, command, args, opts, fun) do
    {span, opts} = begin(kind, server, command, args, opts)

    try do
      fun.(opts)
    catch
      kind, reason ->
        failed(span, kind, reason, __STACKTRACE__)
        :erlang.raise(kind, reason, __STACKTRACE__)
    else
      result -> over(span, result)
    end
  end

  @doc """
  Emits the start of a call; one of the next two functions emits its end. Returns the options to make it with, too, as
  `run/6` gives them to its function.
  """
  @spec begin(kind(), term(), term(), term(), keyword()) :: {t(), keyword()}
  def begin(kind, server, command, args, opts) do
    if Telemetry.there?() do
      metadata = %{
        bridge: nil,
        pool: nil,
        command: Payload.string(command),
        program_id: Change.program_id(command, args),
        telemetry_metadata: Keyword.get(opts, :telemetry_metadata, %{})
      }

      span = Span.start([kind, :call], %{metadata | kind => Metadata.name(server)})
      asked = if metadata.command == @run, do: asked(kind), else: []
      {{span, asked}, Keyword.merge(opts, asked)}
    else
      {nil, opts}
    end
  end

  defp asked(kind) do
    attached = Telemetry.attached()

    cond do
      @lm_stop in attached -> [meta: true, lm_events: true]
      [kind, :call, :stop] in attached -> [meta: true]
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

  def over({span, asked}, result) do
    {result, meta, lm_calls} = Usage.take(result)
    # Unless it was asked for, nobody wants to know.
    meta = if asked != [], do: meta
    now = System.monotonic_time()

    for lm_call <- lm_calls do
      {measurements, metadata} = Usage.lm_event(lm_call, now, meta)
      Telemetry.execute(@lm_stop, measurements, Map.merge(span.metadata, metadata))
    end

    of_run =
      if span.metadata.command == @run,
        do: %{program_type: if(asked != [], do: program_type(span)), models: Usage.models(meta)},
        else: %{}

    Span.emit(span, :stop, Usage.measurements(meta), Map.put(of_run, :result, type(result)))
    result
  end

  @doc "Emits the end of a call by an exception in the caller's code that takes the chunks."
  @spec failed(t(), :error | :exit | :throw, term(), Exception.stacktrace()) :: :ok
  def failed(nil, _kind, _reason, _stacktrace), do: :ok

  def failed({span, _}, kind, reason, stack), do: Span.exception(span, kind, reason, stack)

  defp type({:error, %Error{type: type}}), do: type
  defp type(:cancelled), do: :cancelled
  defp type(_ok), do: :ok

  # As far as the program is known here.
  defp program_type(%Span{event: [kind | _], metadata: %{program_id: id} = metadata}) do
    with %{programs: table} <- id && Registry.get(kind, Server.whereis(metadata[kind])),
         do: Body.program_type(table, id),
         else: (_unknown -> nil)
  end
end
