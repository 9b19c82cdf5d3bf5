defmodule DSPex.PythonBridge.Supervisor do
  @moduledoc """
  A supervisor of a bridge and its monitor, for your application's supervision tree:

      children = [
        {DSPex.PythonBridge.Supervisor, bridge: [lm: "openai/gpt-4o-mini"], monitor: [interval: 10_000]}
      ]

  Options: `:name` (default: this module, or `MyApp.Bridge.Supervisor` for a bridge of the name `MyApp.Bridge`), `:bridge` (options of the bridge, see `DSPex.PythonBridge.Options`),
  `:monitor` (options of its `DSPex.PythonBridge.Monitor`, whose name is `MyApp.Bridge.Monitor` then), `:programs` (as in the options of the bridge, where they may
  be instead):

      {DSPex.PythonBridge.Supervisor, programs: [%{id: "qa", signature: "question -> answer"}, MyApp.Triage]}

  The supervisor owns the definitions of programs: they survive the bridge. When it starts itself, there are those that
  are declared, and no others.
  """

  use Supervisor

  @whose "python bridge supervisor"

  alias DSPex.PythonBridge.{Bridge, Monitor, Options, Programs}
  alias DSPex.PythonBridge.Options.Table

  @doc """
  Starts both. A wrong option gives an error that names it: `{:error, %ArgumentError{}}` for an option of the
  supervisor, `{:error, {:shutdown, {:failed_to_start_child, id, %ArgumentError{}}}}` for one of a child.
  """
  @spec start_link(keyword()) :: Supervisor.on_start() | {:error, Exception.t()}
  def start_link(opts \\ []) do
    with {:ok, _checked} <- Table.check(opts, table(), @whose) do
      {name, opts} = opts |> seal() |> Keyword.pop(:name, named(opts, "Supervisor", __MODULE__))
      Supervisor.start_link(__MODULE__, opts, if(name, do: [name: name], else: []))
    end
  end

  @doc "The child specification; the id is the supervisor's name, or that of its bridge if it has none."
  @spec child_spec(keyword()) :: Supervisor.child_spec()
  def child_spec(opts) do
    id = opts[:name] || named(opts, "Supervisor", __MODULE__) || bridge_name(opts)
    %{id: id, start: {__MODULE__, :start_link, [seal(opts)]}, type: :supervisor}
  end

  # Several may run beside each other, each with a bridge of its own name.
  defp named(opts, suffix, default) do
    case bridge_name(opts) do
      Bridge -> default
      bridge when is_atom(bridge) -> Module.concat(bridge, suffix)
      _global_or_via -> nil
    end
  end

  # Wrong options are refused by start_link.
  defp bridge_name(opts),
    do: (Keyword.keyword?(opts[:bridge]) && opts[:bridge][:name]) || Bridge

  # The supervisor keeps them in its state, and its own supervisor in a child specification: both are printed in reports.
  defp seal(opts) do
    with sealed when is_list(sealed) <- Options.seal(opts) do
      Enum.map(sealed, fn
        {:bridge, bridge} -> {:bridge, Options.seal(bridge)}
        other -> other
      end)
    end
  end

  @impl Supervisor
  def init(opts) do
    bridge = Keyword.take(opts, [:programs]) ++ Keyword.get(opts, :bridge, [])
    {name, started} = with_table(bridge)
    monitor = Keyword.put_new(Keyword.get(opts, :monitor, []), :bridge, name)
    own_name = named(opts, "Monitor", Monitor)
    monitor = if own_name == Monitor, do: monitor, else: Keyword.put_new(monitor, :name, own_name)
    Supervisor.init([{Bridge, started}, {Monitor, monitor}], strategy: :one_for_one)
  end

  # The table belongs to this process, so it survives the bridge.
  defp with_table(bridge) do
    case Options.new(bridge, Bridge) do
      {:ok, %Options{name: name} = options} ->
        whose = {:bridge, name}
        store = Programs.Declared.store(options.programs.(), whose, options.max_frame_bytes)
        {name, [store: store, programs: []] ++ Keyword.delete(bridge, :programs)}

      # The bridge refuses it.
      {:error, _wrong} ->
        {Bridge, bridge}
    end
  end

  defp table, do: [name: :any, bridge: &bridge/1, monitor: :keyword, programs: &programs/1]

  defp bridge(bridge) do
    cond do
      not Keyword.keyword?(bridge) -> {:error, "expected a keyword list"}
      Keyword.get(bridge, :name, Bridge) == nil -> {:error, "needs a :name"}
      true -> :ok
    end
  end

  # In a child specification they are sealed.
  defp programs(sealed) when is_function(sealed, 0), do: programs(sealed.())
  defp programs(programs), do: with({:ok, _declared} <- Programs.Declared.new(programs), do: :ok)
end
