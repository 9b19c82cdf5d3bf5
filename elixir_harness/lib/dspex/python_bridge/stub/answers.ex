defmodule DSPex.PythonBridge.Stub.Answers do
  @moduledoc false
  # The functions that answer a stub's runs, and whose they are. Each process that expects something owns its answers:
  # they serve the runs of that process, of those that it has started, and of those that it allows. Part of the process
  # of a stub.

  alias DSPex.PythonBridge.Stub.Ledger

  # A test's process is few steps away from those that it has started.
  @furthest 100

  defstruct [:default, owners: %{}, allowed: %{}]

  # made: how many expected calls were made.
  @typep program :: %{
           expected: [{(map() -> term()), Ledger.row()}],
           always: (map() -> term()) | nil,
           made: non_neg_integer()
         }
  @typedoc "`allowed`: the owner by the process that may use its answers."
  @type t :: %__MODULE__{
          default: (String.t(), map() -> term()) | nil,
          owners: %{pid() => %{ledger: Ledger.t(), programs: %{String.t() => program()}}},
          allowed: %{pid() => pid()}
        }
  @typedoc """
  A function for one run; without one, how many runs of its program were expected, and whether another process has an
  answer for it. `ledger`: that of the run's owner, if it has one.
  """
  @type answer :: %{
          fun: (map() -> term()) | (String.t(), map() -> term()) | nil,
          ledger: Ledger.t() | nil,
          made: non_neg_integer(),
          elsewhere?: boolean()
        }

  @doc "Adds a function of an owner: one for each of the rows of its ledger, or for all runs (`:always`)."
  @spec add(t(), pid(), Ledger.t(), String.t(), (map() -> term()), [Ledger.row()] | :always) ::
          t()
  def add(%__MODULE__{owners: owners} = answers, pid, ledger, program, fun, rows) do
    owner = Map.get(owners, pid, %{ledger: ledger, programs: %{}})
    entry = Map.get(owner.programs, program, %{expected: [], always: nil, made: 0})

    entry =
      if rows == :always,
        do: %{entry | always: fun},
        else: %{entry | expected: entry.expected ++ Enum.map(rows, &{fun, &1})}

    owner = %{owner | programs: Map.put(owner.programs, program, entry)}
    %{answers | owners: Map.put(owners, pid, owner)}
  end

  @doc "Lets a process use the answers of another; an error text if it uses those of a third one."
  @spec allow(t(), pid(), pid()) :: {:ok, t()} | {:error, String.t()}
  def allow(%__MODULE__{allowed: allowed} = answers, owner, pid) do
    case allowed do
      %{^pid => other} when other != owner ->
        {:error, "#{inspect(pid)} uses the answers of #{inspect(other)} already"}

      _free when pid == owner or is_map_key(answers.owners, pid) ->
        {:error, "#{inspect(pid)} has answers of its own"}

      _free ->
        {:ok, %{answers | allowed: Map.put(allowed, pid, owner)}}
    end
  end

  @doc "Forgets a process that has ended."
  @spec gone(t(), pid()) :: t()
  def gone(%__MODULE__{} = answers, pid) do
    allowed = Map.reject(answers.allowed, fn {user, owner} -> pid in [user, owner] end)
    %{answers | owners: Map.delete(answers.owners, pid), allowed: allowed}
  end

  @doc """
  The answer to a run of a program, by the processes of `lineage/1`: an expected one first, then one for all runs, of
  the first owner that has one; else the stub's own.
  """
  @spec take(t(), [pid()], String.t()) :: {answer(), t()}
  def take(%__MODULE__{owners: owners} = answers, lineage, program) do
    mine =
      lineage
      |> Enum.flat_map(&[&1, answers.allowed[&1]])
      |> Enum.uniq()
      |> Enum.filter(&is_map_key(owners, &1))

    ledger = with [owner | _] <- mine, do: owners[owner].ledger, else: ([] -> nil)
    none = %{fun: nil, ledger: ledger, made: 0, elsewhere?: false}

    case Enum.find(mine, &answers?(owners[&1].programs[program])) do
      nil ->
        made = Enum.sum(for owner <- mine, %{made: n} <- [owners[owner].programs[program]], do: n)
        elsewhere? = Enum.any?(owners, fn {_pid, owner} -> owner.programs[program] != nil end)
        elsewhere? = elsewhere? and mine == []
        {%{none | fun: answers.default, made: made, elsewhere?: elsewhere?}, answers}

      pid ->
        {fun, owner} = take_one(owners[pid], program)
        answer = %{none | fun: fun, ledger: owner.ledger}
        {answer, %{answers | owners: %{owners | pid => owner}}}
    end
  end

  defp answers?(nil), do: false
  defp answers?(%{expected: expected, always: always}), do: expected != [] or always != nil

  defp take_one(owner, program) do
    case owner.programs[program] do
      %{expected: [{fun, row} | expected], made: made} = entry ->
        Ledger.met(owner.ledger, row)
        entry = %{entry | expected: expected, made: made + 1}
        {fun, put_in(owner.programs[program], entry)}

      %{always: fun} ->
        {fun, owner}
    end
  end

  @doc """
  A process, those that it works for (`$callers`, as a `Task` has them) and those that have started it, nearest first. It
  asks processes of this node alone.
  """
  @spec lineage(pid() | nil) :: [pid()]
  def lineage(nil), do: []
  def lineage(pid), do: lineage([pid], [])

  defp lineage([], seen), do: Enum.reverse(seen)
  defp lineage(_pids, seen) when length(seen) >= @furthest, do: Enum.reverse(seen)

  defp lineage([pid | pids], seen) do
    if pid in seen,
      do: lineage(pids, seen),
      else: lineage(pids ++ origins(pid), [pid | seen])
  end

  defp origins(pid) when node(pid) == node() do
    case Process.info(pid, [:dictionary, :parent]) do
      nil ->
        []

      info ->
        callers = Keyword.get(info[:dictionary], :"$callers", [])
        Enum.filter(List.wrap(callers) ++ [info[:parent]], &is_pid/1)
    end
  end

  defp origins(_far), do: []
end
