defmodule DSPex.PythonBridge.Telemetry do
  @moduledoc """
  The events under `[:dspex, …]`, for hosts that have `:telemetry`; docs/telemetry.md lists them.

  The host's handlers run in the process that tells of something: the caller's, a bridge's, a
  monitor's. What is told is how long something took and how it ended, never what passed through it.
  """

  # The host brings it, or does not.
  @compile {:no_warn_undefined, :telemetry}

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Programs.Change

  @typedoc "A call that is under way; nil: of which nobody is told."
  @type span :: {started :: integer(), metadata :: map()} | nil

  ## Whether there is anybody to tell

  @doc """
  Looks whether the host has `:telemetry`, and remembers it: looking takes 16 µs where it is absent, a
  persistent term 2 ns. For the start of the application.
  """
  @spec look() :: boolean()
  def look do
    there? = Code.ensure_loaded?(:telemetry) and function_exported?(:telemetry, :execute, 3)
    :persistent_term.put(__MODULE__, there?)
    there?
  end

  @doc "The same for the start of a bridge, should the application not have been started."
  @spec look_once() :: boolean()
  def look_once do
    with nil <- :persistent_term.get(__MODULE__, nil), do: look()
  end

  defp there?, do: :persistent_term.get(__MODULE__, false)

  ## Events

  @doc "Tells of something, if there is anybody to tell; it never raises."
  @spec execute([atom()], map(), map()) :: :ok
  def execute(event, measurements, metadata) do
    if there?(), do: tell(event, measurements, metadata), else: :ok
  end

  # A handler that raises is telemetry's own affair. What gets here is a telemetry that the host has
  # stopped, or taken away.
  defp tell(event, measurements, metadata) do
    :telemetry.execute([:dspex | event], measurements, metadata)
    :ok
  catch
    _kind, _reason -> :ok
  end

  @doc "Tells of a loan, asked for at `started`, in native time."
  @spec checkout(term(), {:ok, atom()} | {:error, atom()}, integer()) :: :ok
  def checkout(pool, result, started) do
    if there?() do
      {bridge, result} = lent(result)
      metadata = %{pool: name(pool), bridge: bridge, result: result}
      tell([:pool, :checkout], %{duration: System.monotonic_time() - started}, metadata)
    else
      :ok
    end
  end

  defp lent({:ok, bridge}), do: {bridge, :ok}
  defp lent({:error, reason}), do: {nil, reason}

  ## Calls: a span each, as :telemetry.span/3 makes them

  @doc "Makes a call to a bridge or a pool, and tells of it."
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

  @doc "A call begins; to be followed by one of the next two."
  @spec begin(:bridge | :pool, term(), term(), term()) :: span()
  def begin(kind, server, command, args) do
    if there?() do
      metadata = %{
        bridge: nil,
        pool: nil,
        command: command(command),
        program_id: Change.program_id(command, args),
        telemetry_span_context: make_ref()
      }

      metadata = %{metadata | kind => name(server)}
      started = System.monotonic_time()
      measurements = %{monotonic_time: started, system_time: System.system_time()}
      tell([:bridge, :call, :start], measurements, metadata)
      {started, metadata}
    end
  end

  @doc "A call is over, with a result, an error, or because the caller had enough: `:cancelled`."
  @spec over(span(), tuple() | :cancelled) :: :ok
  def over(nil, _result), do: :ok

  def over({started, metadata}, result) do
    metadata = Map.put(metadata, :result, result_type(result))
    tell([:bridge, :call, :stop], since(started), metadata)
  end

  @doc "A call has ended by an exception in the caller's own code, which got a chunk."
  @spec failed(span(), :error | :exit | :throw, term(), Exception.stacktrace()) :: :ok
  def failed(nil, _kind, _reason, _stacktrace), do: :ok

  def failed({started, metadata}, kind, reason, stacktrace) do
    what = %{kind: kind, reason: kind_of(reason), stacktrace: without_args(stacktrace)}
    tell([:bridge, :call, :exception], since(started), Map.merge(metadata, what))
  end

  defp since(started) do
    now = System.monotonic_time()
    %{duration: now - started, monotonic_time: now}
  end

  defp result_type({:error, %Error{type: type}}), do: type
  defp result_type(:cancelled), do: :cancelled
  defp result_type(_ok), do: :ok

  # What was raised or thrown may have in it what the peer said.
  defp kind_of(%module{} = error) when is_exception(error), do: module
  defp kind_of(reason) when is_atom(reason), do: reason
  defp kind_of(reason) when is_tuple(reason) and is_atom(elem(reason, 0)), do: elem(reason, 0)
  defp kind_of(_contents), do: :other

  defp without_args(stacktrace) do
    Enum.map(stacktrace, fn
      {module, function, args, where} when is_list(args) ->
        {module, function, length(args), Keyword.drop(where, [:error_info])}

      {function, args, where} when is_list(args) ->
        {function, length(args), Keyword.drop(where, [:error_info])}

      entry ->
        entry
    end)
  end

  ## What a call is told by

  defp command(command) when is_atom(command), do: Atom.to_string(command)
  defp command(command) when is_binary(command), do: command
  defp command(_refused), do: nil

  # A process is told by its name, if it has one, as its own events are.
  defp name({name, node}) when node == node(), do: name

  defp name(pid) when is_pid(pid) and node(pid) == node() do
    case Process.info(pid, :registered_name) do
      {:registered_name, name} when is_atom(name) -> name
      _none -> pid
    end
  end

  defp name(server), do: server
end
