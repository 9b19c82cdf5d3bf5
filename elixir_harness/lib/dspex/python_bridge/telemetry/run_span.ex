defmodule DSPex.PythonBridge.Telemetry.RunSpan do
  @moduledoc false
  # The whole of an evaluation or an optimization, which makes many calls: its events, a span as `:telemetry.span/3` makes
  # one with progress in between, and its state for `DSPex.PythonBridge.Top`.
  #
  # The state is in a table of the process that has asked for the run, and so ends with it, however it dies. Who looks
  # finds it among the node's tables: no process is asked, and none has to be told.

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.OTP.Registry
  alias DSPex.PythonBridge.Telemetry.{Metadata, Span}

  @enforce_keys [:table, :span]
  defstruct @enforce_keys

  @type kind :: :evaluate | :optimize
  @typedoc "A run that is under way."
  @opaque t :: %__MODULE__{table: :ets.table(), span: Span.t()}
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
        Span.exception(run.span, class, reason, __STACKTRACE__, figures(run))
        :erlang.raise(class, reason, __STACKTRACE__)
    else
      result ->
        type = with {:error, %Error{type: type}} <- result, do: type, else: (_ok -> :ok)
        Span.emit(run.span, :stop, figures(run), %{result: type})
        result
    after
      :ets.delete(run.table)
    end
  end

  @doc "Sets the figures of a run, and emits its `:progress`. In the process that runs it."
  @spec progress(t(), figures()) :: :ok
  def progress(%__MODULE__{} = run, figures) do
    update(run, figures)
    Span.emit(run.span, :progress, figures(run), %{})
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
    tables |> Enum.flat_map(&look/1) |> Enum.sort_by(& &1.elapsed_ms, :desc)
  end

  # It may have just begun, or end meanwhile.
  defp look(table) do
    with [{:run, caller, %Span{event: [kind]} = span}] <- :ets.lookup(table, :run),
         [{:figures, figures}] <- :ets.lookup(table, :figures) do
      duration = System.monotonic_time() - span.started
      elapsed_ms = System.convert_time_unit(duration, :native, :millisecond)
      about = %{kind: kind, caller: caller, metadata: span.metadata}
      [Map.merge(about, %{figures: figures, elapsed_ms: elapsed_ms})]
    end
  rescue
    ArgumentError -> []
  end

  defp begin(kind, server, about, figures) do
    of = if Registry.get(:pool, server), do: :pool, else: :bridge
    metadata = Map.merge(%{bridge: nil, pool: nil}, %{of => Metadata.name(server)})
    total = known(Map.take(figures, [:total]))
    span = Span.start([kind], Map.merge(metadata, about), total)
    table = :ets.new(__MODULE__, [:protected])
    :ets.insert(table, [{:run, self(), span}, {:figures, figures}])
    %__MODULE__{table: table, span: span}
  end

  defp figures(%__MODULE__{table: table}),
    do: table |> :ets.lookup_element(:figures, 2) |> known()

  defp known(figures), do: Map.reject(figures, fn {_name, value} -> value == nil end)
end
