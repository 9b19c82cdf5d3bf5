defmodule DSPex.PythonBridge.Pool.Broadcast do
  @moduledoc """
  Changes to the programs on their way to the bridges of the pool. Used by the coordinator's process, which
  thereby is what puts them in one order: each bridge is sent each change, in the order in which they
  were started here, and sends it again by itself if its peer dies.

  A change is over when all peers that were ready have answered, and one at least. A peer that is not
  up gets it before it serves anything; nobody waits for that, unless none is up. What comes of it is
  the first error, or else the first success.
  """

  alias DSPex.PythonBridge.{Programs, Protocol}
  alias DSPex.PythonBridge.Calls.{LoadCounters, Request}

  # For so long at least a peer that is not up may get a change late. One that starts after that finds
  # it in the table of programs.
  @lifetime_ms 60_000

  @enforce_keys [:owner]
  defstruct [:owner, next: 1, under_way: %{}, refs: %{}]

  @typedoc "Who wants to know: see `DSPex.PythonBridge.Pool.ProgramChanges`."
  @type from :: term()
  @type reply :: {:frame, binary()} | {:error, term()}
  @type what ::
          Programs.Store.change() | {:repair, LoadCounters.index(), Programs.Store.change() | nil}
  @typedoc "A bridge, and whether its answer is waited for."
  @type target :: {LoadCounters.index(), pid(), boolean()}
  @typedoc "A change that is over. `mixed?`: some peers made it and others refused."
  @type over :: %{
          id: pos_integer(),
          from: from(),
          what: what(),
          body: binary(),
          deadline: integer() | :infinity,
          reply: reply(),
          mixed?: boolean()
        }
  @opaque t :: %__MODULE__{
            owner: pid(),
            next: pos_integer(),
            under_way: %{pos_integer() => map()},
            refs: %{reference() => pos_integer()}
          }

  @doc """
  No change is under way. `owner`: the process with whose end bridges cancel the changes that they were
  sent. Not the coordinator's: some bridges may have made a change already when that ends.
  """
  @spec new(owner :: pid()) :: t()
  def new(owner), do: %__MODULE__{owner: owner}

  @doc "Sends a change to bridges."
  @spec start(t(), from(), what(), binary(), timeout(), [target()]) :: {t(), [over()]}
  def start(%__MODULE__{next: id} = broadcast, from, what, body, timeout, targets) do
    lifetime = max(timeout, @lifetime_ms)
    sent = Map.new(targets, &send_to(&1, broadcast.owner, what, body, lifetime))

    change = %{
      id: id,
      from: from,
      what: what,
      body: body,
      deadline: if(timeout == :infinity, do: :infinity, else: now() + timeout),
      sent: sent,
      success: nil,
      failure: nil,
      timer: lifetime != :infinity && :erlang.start_timer(lifetime, self(), {:delivery, id})
    }

    refs = Enum.into(sent, broadcast.refs, fn {ref, _target} -> {ref, id} end)
    settle(%{broadcast | next: id + 1, refs: refs}, change)
  end

  # :infinity is greater than any number, as an atom.
  defp send_to({_index, pid, _waited?} = target, owner, what, body, lifetime) do
    ref = :erlang.monitor(:process, pid, alias: :reply_demonitor)

    send(
      pid,
      {:request,
       %Request{ref: ref, pid: owner, timeout: lifetime, body: body, change: known(what)}}
    )

    {ref, target}
  end

  # To a bridge a repair is the change that it repeats.
  defp known({:repair, _index, change}), do: change
  defp known(change), do: change

  @doc "Whether a definition of this program is on its way."
  @spec creating?(t(), Programs.Store.id()) :: boolean()
  def creating?(%__MODULE__{under_way: under_way}, program) do
    Enum.any?(under_way, fn {_id, change} -> match?({:create, ^program, _}, change.what) end)
  end

  @doc "A bridge has answered, or is gone. Of a reply that is not known, nothing comes."
  @spec answered(t(), reference(), reply()) :: {t(), [over()]}
  def answered(%__MODULE__{} = broadcast, ref, reply) do
    case Map.pop(broadcast.refs, ref) do
      {nil, _refs} ->
        {broadcast, []}

      {id, refs} ->
        change = Map.fetch!(broadcast.under_way, id)
        change = note(%{change | sent: Map.delete(change.sent, ref)}, reply)
        settle(%{broadcast | refs: refs}, change)
    end
  end

  # Whatever a bridge's next process serves it will have been given before, by the table.
  defp note(change, {:error, :bridge_not_running}), do: change

  defp note(change, {:frame, frame} = reply) do
    if Protocol.success?(frame),
      do: %{change | success: change.success || reply},
      else: %{change | failure: change.failure || reply}
  end

  defp note(change, reply), do: %{change | failure: change.failure || reply}

  @doc "The peer of a slot is not up any more: its answers are not waited for."
  @spec down(t(), LoadCounters.index()) :: {t(), [over()]}
  def down(%__MODULE__{under_way: under_way} = broadcast, index) do
    Enum.reduce(under_way, {broadcast, []}, fn {_id, change}, {broadcast, over} ->
      sent =
        Map.new(change.sent, fn
          {ref, {^index, pid, true}} -> {ref, {index, pid, false}}
          other -> other
        end)

      {broadcast, more} = settle(broadcast, %{change | sent: sent})
      {broadcast, more ++ over}
    end)
  end

  @doc "The timer of a change has fired: peers that have not got it by now are given the table."
  @spec expired(t(), pos_integer()) :: {t(), [over()]}
  def expired(%__MODULE__{} = broadcast, id) do
    case broadcast.under_way do
      %{^id => change} ->
        for {ref, {_index, pid, _waited?}} <- change.sent do
          Process.demonitor(ref, [:flush])
          send(pid, {:abandon, ref})
        end

        refs = Map.drop(broadcast.refs, Map.keys(change.sent))
        change = %{change | sent: %{}, failure: change.failure || {:error, :timeout}}
        settle(%{broadcast | refs: refs}, change)

      _over ->
        {broadcast, []}
    end
  end

  # A change stays here until all bridges have answered; it is over, once, before that.
  defp settle(broadcast, %{from: from} = change) do
    over? = from != :told and over?(change)
    over = if over?, do: [summary(change)], else: []
    change = if over?, do: %{change | from: :told}, else: change
    {put(broadcast, change), over}
  end

  defp put(broadcast, %{id: id, sent: sent, timer: timer}) when sent == %{} do
    if timer, do: :erlang.cancel_timer(timer, async: true, info: false)
    %{broadcast | under_way: Map.delete(broadcast.under_way, id)}
  end

  defp put(broadcast, change),
    do: %{broadcast | under_way: Map.put(broadcast.under_way, change.id, change)}

  defp over?(%{sent: sent}) when sent == %{}, do: true

  defp over?(%{sent: sent} = change) do
    (change.success || change.failure) != nil and
      not Enum.any?(sent, fn {_ref, {_index, _pid, waited?}} -> waited? end)
  end

  defp summary(change) do
    change
    |> Map.take([:id, :from, :what, :body, :deadline])
    |> Map.merge(%{
      reply: change.failure || change.success || {:error, :bridge_not_running},
      mixed?: change.failure != nil and change.success != nil
    })
  end

  defp now, do: System.monotonic_time(:millisecond)
end
