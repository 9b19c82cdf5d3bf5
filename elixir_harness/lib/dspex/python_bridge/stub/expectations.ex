defmodule DSPex.PythonBridge.Stub.Expectations do
  @moduledoc false
  # The answers that tests have given to stubs, and what they still expect: one process of the node, which the first
  # test starts. It outlasts tests and stubs, since the callbacks of `on_exit` verify when both have ended.
  #
  # A process that gives answers owns them. They serve the runs of that process, of those that it has started, and of those that
  # it allows.

  use GenServer

  # A test's process is few steps away from those that it has started.
  @furthest 100

  # owners: of each process its answers, by the stub and the program, and the mistakes in them. kept?: also after its end.
  # allowed: the owner by the stub and the process that may use its answers.
  defstruct owners: %{}, allowed: %{}

  @owner %{answers: %{}, failed: [], kept?: false}
  @entry %{expected: [], always: nil}

  @typedoc "A function for one run; without one, the reason. `owner`: who is to hear of a mistake in it."
  @type answer :: {(map() -> term()) | nil, owner :: pid() | nil, why :: String.t()}

  @doc "Adds a function of the calling process: for the next `n` runs, or for all others."
  @spec add(atom(), String.t(), (map() -> term()), pos_integer() | :always) :: :ok
  def add(stub, program, fun, times), do: call({:add, self(), {stub, program}, fun, times})

  @doc "Lets a process use the answers of another; an error text if it uses those of a third one."
  @spec allow(atom(), pid(), pid()) :: :ok | {:error, String.t()}
  def allow(stub, owner, pid), do: call({:allow, stub, owner, pid})

  @doc """
  The answer for a run, by the processes of `lineage/1`: an expected one first, then one for all runs, of the first owner
  that has one.
  """
  @spec take(atom(), String.t(), [pid()]) :: answer()
  def take(stub, program, lineage), do: call({:take, stub, program, lineage})

  @doc "Notes a mistake in an answer."
  @spec failed(pid() | nil, atom(), String.t()) :: :ok
  def failed(nil, _stub, _text), do: :ok
  def failed(owner, stub, text), do: call({:failed, owner, stub, text})

  @doc "Keeps the expectations of the calling process after its end, until `forget/1`."
  @spec keep() :: :ok
  def keep, do: call({:keep, self()})

  @doc "Forgets a process."
  @spec forget(pid()) :: :ok
  def forget(owner), do: call({:forget, owner})

  @doc "Raises if a run that a process expects of a stub, or of any, has not come, or an answer has failed."
  @spec verify!(pid(), atom() | :all) :: :ok
  def verify!(owner, which) do
    %{answers: answers, failed: failed} = call({:owner, owner})

    missing =
      for {{stub, program}, %{expected: [_ | _] = expected}} <- answers, which in [:all, stub] do
        count =
          with 1 <- length(expected), do: "1 expected call", else: (n -> "#{n} expected calls")

        "#{inspect(stub)}: #{count} of program #{inspect(program)} not made"
      end

    failed =
      for {stub, text} <- Enum.reverse(failed),
          which in [:all, stub],
          do: "#{inspect(stub)}: #{text}"

    if missing ++ failed != [], do: raise(Enum.join(["stubs:" | missing ++ failed], "\n  * "))
    :ok
  end

  @doc """
  A process, those that it works for (`$callers`, as a `Task` has them) and those that have started it, nearest first. It
  asks processes of this node alone.
  """
  @spec lineage(pid() | nil) :: [pid()]
  def lineage(pid), do: lineage(List.wrap(pid), [])

  defp lineage([], seen), do: Enum.reverse(seen)
  defp lineage(_pids, seen) when length(seen) >= @furthest, do: Enum.reverse(seen)

  defp lineage([pid | pids], seen) do
    if pid in seen,
      do: lineage(pids, seen),
      else: lineage(pids ++ origins(pid), [pid | seen])
  end

  defp origins(pid) do
    case node(pid) == node() && Process.info(pid, [:dictionary, :parent]) do
      [dictionary: dictionary, parent: parent] ->
        callers = List.wrap(Keyword.get(dictionary, :"$callers", []))
        Enum.filter(callers ++ [parent], &is_pid/1)

      _gone_or_far ->
        []
    end
  end

  ## The process

  defp call(question) do
    with nil <- Process.whereis(__MODULE__),
         do: GenServer.start(__MODULE__, nil, name: __MODULE__)

    GenServer.call(__MODULE__, question, :infinity)
  end

  @impl GenServer
  def init(nil), do: {:ok, %__MODULE__{}}

  @impl GenServer
  def handle_call({:add, pid, key, fun, times}, _from, state) do
    owner = owner(state, pid)
    entry = Map.get(owner.answers, key, @entry)

    entry =
      if times == :always,
        do: %{entry | always: fun},
        else: %{entry | expected: entry.expected ++ List.duplicate(fun, times)}

    {:reply, :ok, put_owner(state, pid, put_in(owner.answers[key], entry))}
  end

  def handle_call({:allow, stub, owner, pid}, _from, %{allowed: allowed} = state) do
    case allowed do
      %{{^stub, ^pid} => other} when other != owner ->
        {:reply, {:error, "#{inspect(pid)} uses the answers of #{inspect(other)} already"}, state}

      _free ->
        if pid == owner or answers?(state, pid, stub) do
          {:reply, {:error, "#{inspect(pid)} has answers of its own"}, state}
        else
          Enum.each([owner, pid], &Process.monitor/1)
          {:reply, :ok, put_in(state.allowed[{stub, pid}], owner)}
        end
    end
  end

  def handle_call({:take, stub, program, lineage}, _from, state) do
    mine =
      lineage
      |> Enum.flat_map(&[&1, state.allowed[{stub, &1}]])
      |> Enum.uniq()
      |> Enum.filter(&answers?(state, &1, stub))

    key = {stub, program}
    entries = for pid <- mine, entry = owner(state, pid).answers[key], do: {pid, entry}

    case Enum.find(entries, fn {_pid, entry} -> entry != @entry end) do
      {pid, %{expected: [fun | expected]}} ->
        state = put_in(state.owners[pid].answers[key].expected, expected)
        {:reply, {fun, pid, ""}, state}

      {pid, %{always: fun}} ->
        {:reply, {fun, pid, ""}, state}

      nil ->
        {:reply, {nil, List.first(mine), why_none(state, key, mine, entries)}, state}
    end
  end

  def handle_call({:failed, pid, stub, text}, _from, state) do
    owner = owner(state, pid)
    {:reply, :ok, put_owner(state, pid, %{owner | failed: [{stub, text} | owner.failed]})}
  end

  def handle_call({:keep, pid}, _from, state),
    do: {:reply, :ok, put_owner(state, pid, %{owner(state, pid) | kept?: true})}

  def handle_call({:forget, pid}, _from, state), do: {:reply, :ok, forget(state, pid)}
  def handle_call({:owner, pid}, _from, state), do: {:reply, owner(state, pid), state}

  @impl GenServer
  def handle_info({:DOWN, _monitor, :process, pid, _reason}, state) do
    allowed = Map.reject(state.allowed, fn {{_stub, user}, owner} -> pid in [user, owner] end)
    state = %{state | allowed: allowed}
    {:noreply, if(owner(state, pid).kept?, do: state, else: forget(state, pid))}
  end

  defp owner(state, pid), do: Map.get(state.owners, pid, @owner)

  # A process that has ended already is forgotten at once, unless it is kept.
  defp put_owner(state, pid, owner) do
    if not is_map_key(state.owners, pid), do: Process.monitor(pid)
    put_in(state.owners[pid], owner)
  end

  defp forget(state, pid), do: %{state | owners: Map.delete(state.owners, pid)}

  defp answers?(state, pid, stub),
    do: Enum.any?(owner(state, pid).answers, fn {{of, _program}, _entry} -> of == stub end)

  defp why_none(state, key, mine, entries) do
    cond do
      entries != [] ->
        " any longer: more runs have come than were expected"

      mine == [] and Enum.any?(state.owners, fn {_pid, owner} -> owner.answers[key] end) ->
        " by this process. Another has: if a test expects this run, it needs Stub.allow/3"

      true ->
        ". Give it one with Stub.expect/3, Stub.stub/3 or the option :answers of the stub"
    end
  end
end
