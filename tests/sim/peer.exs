defmodule Sim.Peer do
  @moduledoc """
  The stand-in for a bridge with its Python peer: it takes the messages of a bridge, knows programs, and needs time. Its peer may die,
  and is started again with the programs of the table. What it knows is also in `World.fact({:peer, node, index})`.
  """

  alias DSPex.PythonBridge.Calls.Request
  alias Sim.{Runtime, World}

  # What such work takes on a real peer; a run is an LM's answer. What another bridge has changed is only noted.
  @start_ms 1_500
  @change_ms 3
  @max_pending 2_000

  defstruct [:handle, :index, :coordinator, :service_ms, up?: false, life: 0, programs: %{}, calls: %{}, changes: :queue.new(), busy?: false, staying: %{}]

  def start(handle, index, name, coordinator, service_ms) do
    pid = Runtime.spawn(fn -> init(handle, index, coordinator, service_ms) end)
    Runtime.register(name, pid)
    pid
  end

  defp init(handle, index, coordinator, service_ms) do
    counters(:put_state, [handle.counters, index, :down])
    counters(:put_calls, [handle.counters, index, 0, false])
    loop(open(%__MODULE__{handle: handle, index: index, coordinator: coordinator, service_ms: service_ms}))
  end

  defp loop(peer) do
    receive do
      message -> message |> handle(peer) |> show_load() |> loop()
    after
      0 -> Runtime.wait(:infinity) && loop(peer)
    end
  end

  defp module(name), do: Module.concat(World.here().prefix, name)
  defp store(fun, args), do: apply(module("Programs.Store"), fun, args)
  defp counters(fun, args), do: apply(module("Pool.LoadCounters"), fun, args)

  ## The load, as a bridge shows it

  defp show_load(peer) do
    counters(:put_calls, [peer.handle.counters, peer.index, map_size(peer.calls), false])
    peer
  end

  ## The peer's life

  defp open(peer) do
    later(@start_ms + :rand.uniform(@start_ms), {:started, peer.life})
    peer
  end

  defp handle({:timeout, _timer, {:started, life}}, %{life: life} = peer) do
    programs = for {id, _stamp, body} <- store(:definitions, [peer.handle.programs]), into: %{}, do: {id, body}
    set(peer, :ready)
    peer = know(%{peer | programs: programs, up?: true})
    Enum.reduce(peer.staying, peer, fn {_ref, request}, peer -> handle({:request, request}, peer) end)
  end

  defp handle(:die, %{up?: true} = peer) do
    set(peer, :down)
    for {ref, watch} <- peer.calls,
        do: if(peer.staying[ref], do: Runtime.demonitor(watch), else: finish(peer, ref, {:error, {:died, :sent}}))

    for %Request{ref: ref} <- :queue.to_list(peer.changes), do: Runtime.send(ref, {ref, {:error, {:died, :sent}}})
    open(know(%{peer | up?: false, life: peer.life + 1, programs: %{}, calls: %{}, changes: :queue.new(), busy?: false}))
  end

  defp handle(:die, peer), do: peer

  ## Requests

  # Its caller leaves it to the bridge, which is not made to count deaths here.
  defp handle({:request, %Request{resend: :bridge} = request}, peer) when not is_map_key(peer.staying, request.ref),
    do: handle({:request, request}, %{peer | staying: Map.put(peer.staying, request.ref, request)})

  defp handle({:request, %Request{resend: :bridge}}, %{up?: false} = peer), do: peer
  defp handle({:request, request}, %{up?: false} = peer), do: refuse(peer, request, {:died, :unsent})

  defp handle({:request, %Request{change: nil} = request}, peer) do
    if map_size(peer.calls) >= @max_pending do
      refuse(peer, request, :overloaded)
    else
      watch = Runtime.monitor(:process, request.pid)
      {from, to} = peer.service_ms
      later(from + :rand.uniform(to - from), {:run, peer.life, request.ref, request.body})
      %{peer | calls: Map.put(peer.calls, request.ref, watch)}
    end
  end

  defp handle({:request, %Request{change: {kind, ids, nil}} = request}, peer) do
    request = %{request | change: {kind, ids, store(:stamp, [peer.handle.programs, ids])}}
    change_next(know(%{peer | changes: :queue.in(request, peer.changes)}))
  end

  # They are made in the order in which they come: what the table has now.
  defp handle({:changed, ids}, %{up?: true} = peer) do
    programs = for {id, _stamp, body} <- store(:definitions, [peer.handle.programs]), into: %{}, do: {id, body}
    told = if ids == :all, do: {:told, programs}, else: {:told, ids, Map.take(programs, ids)}
    change_next(know(%{peer | changes: :queue.in(told, peer.changes)}))
  end

  defp handle({:changed, _ids}, peer), do: peer

  defp handle({:timeout, _timer, {:run, life, ref, body}}, %{life: life} = peer) when is_map_key(peer.calls, ref) do
    {:ok, %{"args" => %{"program_id" => id}}} = JSON.decode("{" <> binary_part(body, 1, byte_size(body) - 1))
    finish(peer, ref, {:frame, run(peer.programs[id], id)})
    %{peer | calls: Map.delete(peer.calls, ref), staying: Map.delete(peer.staying, ref)}
  end

  defp handle({:timeout, _timer, {:change, life}}, %{life: life} = peer) do
    {{:value, request}, changes} = :queue.out(peer.changes)
    made? = made?(request, peer.index)
    programs = if made?, do: change(peer.programs, request), else: peer.programs
    with %Request{} <- request, do: answer(peer, request, made?)
    change_next(know(%{peer | changes: changes, programs: programs, busy?: false}))
  end

  # A change goes on.
  defp handle({:abandon, ref}, peer), do: drop(peer, ref)

  defp handle({:DOWN, watch, :process, _pid, _reason}, peer), do: drop(peer, Enum.find_value(peer.calls, fn {ref, w} -> w == watch && ref end))

  # Of an earlier peer.
  defp handle({:timeout, _timer, _what}, peer), do: peer

  defp drop(peer, ref) when is_map_key(peer.calls, ref) do
    finish(peer, ref, {:error, :timeout})
    %{peer | calls: Map.delete(peer.calls, ref), staying: Map.delete(peer.staying, ref)}
  end

  defp drop(peer, ref), do: %{peer | staying: Map.delete(peer.staying, ref)}

  defp refuse(peer, request, why) do
    Runtime.send(request.ref, {request.ref, {:error, why}})
    peer
  end

  defp finish(peer, ref, reply) do
    Runtime.demonitor(peer.calls[ref])
    Runtime.send(ref, {ref, reply})
  end

  defp run(nil, id), do: ~s({"id": 1, "success": false, "error": "Program not found: #{id}", "error_type": "program_not_found"})
  defp run(_body, _id), do: ~s({"id": 1, "success": true, "result": {"node": "#{Runtime.node()}"}})

  ## Changes

  defp change_next(%{up?: true, busy?: false} = peer) do
    case :queue.peek(peer.changes) do
      :empty -> peer
      {:value, %Request{}} -> later(@change_ms, {:change, peer.life}) && %{peer | busy?: true}
      {:value, _told} -> later(0, {:change, peer.life}) && %{peer | busy?: true}
    end
  end

  defp change_next(peer), do: peer

  # As a bridge: into the table, to all bridges and the coordinator, to the caller.
  defp answer(peer, request, true) do
    store(:apply_change, [peer.handle.programs, request.change, request.body])
    {_kind, ids, _stamp} = request.change
    apply(module("Pool.Handle"), :tell_bridges, [peer.handle, ids])
    report(peer, {:changed, request.change, request.body})
    reply(request, ~s({"id": 1, "success": true, "result": {}}))
  end

  defp answer(_peer, request, false), do: reply(request, ~s({"id": 1, "success": false, "error": "no", "error_type": "invalid_args"}))

  defp reply(request, frame), do: Runtime.send(request.ref, {request.ref, {:frame, frame}})

  # A definition that says so is refused by the first peer of a node.
  defp made?(%Request{change: {:create, _, _}, body: body}, index), do: not (index == 1 and String.contains?(body, "refused on #{Runtime.node()}"))
  defp made?(_request, _index), do: true

  defp change(programs, %Request{change: {:create, id, _stamp}, body: body}), do: Map.put(programs, id, body)
  defp change(_programs, %Request{change: {:cleanup, :all, _stamp}}), do: %{}
  defp change(programs, %Request{change: {:cleanup, ids, _stamp}}), do: Map.drop(programs, ids)
  defp change(_programs, {:told, all}), do: all
  defp change(programs, {:told, ids, now}), do: programs |> Map.drop(ids) |> Map.merge(now)

  defp know(peer) do
    World.note({:peer, Runtime.node(), peer.index}, peer.programs)
    World.note({:changing, Runtime.node(), peer.index}, not :queue.is_empty(peer.changes))
    peer
  end

  defp set(peer, state) do
    counters(:put_state, [peer.handle.counters, peer.index, state])
    report(peer, {:slot, peer.index, state})
  end

  defp report(peer, message), do: with(pid when pid != nil <- Runtime.whereis(peer.coordinator), do: Runtime.send(pid, message))

  defp later(ms, what), do: Runtime.start_timer(ms, self(), what)
end
