defmodule DSPex.PythonBridge.Pool.Handle do
  @moduledoc false
  # What callers need to know about a pool: a persistent term, found by the pool's name or pid without asking a process.
  #
  # It is there from the pool's start until its coordinator ends in order, which is before the bridges end: new calls are
  # refused while those under way are still answered.

  alias DSPex.PythonBridge.{Pool, Programs}
  alias DSPex.PythonBridge.OTP.Registry
  alias DSPex.PythonBridge.Pool.LoadCounters

  @enforce_keys [:name, :pid, :bridges, :counters, :programs, :others, :spent, :settings]
  defstruct @enforce_keys

  @typedoc """
  `bridges`: their names, in the order of the slots. `others`: a table of the coordinators of other nodes that can
  serve, with numbers that grow (`DSPex.PythonBridge.Pool.Cluster`). `spent`: that of `DSPex.PythonBridge.Pool.Budgets`.
  """
  @type t :: %__MODULE__{
          name: atom(),
          pid: pid(),
          bridges: tuple(),
          counters: LoadCounters.t(),
          programs: Programs.Store.table(),
          others: :ets.tid(),
          spent: :ets.tid(),
          settings: Pool.Options.t()
        }

  @doc "The handle of a new pool, whose tables belong to the calling process."
  @spec new(Pool.Options.t()) :: t()
  def new(%Pool.Options{name: name, size: size} = settings) do
    %__MODULE__{
      name: name,
      pid: self(),
      bridges: bridges(settings),
      counters: LoadCounters.new(size),
      programs: declared(settings),
      others: :ets.new(__MODULE__, [:public, read_concurrency: true]),
      spent: :ets.new(__MODULE__, [:public, write_concurrency: true]),
      settings: settings
    }
  end

  defp bridges(%Pool.Options{name: name, stub?: true}), do: {name}

  defp bridges(%Pool.Options{name: name, size: size}),
    do: List.to_tuple(for n <- 1..size, do: Module.concat(name, "Bridge#{n}"))

  defp declared(%Pool.Options{name: name} = settings),
    do: Programs.Declared.store(settings.programs.(), {:pool, name}, settings.max_frame_bytes)

  @doc "The name of the bridge of a slot."
  @spec bridge(t(), LoadCounters.index()) :: atom()
  def bridge(%__MODULE__{bridges: bridges}, index), do: elem(bridges, index - 1)

  @doc "The name of the monitor of a slot's bridge."
  @spec monitor(atom(), LoadCounters.index()) :: atom()
  def monitor(name, index), do: Module.concat(name, "Monitor#{index}")

  @doc "The name of the coordinator."
  @spec coordinator(atom()) :: atom()
  def coordinator(name), do: Module.concat(name, "Coordinator")

  @doc "The name of the supervisor of the bridges."
  @spec bridges_supervisor(atom()) :: atom()
  def bridges_supervisor(name), do: Module.concat(name, "Bridges")

  @doc "Has the peers of all bridges follow what the table has of these programs."
  @spec tell_bridges(t(), :all | [Programs.Store.id()] | Programs.Store.id()) :: :ok
  def tell_bridges(%__MODULE__{bridges: bridges}, ids) do
    ids = if ids == :all, do: :all, else: List.wrap(ids)

    for name <- Tuple.to_list(bridges),
        ids != [],
        bridge = Process.whereis(name),
        do: send(bridge, {:changed, ids})

    :ok
  end

  @doc "Makes the pool known to callers."
  @spec publish(t()) :: :ok
  def publish(%__MODULE__{} = handle) do
    Registry.put(:pool, handle.pid, handle)
    Registry.put(:pool, handle.name, handle)
  end

  @doc "From now on callers do not find the pool."
  @spec withdraw(t()) :: :ok
  def withdraw(%__MODULE__{} = handle) do
    Registry.delete(:pool, handle.pid)
    Registry.delete(:pool, handle.name)
  end

  @doc "The handle of the pool of this name or pid; nil if there is none on this node."
  @spec fetch(term()) :: t() | nil
  def fetch(pool) do
    # A pool that was killed has not withdrawn its handle.
    with %__MODULE__{pid: pid} = handle <- Registry.get(:pool, pool),
         do: if(Process.alive?(pid), do: handle)
  end
end
