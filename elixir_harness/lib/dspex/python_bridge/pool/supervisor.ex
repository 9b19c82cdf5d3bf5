defmodule DSPex.PythonBridge.Pool.Supervisor do
  @moduledoc false
  # The processes of a pool: its bridges and their monitors, under a supervisor of their own, and its coordinator. This
  # supervisor owns the tables, so programs outlive all of them.
  #
  # The bridges start first, so they end last: see `DSPex.PythonBridge.Pool.Handle`. They have a `DynamicSupervisor`
  # since that ends its children all at once; one after another, each with its time to finish, they would take long.

  use Supervisor

  alias DSPex.PythonBridge.{Bridge, Monitor, Pool}
  alias DSPex.PythonBridge.Pool.{Coordinator, Handle, LoadCounters, Slot}

  # A peer's death ends no bridge. Bridges end when they are killed or crash; each may do so this often in 5 s before the
  # whole pool restarts.
  @deaths_per_bridge 20

  @doc "Starts the processes of a pool."
  @spec start_link(Pool.Options.t()) :: Supervisor.on_start()
  def start_link(%Pool.Options{name: name, stub?: stub?} = settings) do
    own = if stub?, do: Module.concat(name, "Supervisor"), else: name
    Supervisor.start_link(__MODULE__, settings, name: own)
  end

  @impl Supervisor
  def init(%Pool.Options{name: name, size: size} = settings) do
    handle = Handle.new(settings)
    Handle.publish(handle)

    bridges =
      {DynamicSupervisor,
       name: Handle.bridges_supervisor(name),
       strategy: :one_for_one,
       max_restarts: @deaths_per_bridge * size,
       max_seconds: 5}

    starter = %{id: :starter, start: {__MODULE__, :start_bridges, [handle]}}
    Supervisor.init([bridges, starter, {Coordinator, handle}], strategy: :rest_for_one)
  end

  @doc "Starts the bridges and their monitors under their supervisor. A step of the start, not a process."
  @spec start_bridges(Handle.t()) :: :ignore | {:error, term()}
  def start_bridges(%Handle{} = handle) do
    children =
      Enum.flat_map(LoadCounters.indexes(handle.counters), fn index ->
        [
          {Bridge, bridge_options(handle, index)},
          {Monitor,
           name: Handle.monitor(handle.name, index), bridge: Handle.bridge(handle, index)}
        ]
      end)

    Enum.find_value(children, :ignore, fn child ->
      case DynamicSupervisor.start_child(Handle.bridges_supervisor(handle.name), child) do
        {:ok, _pid} -> nil
        {:error, reason} -> {:error, reason}
      end
    end)
  end

  defp bridge_options(%Handle{settings: settings} = handle, index) do
    [
      name: Handle.bridge(handle, index),
      observer: {Slot, %Slot{handle: handle, index: index}},
      store: handle.programs,
      programs: []
    ] ++ settings.bridge
  end
end
