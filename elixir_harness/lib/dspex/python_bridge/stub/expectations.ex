defmodule DSPex.PythonBridge.Stub.Expectations do
  @moduledoc false
  # The answers that tests have given to stubs, and what they still expect: one Agent of the node, which the first
  # test starts. It outlasts tests and stubs, since the callbacks of `on_exit` verify when both have ended.
  #
  # A process that gives answers owns them. They serve the runs of that process, of those that it has started, and of those that
  # it allows. With its end they are forgotten, unless it keeps them.

  # A test's process is few steps away from those that it has started.
  @furthest 100

  @owner %{answers: %{}, failed: [], kept?: false}
  @entry %{expected: [], always: nil}

  @typedoc "A function for one run; without one, the reason. `owner`: who is to hear of a mistake in it."
  @type answer :: {(map() -> term()) | nil, owner :: pid() | nil, why :: String.t()}

  @doc "Adds a function of the calling process: for the next `n` runs, or for all others."
  @spec add(atom(), String.t(), (map() -> term()), pos_integer() | :always) :: :ok
  def add(stub, program, fun, times) do
    update(self(), fn owner ->
      entry = Map.get(owner.answers, {stub, program}, @entry)

      entry =
        if times == :always,
          do: %{entry | always: fun},
          else: %{entry | expected: entry.expected ++ List.duplicate(fun, times)}

      put_in(owner.answers[{stub, program}], entry)
    end)
  end

  @doc "Lets a process use the answers of another; an error text if it uses those of a third one."
  @spec allow(atom(), pid(), pid()) :: :ok | {:error, String.t()}
  def allow(stub, owner, pid) do
    ask(fn state ->
      case Map.put_new(state.allowed, {stub, pid}, owner) do
        %{{^stub, ^pid} => ^owner} = allowed ->
          {:ok, %{state | allowed: allowed}}

        %{{^stub, ^pid} => other} ->
          {{:error, "#{inspect(pid)} uses the answers of #{inspect(other)} already"}, state}
      end
    end)
  end

  @doc """
  The answer for a run, by the processes of `lineage/1`: an expected one first, then one for all runs, of the first owner
  that has one.
  """
  @spec take(atom(), String.t(), [pid()]) :: answer()
  def take(stub, program, lineage) do
    ask(fn state ->
      owners = Enum.uniq(Enum.flat_map(lineage, &[&1, state.allowed[{stub, &1}]]))
      mine = Enum.filter(owners, &answers?(state, &1, stub))
      key = {stub, program}
      entries = for pid <- mine, entry = state.owners[pid].answers[key], do: {pid, entry}

      case Enum.find(entries, fn {_pid, entry} -> entry != @entry end) do
        {pid, %{expected: [fun | expected]}} ->
          {{fun, pid, ""}, put_in(state.owners[pid].answers[key].expected, expected)}

        {pid, %{always: fun}} ->
          {{fun, pid, ""}, state}

        nil ->
          {{nil, List.first(mine), why_none(state, key, mine, entries)}, state}
      end
    end)
  end

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

  @doc "Notes a mistake in an answer."
  @spec failed(pid(), atom(), String.t()) :: :ok
  def failed(pid, stub, text),
    do: update(pid, fn owner -> %{owner | failed: [{stub, text} | owner.failed]} end)

  @doc "Keeps the expectations of the calling process after its end, until `forget/1`."
  @spec keep() :: :ok
  def keep, do: update(self(), &%{&1 | kept?: true})

  @doc "Forgets a process."
  @spec forget(pid()) :: :ok
  def forget(pid), do: ask(&{:ok, %{&1 | owners: Map.delete(&1.owners, pid)}})

  @doc "Raises if a run that a process expects of a stub, or of any, has not come, or an answer has failed."
  @spec verify!(pid(), atom() | :all) :: :ok
  def verify!(pid, which) do
    owner = ask(&{Map.get(&1.owners, pid, @owner), &1})

    missing =
      for {{stub, program}, %{expected: [_ | more]}} <- owner.answers, which in [:all, stub] do
        calls = if more == [], do: "1 expected call", else: "#{length(more) + 1} expected calls"
        "#{inspect(stub)}: #{calls} of program #{inspect(program)} not made"
      end

    failed =
      for {stub, text} <- Enum.reverse(owner.failed),
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

  defp lineage(pids, seen) when pids == [] or length(seen) >= @furthest, do: Enum.reverse(seen)

  defp lineage([pid | pids], seen) do
    if pid in seen,
      do: lineage(pids, seen),
      else: lineage(pids ++ origins(pid), [pid | seen])
  end

  defp origins(pid) do
    case node(pid) == node() && Process.info(pid, [:dictionary, :parent]) do
      [dictionary: dictionary, parent: parent] ->
        Enum.filter(List.wrap(dictionary[:"$callers"]) ++ [parent], &is_pid/1)

      _gone_or_far ->
        []
    end
  end

  ## The Agent

  defp update(pid, fun),
    do: ask(&{:ok, put_in(&1.owners[pid], fun.(Map.get(&1.owners, pid, @owner)))})

  defp ask(fun) do
    if Process.whereis(__MODULE__) == nil,
      do: Agent.start(fn -> %{owners: %{}, allowed: %{}} end, name: __MODULE__)

    Agent.get_and_update(__MODULE__, &fun.(without_ended(&1)), :infinity)
  end

  defp without_ended(%{owners: owners, allowed: allowed}) do
    %{
      owners: Map.filter(owners, fn {pid, owner} -> owner.kept? or Process.alive?(pid) end),
      allowed:
        Map.filter(allowed, fn {{_stub, user}, owner} -> alive?(user) and alive?(owner) end)
    }
  end

  defp alive?(pid), do: node(pid) == node() and Process.alive?(pid)

  defp answers?(state, pid, stub),
    do: Enum.any?(Map.keys(Map.get(state.owners, pid, @owner).answers), &(elem(&1, 0) == stub))
end
