defmodule DSPex.Test.PoolProbe do
  @moduledoc "Looks into a pool, on the node where it runs."

  alias DSPex.PythonBridge.{Bridge, Pool, Programs}
  alias DSPex.PythonBridge.Pool.Handle

  @doc "The coordinators of other nodes that calls may be sent to."
  def serving(pool), do: :ets.tab2list(Handle.fetch(pool).others)

  @doc "The ids of the programs in the pool's table."
  def known(pool),
    do:
      for({id, _stamp, _body} <- Programs.Store.definitions(Handle.fetch(pool).programs), do: id)

  @doc "What each peer tells of its programs."
  def programs(pool) do
    for %{bridge: bridge} <- Pool.status(pool).peers do
      {:ok, %{"programs" => programs}} = Bridge.call(bridge, :list_programs)
      programs
    end
  end

  @doc "Lends all peers to a process that lives until it is sent `:end`; gives it, and what was lent."
  def lend_all(pool) do
    caller = self()

    borrower =
      spawn(fn ->
        send(caller, {:lent, self(), for(_ <- Pool.status(pool).peers, do: Pool.checkout(pool))})
        receive do: (:end -> :ok)
      end)

    receive do
      {:lent, ^borrower, lent} -> {borrower, lent}
    after
      5_000 -> raise "nothing was lent"
    end
  end
end
