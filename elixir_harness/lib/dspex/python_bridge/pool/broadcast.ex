defmodule DSPex.PythonBridge.Pool.Broadcast do
  @moduledoc false
  # Changes to the programs on their way to the bridges of the pool. The coordinator's process uses it, so each bridge
  # gets the changes in the order in which they were started; a bridge whose peer dies sends them again itself.
  #
  # A change is over when all peers that were ready have answered, and at least one has. A peer that is not up gets it
  # before it serves anything; nobody waits for that, unless no peer is up. The outcome is the first error, or else the
  # first success.

  alias DSPex.PythonBridge.{Programs, Protocol}
  alias DSPex.PythonBridge.Calls.{LoadCounters, Request}
  alias DSPex.PythonBridge.OTP.Deadline

  # A peer that is not up may get a change this late, or later if its caller waits longer. One that starts after that
  # gets it from the table of programs.
  @lifetime_ms 60_000

  @enforce_keys [:owner]
  defstruct [:owner, next: 1, deliveries: %{}, refs: %{}]

  @typedoc "Who gets the outcome: see `DSPex.PythonBridge.Pool.ProgramChanges`."
  @type from :: term()
  @type reply :: {:frame, binary()} | {:error, term()}
  @type change ::
          Programs.Store.change() | {:repair, LoadCounters.index(), Programs.Store.change() | nil}
  @typedoc "A bridge, and whether its answer is waited for."
  @type target :: {LoadCounters.index(), pid(), boolean()}
  @typedoc "A change that is over. `mixed?`: some peers made it and others refused it."
  @type over :: %{
          id: pos_integer(),
          from: from(),
          change: change(),
          body: binary(),
          deadline: Deadline.t(),
          reply: reply(),
          mixed?: boolean()
        }
  @opaque t :: %__MODULE__{
            owner: pid(),
            next: pos_integer(),
            deliveries: %{pos_integer() => map()},
            refs: %{reference() => pos_integer()}
          }

  @doc """
  No change is under way. Bridges cancel changes when the process `owner` ends. That must not be the coordinator: when it
  ends, some bridges may have made a change already.
  """
  @spec new(owner :: pid()) :: t()
  def new(owner), do: %__MODULE__{owner: owner}

  @doc "Sends a change to bridges."
  @spec start(t(), from(), change(), binary(), timeout(), [target()]) :: {t(), [over()]}
  def start(%__MODULE__{next: id} = broadcast, from, change, body, timeout, targets) do
    # An atom is greater than any number.
    lifetime = max(timeout, @lifetime_ms)
    sent = Map.new(targets, &send_to(&1, broadcast.owner, change, body, lifetime))

    delivery = %{
      id: id,
      from: from,
      change: change,
      body: body,
      deadline: Deadline.new(timeout),
      sent: sent,
      success: nil,
      failure: nil,
      gone: {:error, :bridge_not_running},
      timer: lifetime != :infinity && :erlang.start_timer(lifetime, self(), {:delivery, id})
    }

    refs = Enum.into(sent, broadcast.refs, fn {ref, _target} -> {ref, id} end)
    settle(%{broadcast | next: id + 1, refs: refs}, delivery)
  end

  defp send_to({_index, pid, _waited?} = target, owner, change, body, lifetime) do
    ref = :erlang.monitor(:process, pid, alias: :reply_demonitor)
    request = %Request{ref: ref, pid: owner, timeout: lifetime, body: body}
    send(pid, {:request, %{request | change: to_bridge(change)}})
    {ref, target}
  end

  # To a bridge a repair is the change that it repeats.
  defp to_bridge({:repair, _index, change}), do: change
  defp to_bridge(change), do: change

  @doc "Whether a definition of this program is on its way, of which nobody knows yet whether a peer takes it."
  @spec creating?(t(), Programs.Store.id()) :: boolean()
  def creating?(%__MODULE__{deliveries: deliveries}, program) do
    Enum.any?(deliveries, fn {_id, %{from: from, change: change}} ->
      from != :replied and match?({:create, ^program, _}, change)
    end)
  end

  @doc "The definitions of a program that are on their way and are later than a stamp, in the order of their start."
  @spec later(t(), Programs.Store.id(), Programs.Store.stamp()) :: [{change(), binary()}]
  def later(%__MODULE__{deliveries: deliveries}, program, stamp) do
    later =
      for {id, %{change: {:create, ^program, later} = change, body: body}} <- deliveries,
          later > stamp,
          do: {id, {change, body}}

    # One may be on its way for the second time.
    later |> Enum.sort() |> Enum.map(&elem(&1, 1)) |> Enum.uniq()
  end

  @doc "A bridge has answered, or is gone. An unknown reference changes nothing."
  @spec answered(t(), reference(), reply()) :: {t(), [over()]}
  def answered(%__MODULE__{} = broadcast, ref, reply) do
    case Map.pop(broadcast.refs, ref) do
      {nil, _refs} ->
        {broadcast, []}

      {id, refs} ->
        delivery = Map.fetch!(broadcast.deliveries, id)
        delivery = note(%{delivery | sent: Map.delete(delivery.sent, ref)}, reply)
        settle(%{broadcast | refs: refs}, delivery)
    end
  end

  # The bridge's next process gets the change from the table before it serves anything.
  defp note(delivery, {:error, :bridge_not_running}), do: delivery
  defp note(delivery, {:error, {:not_started, _why}} = reply), do: %{delivery | gone: reply}

  defp note(delivery, {:frame, frame} = reply) do
    if Protocol.success?(frame),
      do: %{delivery | success: delivery.success || reply},
      else: %{delivery | failure: delivery.failure || reply}
  end

  defp note(delivery, reply), do: %{delivery | failure: delivery.failure || reply}

  @doc "The peer of a slot is not up any more: nobody waits for its answers."
  @spec down(t(), LoadCounters.index()) :: {t(), [over()]}
  def down(%__MODULE__{deliveries: deliveries} = broadcast, index) do
    Enum.reduce(deliveries, {broadcast, []}, fn {_id, delivery}, {broadcast, over} ->
      sent =
        Map.new(delivery.sent, fn
          {ref, {^index, pid, true}} -> {ref, {index, pid, false}}
          other -> other
        end)

      {broadcast, more} = settle(broadcast, %{delivery | sent: sent})
      {broadcast, more ++ over}
    end)
  end

  @doc "The timer of a change has fired: peers that have not got it by now get it from the table."
  @spec expired(t(), pos_integer()) :: {t(), [over()]}
  def expired(%__MODULE__{} = broadcast, id) do
    case broadcast.deliveries do
      %{^id => delivery} ->
        for {ref, {_index, pid, _waited?}} <- delivery.sent do
          Process.demonitor(ref, [:flush])
          send(pid, {:abandon, ref})
        end

        refs = Map.drop(broadcast.refs, Map.keys(delivery.sent))
        delivery = %{delivery | sent: %{}, failure: delivery.failure || {:error, :timeout}}
        settle(%{broadcast | refs: refs}, delivery)

      _over ->
        {broadcast, []}
    end
  end

  # A delivery stays here until all bridges have answered; its change is over, once, before that.
  defp settle(broadcast, %{from: from} = delivery) do
    if from != :replied and over?(delivery),
      do: {put(broadcast, %{delivery | from: :replied}), [summary(delivery)]},
      else: {put(broadcast, delivery), []}
  end

  defp put(broadcast, %{id: id, sent: sent, timer: timer}) when sent == %{} do
    if timer, do: :erlang.cancel_timer(timer, async: true, info: false)
    %{broadcast | deliveries: Map.delete(broadcast.deliveries, id)}
  end

  defp put(broadcast, delivery),
    do: %{broadcast | deliveries: Map.put(broadcast.deliveries, delivery.id, delivery)}

  defp over?(%{sent: sent}) when sent == %{}, do: true

  defp over?(%{sent: sent} = delivery) do
    (delivery.success || delivery.failure) != nil and
      not Enum.any?(sent, fn {_ref, {_index, _pid, waited?}} -> waited? end)
  end

  defp summary(delivery) do
    delivery
    |> Map.take([:id, :from, :change, :body, :deadline])
    |> Map.merge(%{
      reply: delivery.failure || delivery.success || delivery.gone,
      mixed?: delivery.failure != nil and delivery.success != nil
    })
  end
end
