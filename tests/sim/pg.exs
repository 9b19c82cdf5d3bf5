defmodule Sim.Pg do
  @moduledoc """
  OTP's `:pg` as far as the cluster uses it: one scope of one group on each node. The processes of the scope find each other when
  nodes meet, tell each other their members, and report joins and leaves to those who monitor the group.
  """

  alias Sim.{Net, Runtime, World}

  @group "sim"

  defp scope(node), do: Net.get({:pg, node})
  defp save(node, scope), do: Net.put({:pg, node}, scope)

  def start(node) do
    if scope(node) do
      {:error, {:already_started, self()}}
    else
      save(node, %{local: [], monitors: [], remote: %{}, watched_by: []})
      for other <- Net.known(node), do: tell(node, other, {:discover, node})
      {:ok, self()}
    end
  end

  @doc "Monitors the process of the scope."
  def watch(node, ref, pid, tag), do: update(node, &%{&1 | watched_by: [{ref, pid, tag} | &1.watched_by]})

  def monitor(node, pid) do
    ref = make_ref()
    update(node, &%{&1 | monitors: [{ref, pid} | &1.monitors]})
    {ref, members(node)}
  end

  def join(node, pid) do
    update(node, &%{&1 | local: [pid | &1.local]})
    report(node, :join, [pid])
    for other <- Map.keys(scope(node).remote), do: tell(node, other, {:join, node, [pid]})
    :ok
  end

  def members(node) do
    %{local: local, remote: remote} = scope(node)
    local ++ Enum.flat_map(remote, fn {_node, pids} -> pids end)
  end

  @doc "A process has ended: it leaves."
  def ended(node, pid) do
    with %{local: local} when local != [] <- scope(node), true <- pid in local do
      update(node, &%{&1 | local: &1.local -- [pid], monitors: Enum.reject(&1.monitors, fn {_, p} -> p == pid end)})
      update(node, &%{&1 | watched_by: Enum.reject(&1.watched_by, fn {_, p, _} -> p == pid end)})
      report(node, :leave, [pid])
      for other <- Map.keys(scope(node).remote), do: tell(node, other, {:leave, node, [pid]})
    end
  end

  def nodeup(node, other), do: if(scope(node), do: tell(node, other, {:discover, node}))

  def nodedown(node, other) do
    with %{remote: %{^other => pids}} <- scope(node) do
      update(node, &%{&1 | remote: Map.delete(&1.remote, other)})
      report(node, :leave, pids)
    end
  end

  def received(node, message), do: if(scope(node), do: take(node, message))

  defp take(node, {:discover, other}) do
    tell(node, other, {:sync, node, scope(node).local})

    unless is_map_key(scope(node).remote, other) do
      update(node, &%{&1 | remote: Map.put(&1.remote, other, [])})
      tell(node, other, {:discover, node})
    end
  end

  defp take(node, {:sync, other, pids}) do
    before = Map.get(scope(node).remote, other, [])
    update(node, &%{&1 | remote: Map.put(&1.remote, other, pids)})
    report(node, :leave, before -- pids)
    report(node, :join, pids -- before)
  end

  defp take(node, {:join, other, pids}) do
    with %{remote: %{^other => there}} <- scope(node) do
      update(node, &%{&1 | remote: Map.put(&1.remote, other, pids ++ there)})
      report(node, :join, pids)
    end
  end

  defp take(node, {:leave, other, pids}) do
    with %{remote: %{^other => there}} <- scope(node) do
      update(node, &%{&1 | remote: Map.put(&1.remote, other, there -- pids)})
      report(node, :leave, pids)
    end
  end


  defp update(node, fun), do: save(node, fun.(scope(node)))
  defp tell(node, other, message), do: Net.transmit(node, other, :pg, :erlang.external_size(message), {:pg, other, message})

  defp report(_node, _change, []), do: :ok

  defp report(node, change, pids) do
    for {ref, pid} <- scope(node).monitors, World.alive?(pid), do: Runtime.deliver(node, pid, {ref, change, @group, pids})
  end
end
