defmodule DSPex.PythonBridge.Pool.Handle do
  @moduledoc """
  What callers need to know of a pool, found by its name or its pid without asking a process.

  It is a persistent term from the pool's start until its coordinator ends in good order, which is before
  the bridges end: new calls are turned away while those under way are still answered.
  """

  alias DSPex.PythonBridge.{Pool, Programs}
  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.OTP.Registry

  @enforce_keys [:name, :pid, :bridges, :counters, :programs, :others, :checkouts, :settings]
  defstruct @enforce_keys

  @typedoc """
  `bridges`: their names, in the order of the slots. `others`: a table of the coordinators of other nodes
  that can serve, see `DSPex.PythonBridge.Pool.Cluster.Membership`. `checkouts`: see `DSPex.PythonBridge.Pool.Checkouts`.
  """
  @type t :: %__MODULE__{
          name: atom(),
          pid: pid(),
          bridges: tuple(),
          counters: LoadCounters.t(),
          programs: Programs.Store.table(),
          others: :ets.tid(),
          checkouts: :ets.tid(),
          settings: Pool.Options.t()
        }

  @doc "Everything that belongs to a new pool; its tables belong to the calling process."
  @spec new(Pool.Options.t()) :: t()
  def new(%Pool.Options{name: name, size: size} = settings) do
    %__MODULE__{
      name: name,
      pid: self(),
      bridges: List.to_tuple(for n <- 1..size, do: Module.concat(name, "Bridge#{n}")),
      counters: LoadCounters.new(size),
      programs: Programs.Store.new(),
      others: :ets.new(__MODULE__, [:public, read_concurrency: true]),
      checkouts: :ets.new(__MODULE__, [:public]),
      settings: settings
    }
  end

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

  @doc "Tells callers of the pool."
  @spec publish(t()) :: :ok
  def publish(%__MODULE__{} = handle) do
    Registry.put(:pool, handle.pid, handle)
    Registry.put(:pool, handle.name, handle)
  end

  @doc "Callers find the pool no more."
  @spec withdraw(t()) :: :ok
  def withdraw(%__MODULE__{} = handle) do
    Registry.delete(:pool, handle.pid)
    Registry.delete(:pool, handle.name)
  end

  @doc "What is known of the pool of this name or pid; nil if there is none on this node."
  @spec fetch(term()) :: t() | nil
  def fetch(pool) do
    # One that was killed has withdrawn nothing.
    with %__MODULE__{pid: pid} = handle <- Registry.get(:pool, pool),
         do: if(Process.alive?(pid), do: handle)
  end
end
