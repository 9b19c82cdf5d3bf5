defmodule DSPex.Test.PoolProbe do
  @moduledoc "Looks into a pool, on the node where it runs."

  alias DSPex.PythonBridge.{Bridge, Pool, Programs}
  alias DSPex.PythonBridge.Pool.LoadCounters
  alias DSPex.PythonBridge.Pool.Handle

  @doc "The coordinators of other nodes that calls may be sent to."
  def serving(pool), do: :ets.tab2list(Handle.fetch(pool).others)

  @doc "How many calls are counted in each slot."
  def busy(pool) do
    %{counters: counters} = Handle.fetch(pool)
    for index <- LoadCounters.indexes(counters), do: LoadCounters.busy(counters, index)
  end

  @doc "The ids of the programs in the pool's table."
  def known(pool),
    do:
      for({id, _stamp, _body} <- Programs.Store.definitions(Handle.fetch(pool).programs), do: id)

  @doc "The programs that each peer lists."
  def programs(pool) do
    for %{bridge: bridge} <- Pool.status(pool).peers do
      {:ok, %{"programs" => programs}} = Bridge.call(bridge, :list_programs)
      programs
    end
  end

  @doc "Makes the pool take its peers for ones that do not serve, until they start again or `serve_again/1`."
  def stop_serving(pool), do: put_state(pool, :down)

  @doc "Undoes `stop_serving/1`."
  def serve_again(pool), do: put_state(pool, :ready)

  defp put_state(pool, state) do
    %{counters: counters, name: name} = Handle.fetch(pool)

    for index <- LoadCounters.indexes(counters) do
      LoadCounters.put_state(counters, index, state)
      send(Handle.coordinator(name), {:slot, index, state})
    end

    _state = :sys.get_state(Handle.coordinator(name))
    :ok
  end
end
