defmodule Sim.Net do
  @moduledoc """
  The nodes and the connections between them, as Erlang distribution has them: messages of one connection keep their order; a
  connection that closes loses what is under way, and either side learns of it at its own time; one that is silent keeps what it is
  sent until it is heard again, or is given up after `net_ticktime`.

  A delay depends on the seed, the two nodes and the number of the message only, not on the order of other messages.
  """

  alias Sim.World

  # 1 MB is the runtime's default (`+zdbbl`).
  @busy_bytes 1_048_576
  @tick_us 60_000_000
  @epoch_us 1_700_000_000_000_000

  def get(key, default \\ nil), do: :ets.lookup_element(World.here().net, key, 2, default)
  def put(key, value), do: :ets.insert(World.here().net, {key, value})

  def nodes, do: get(:nodes, [])
  def frozen?(node), do: get({:frozen, node}, false)
  def clock(node), do: @epoch_us + World.now() + get({:skew, node}, 0)

  @doc "Whether a node takes another one for connected."
  def known?(from, to), do: get({:known, from, to}) != nil
  def known(from), do: for(to <- nodes(), known?(from, to), do: to)

  ## Sending

  @doc "Sends an event to a node; lost without a connection. Within a node it arrives at once."
  def transmit(node, node, _class, _bytes, event), do: arrived(event)
  def transmit(_from, nil, _class, _bytes, _event), do: :lost

  def transmit(from, to, class, bytes, event) do
    World.count({:messages, class})
    World.count({:bytes, class}, bytes)
    World.count({:sent, from, class})
    World.count({:received_bytes, to}, bytes)

    case get(conn(from, to)) do
      {:up, epoch, _silent} ->
        {last, number} = get({:fifo, from, to}, {0, 0})
        # Both network cards are shared by all connections of a node.
        out = occupy({:out, from}, bytes)
        time = Enum.max([out + delay(from, to, number), occupy({:in, to}, bytes), last])
        put({:fifo, from, to}, {time, number + 1})
        World.at(time, {:arrive, from, to, epoch, {bytes, event}})

      _closed ->
        :lost
    end
  end

  defp occupy(card, bytes) do
    until = max(World.now(), get(card, 0)) + div(bytes, World.here().bytes_per_us)
    put(card, until)
    until
  end

  defp arrived(event), do: World.at(World.now(), order(event), event)
  defp order(event) when elem(event, 0) in [:message, :exit, :spawned], do: World.serial_of(elem(event, 1))
  defp order({:alias, ref, _}), do: with([{_, pid, _}] <- :ets.lookup(World.here().aliases, ref), do: World.serial_of(pid), else: (_ -> 0))
  defp order({:down, ref, _}), do: with([{_, pid, _, _, _}] <- :ets.lookup(World.here().monitors, ref), do: World.serial_of(pid), else: (_ -> 0))
  defp order(_event), do: 0

  # Half to one and a half of the latency; one message in a hundred takes up to forty times as long.
  defp delay(from, to, number) do
    %{seed: seed, latency_us: latency} = World.here()
    random = :erlang.phash2({seed, from, to, number}, 1_000_000)
    usual = div(latency, 2) + rem(random, latency + 1)
    if rem(div(random, 1_000), 100) == 0, do: usual * (2 + rem(random, 39)), else: usual
  end

  @doc "An event comes out of a connection."
  def arrive(from, to, epoch, {bytes, event} = parcel) do
    case get(conn(from, to)) do
      {:up, ^epoch, true} ->
        {held, queue} = get({:held, from, to}, {0, []})
        put({:held, from, to}, {held + bytes, [parcel | queue]})

      {:up, ^epoch, false} ->
        if frozen?(to) do
          {held, queue} = get({:held, from, to}, {0, []})
          put({:held, from, to}, {held + bytes, [parcel | queue]})
        else
          World.dispatch(event)
        end

      _closed ->
        World.count(:lost_messages)
    end
  end

  @doc "Whether a connection takes no more for now."
  def busy?(from, to), do: elem(get({:held, from, to}, {0, []}), 0) > @busy_bytes

  ## Connections

  defp conn(a, b) when a < b, do: {:conn, a, b}
  defp conn(a, b), do: {:conn, b, a}

  @doc "Connects two nodes; each learns of it within some ms. A side that has not learnt of the end of the last connection does so first."
  def connect(a, b) do
    unless match?({:up, _, _}, get(conn(a, b))) or dead?(a) or dead?(b) or frozen?(a) or frozen?(b) do
      for {x, y} <- [{a, b}, {b, a}], known?(x, y), do: nodedown(x, y, get({:known, x, y}))
      {_down, epoch, _} = get(conn(a, b), {:down, 0, false})
      put(conn(a, b), {:up, epoch + 1, false})
      for {x, y} <- [{a, b}, {b, a}] do
        put({:fifo, x, y}, {0, elem(get({:fifo, x, y}, {0, 0}), 1)})
        World.at(World.now() + :rand.uniform(5_000), {:nodeup, x, y, epoch + 1})
      end
    end
  end

  def dead?(node), do: node not in nodes()

  @doc "Closes a connection."
  def disconnect(a, b) do
    with {:up, epoch, _silent} <- get(conn(a, b)) do
      put(conn(a, b), {:down, epoch, false})
      for {x, y} <- [{a, b}, {b, a}] do
        put({:held, x, y}, {0, []})
        World.at(World.now() + :rand.uniform(50_000), {:nodedown, x, y, epoch})
      end
    end
  end

  @doc "Nothing comes through a connection any more, which both sides notice after `net_ticktime`."
  def silence(a, b) do
    with {:up, epoch, _silent} <- get(conn(a, b)) do
      put(conn(a, b), {:up, epoch, true})
      give_up_later(a, b, epoch)
    end
  end

  # 45 to 75 s after the last sign of the other node.
  defp give_up_later(a, b, epoch) do
    World.at(World.now() + div(@tick_us * 3, 4) + :rand.uniform(div(@tick_us, 2)), {:act, fn ->
      silent? = match?({:up, ^epoch, true}, get(conn(a, b)))
      frozen? = match?({:up, ^epoch, _}, get(conn(a, b))) and (frozen?(a) or frozen?(b))
      if silent? or frozen?, do: disconnect(a, b)
    end})
  end

  @doc "What a silent connection has kept arrives."
  def unsilence(a, b) do
    with {:up, epoch, true} <- get(conn(a, b)) do
      put(conn(a, b), {:up, epoch, false})
      for {x, y} <- [{a, b}, {b, a}], do: flush(x, y, epoch)
    end
  end

  defp flush(x, y, epoch) do
    {_bytes, queue} = get({:held, x, y}, {0, []})
    put({:held, x, y}, {0, []})
    for parcel <- Enum.reverse(queue), do: World.at(World.now(), {:arrive, x, y, epoch, parcel})
  end

  @doc "A node hangs: its processes do not run, its connections stay for `net_ticktime`."
  def freeze(node) do
    put({:frozen, node}, true)
    for other <- nodes(), other != node, {:up, epoch, _} <- [get(conn(node, other))], do: give_up_later(node, other, epoch)
  end

  @doc "It goes on: with its own events, then with what its connections have for it."
  def thaw(node) do
    put({:frozen, node}, false)
    events = get({:frozen_events, node}, [])
    put({:frozen_events, node}, [])
    for event <- Enum.reverse(events), do: World.at(World.now(), event)
    for other <- nodes(), other != node, {:up, epoch, false} <- [get(conn(node, other))], do: flush(other, node, epoch)
  end

  def nodeup(at, other, epoch) do
    cond do
      frozen?(at) ->
        later(at, {:nodeup, at, other, epoch})

      match?({:up, ^epoch, _}, get(conn(at, other))) and not known?(at, other) ->
        put({:known, at, other}, epoch)
        Sim.Pg.nodeup(at, other)

      true ->
        :ok
    end
  end

  def nodedown(at, gone, epoch) do
    cond do
      frozen?(at) ->
        later(at, {:nodedown, at, gone, epoch})

      get({:known, at, gone}) == epoch ->
        put({:known, at, gone}, nil)
        Sim.Pg.nodedown(at, gone)
        Sim.Runtime.lost(at, gone)

      # Of an earlier connection.
      true ->
        :ok
    end
  end

  @doc "Keeps an event until its node goes on."
  def later(node, event), do: put({:frozen_events, node}, [event | get({:frozen_events, node}, [])])
end
