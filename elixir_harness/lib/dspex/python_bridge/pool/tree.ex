defmodule DSPex.PythonBridge.Pool.Tree do
  @moduledoc """
  The processes of a pool: its bridges and their monitors, below a supervisor of their own, and its keeper. This
  supervisor owns the tables, so that programs and loans outlive all of them.

  The bridges come first, so that they end last: see `DSPex.PythonBridge.Pool.Info`. Theirs is a
  `DynamicSupervisor` since that ends its children all at once; one after another, each with its
  time to finish, they would take long.
  """

  use Supervisor

  alias DSPex.PythonBridge.{Bridge, Monitor}
  alias DSPex.PythonBridge.Pool.{Info, Keeper, Settings, Slots}

  # A peer's death ends no bridge. Bridges themselves end when something kills them, or by a defect;
  # each of them may do so this often in 5 s before the whole pool starts anew.
  @deaths_per_bridge 20

  @doc "Starts the processes of a pool."
  @spec start_link(Settings.t()) :: Supervisor.on_start()
  def start_link(%Settings{name: name} = settings),
    do: Supervisor.start_link(__MODULE__, settings, name: name)

  @impl Supervisor
  def init(%Settings{name: name, size: size} = settings) do
    info = Info.new(settings)
    Info.publish(info)

    bridges =
      {DynamicSupervisor,
       name: Info.bridges_supervisor(name),
       strategy: :one_for_one,
       max_restarts: @deaths_per_bridge * size,
       max_seconds: 5}

    starter = %{id: :starter, start: {__MODULE__, :start_bridges, [info]}}
    Supervisor.init([bridges, starter, {Keeper, info}], strategy: :rest_for_one)
  end

  @doc "Starts the bridges and their monitors below their supervisor. No process of its own: a step in the start."
  @spec start_bridges(Info.t()) :: :ignore | {:error, term()}
  def start_bridges(%Info{} = info) do
    children =
      Enum.flat_map(Slots.indexes(info.slots), fn index ->
        [
          {Bridge, bridge_options(info, index)},
          {Monitor, name: Info.monitor(info.name, index), bridge: Info.bridge(info, index)}
        ]
      end)

    Enum.find_value(children, :ignore, fn child ->
      case DynamicSupervisor.start_child(Info.bridges_supervisor(info.name), child) do
        {:ok, _pid} -> nil
        {:error, reason} -> {:error, reason}
      end
    end)
  end

  defp bridge_options(%Info{settings: settings} = info, index) do
    [
      name: Info.bridge(info, index),
      slot: {info.slots, index, Info.keeper(info.name), Info.monitor(info.name, index)},
      programs: info.programs
    ] ++ settings.bridge
  end
end
