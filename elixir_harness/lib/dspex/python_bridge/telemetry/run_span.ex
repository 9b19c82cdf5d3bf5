defmodule DSPex.PythonBridge.Telemetry.RunSpan do
  @moduledoc false
  # The whole of an evaluation or an optimization, which makes many calls: its events, a span as `:telemetry.span/3` makes
  # one with progress in between, and its state for `DSPex.PythonBridge.Top`.
  #
  # The state is in a table of the process that has asked for the run, and so ends with it, however it dies. Who looks
  # finds it among the node's tables: no process is asked, and none has to be told.

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.OTP.Registry
  alias DSPex.PythonBridge.Telemetry.{Emitter, Metadata}

  @enforce_keys [:kind, :table, :started, :metadata]
  defstruct @enforce_keys

  @type kind :: :evaluate | :optimize
  @typedoc "A run that is under way. `started`: in native time."
  @opaque t :: %__MODULE__{
            kind: kind(),
            table: :ets.table(),
            started: integer(),
            metadata: map()
          }
  @typedoc """
  What its events say of it, in addition to the bridge or pool: `program_id`, a string or nil, `telemetry_metadata`, that
  of the caller, and what else its events have. Nothing of contents.
  """
  @type about :: %{
          required(:program_id) => String.t() | nil,
          required(:telemetry_metadata) => map(),
          optional(atom()) => term()
        }
  @typedoc """
  How far it is: `done` of `total`, the `score` so far (of an optimization the best), `failed`, `lm_calls` and whatever else
  its events measure. What is nil is not known, and missing in the events.
  """
  @type figures :: %{optional(atom()) => number() | nil}
  @type found :: %{
          kind: kind(),
          caller: pid(),
          metadata: map(),
          figures: figures(),
          elapsed_ms: non_neg_integer()
        }

  @doc """
  Calls `fun`, which makes the run, in the calling process, and emits its `:start` and its `:stop` or `:exception`:
  `[:dspex, :evaluate, :start]`, for example. The measurements of the last two are the run's last figures.
  """
  @spec run(kind(), server :: term(), about(), figures(), (t() -> result)) :: result
        when result: {:ok, term()} | {:error, Error.t()}
  def run(kind, server, about, figures, fun) do
    run = begin(kind, server, about, figures)

    try do
      fun.(run)
    catch
      class, reason ->
        what = Metadata.exception(class, reason, __STACKTRACE__)
        emit(run, :exception, measurements(run), what)
        :erlang.raise(class, reason, __STACKTRACE__)
    else
      result ->
        stop(run, result)
        result
    after
      :ets.delete(run.table)
    end
  end

  @doc "Sets the figures of a run, and emits its `:progress`. In the process that runs it."
  @spec progress(t(), figures()) :: :ok
  def progress(%__MODULE__{} = run, figures) do
    update(run, figures)
    emit(run, :progress, measurements(run), %{})
  end

  @doc "Sets the figures of a run without an event, such as those of its end. In the process that runs it."
  @spec update(t(), figures()) :: :ok
  def update(%__MODULE__{table: table}, figures) do
    :ets.insert(table, {:figures, figures})
    :ok
  end

  @doc "The runs of this node that are under way, in the order of their starts."
  @spec list() :: [found()]
  def list do
    tables = for table <- :ets.all(), :ets.info(table, :name) == __MODULE__, do: table
    tables |> Enum.flat_map(&look/1) |> Enum.sort_by(&elem(&1, 0)) |> Enum.map(&elem(&1, 1))
  end

  # It may have just begun, or end meanwhile.
  defp look(table) do
    with [{:run, kind, caller, started, metadata}] <- :ets.lookup(table, :run),
         [{:figures, figures}] <- :ets.lookup(table, :figures) do
      duration = Metadata.since(started).duration
      elapsed_ms = System.convert_time_unit(duration, :native, :millisecond)
      found = %{kind: kind, caller: caller, metadata: metadata, figures: figures}
      [{started, Map.put(found, :elapsed_ms, elapsed_ms)}]
    end
  rescue
    ArgumentError -> []
  end

  defp begin(kind, server, about, figures) do
    of = if Registry.get(:pool, server), do: :pool, else: :bridge

    metadata =
      %{bridge: nil, pool: nil, telemetry_span_context: make_ref()}
      |> Map.put(of, Metadata.name(server))
      |> Map.merge(about)

    measurements = Metadata.start()
    started = measurements.monotonic_time
    table = :ets.new(__MODULE__, [:protected])
    :ets.insert(table, [{:run, kind, self(), started, metadata}, {:figures, figures}])
    run = %__MODULE__{kind: kind, table: table, started: started, metadata: metadata}
    emit(run, :start, figures |> Map.take([:total]) |> known() |> Map.merge(measurements), %{})
    run
  end

  defp stop(run, result), do: emit(run, :stop, measurements(run), %{result: type(result)})

  defp type({:ok, _result}), do: :ok
  defp type({:error, %Error{type: type}}), do: type

  defp measurements(%__MODULE__{table: table, started: started}) do
    [{:figures, figures}] = :ets.lookup(table, :figures)
    Map.merge(known(figures), Metadata.since(started))
  end

  defp known(figures), do: Map.reject(figures, fn {_name, value} -> value == nil end)

  defp emit(run, name, measurements, more),
    do: Emitter.execute([run.kind, name], measurements, Map.merge(run.metadata, more))
end
