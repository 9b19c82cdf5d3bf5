defmodule DSPex.Test.PoolProbe do
  @moduledoc "Looks into a pool, on the node where it runs."

  alias DSPex.PythonBridge.{Bridge, Pool, Programs}
  alias DSPex.PythonBridge.Calls.{LoadCounters, Request}
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

  @doc "Removes all programs from the peers, of which the pool does not learn."
  def forget_all(pool) do
    for %{bridge: bridge} <- Pool.status(pool).peers do
      body = ~s(,"command":"cleanup","args":{}})
      send(bridge, {:request, %Request{body: body, timeout: 5_000}})
    end

    for programs <- programs(pool), do: 0 = Enum.count(programs)
    :ok
  end

  @doc "Checks out all peers in a process that lives until it is sent `:end`; gives it, and the results of the checkouts."
  def check_out_all(pool) do
    caller = self()

    borrower =
      spawn(fn ->
        send(
          caller,
          {:checked_out, self(), for(_ <- Pool.status(pool).peers, do: Pool.checkout(pool))}
        )

        receive do: (:end -> :ok)
      end)

    receive do
      {:checked_out, ^borrower, checkouts} -> {borrower, checkouts}
    after
      5_000 -> raise "nothing was checked out"
    end
  end
end
