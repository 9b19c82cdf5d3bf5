defmodule DSPex.PythonBridge.Stub.Commands do
  @moduledoc false
  # The commands of a stub that need no answer of a test's: the results are the peer's, over the definitions that the
  # stub was given. Part of the process of a stub.

  alias DSPex.PythonBridge.{Error, Programs, Protocol}
  alias DSPex.PythonBridge.Calls.Request
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Stub.{Arguments, Definition}

  @commands ~w(ping create_program execute_program list_programs get_stats cleanup)

  @enforce_keys [:programs, :started]
  defstruct [:programs, :started, runs: %{}, counts: %{}]

  @typedoc """
  `runs`: of each program, how many and when the last one was. `counts`: of each command. `started`: in monotonic ms.
  """
  @type t :: %__MODULE__{
          programs: Programs.Store.table(),
          started: integer(),
          runs: %{String.t() => {pos_integer(), float()}},
          counts: %{String.t() => %{String.t() => number()}}
        }

  @doc "The commands of a stub with these programs."
  @spec new(Programs.Store.table()) :: t()
  def new(programs), do: %__MODULE__{programs: programs, started: Deadline.now()}

  @doc "The ms since the start."
  @spec uptime_ms(t()) :: non_neg_integer()
  def uptime_ms(%__MODULE__{started: started}), do: Deadline.now() - started

  @doc """
  The result of a command, or the error of the peer. A change of the programs is made; `in_flight`: the number of runs.
  """
  @spec run(t(), String.t(), map(), Request.t(), non_neg_integer()) ::
          {:ok, map()} | {:error, Error.t()}
  def run(%__MODULE__{} = state, command, args, request, in_flight) do
    with {:ok, result} <- result(command, args, state, in_flight) do
      change(state, request.change, request.body)
      {:ok, result}
    end
  end

  # In the order in which the stub gets them.
  defp change(_state, nil, _body), do: :ok

  defp change(state, {kind, ids, stamp}, body) do
    change = {kind, ids, stamp || Programs.Store.stamp()}
    Programs.Store.apply_change(state.programs, change, body)
  end

  @doc "Counts a command that was answered."
  @spec count(t(), String.t(), Request.reply()) :: t()
  def count(%__MODULE__{} = state, command, reply) do
    success? = match?({:frame, _bytes}, reply) and Protocol.success?(elem(reply, 1))
    none = %{"count" => 0, "errors" => 0, "p50_ms" => 0.0, "p99_ms" => 0.0}
    counts = Map.update!(Map.get(state.counts, command, none), "count", &(&1 + 1))
    counts = if success?, do: counts, else: Map.update!(counts, "errors", &(&1 + 1))
    put_in(state.counts[command], counts)
  end

  @doc "Counts a run."
  @spec ran(t(), String.t()) :: t()
  def ran(%__MODULE__{} = state, program) do
    {count, _last} = Map.get(state.runs, program, {0, nil})
    put_in(state.runs[program], {count + 1, time()})
  end

  @doc "The fields of a program; nil if there is no definition of it."
  @spec fields(t(), String.t()) :: Definition.fields() | nil
  def fields(%__MODULE__{programs: programs}, program) do
    with {_stamp, body} <- Programs.Store.get(programs, program),
         do: Definition.fields(definition(body))
  end

  defp result("ping", _args, _state, _in_flight),
    do: {:ok, %{"status" => "ok", "timestamp" => time()}}

  defp result("create_program", args, _state, _in_flight) do
    with :ok <- Definition.check(args),
         do: {:ok, %{"program_id" => args["id"], "status" => "created"}}
  end

  defp result("list_programs", args, state, _in_flight) do
    with :ok <- flag(args, "details"), :ok <- flag(args, "state"), :ok <- program_ids(args) do
      wanted = args["program_ids"]

      listed =
        for {id, stamp, body} <- Programs.Store.definitions(state.programs),
            wanted == nil or id in wanted,
            do: details(id, stamp, body, state)

      result = %{"programs" => Enum.map(listed, & &1["id"])}

      cond do
        args["state"] == true ->
          {:ok, Map.put(result, "details", Enum.map(listed, &Map.put(&1, "state", nil)))}

        args["details"] == true ->
          {:ok, Map.put(result, "details", listed)}

        true ->
          {:ok, result}
      end
    end
  end

  defp result("get_stats", _args, state, in_flight) do
    {:ok,
     %{
       "programs_count" => Programs.Store.count(state.programs),
       "memory_usage" => %{"rss" => 0, "vms" => 0},
       "uptime" => uptime_ms(state) / 1000,
       "in_flight" => in_flight,
       "queued" => 0,
       "lm_waiting" => 0,
       "commands" => state.counts,
       "threads" => %{"running" => 0, "abandoned" => 0, "max" => 0},
       "pid" => nil,
       "versions" => %{},
       "degraded" => []
     }}
  end

  defp result("cleanup", args, state, _in_flight) do
    with :ok <- Arguments.known(args, ["program_ids"], ""), :ok <- program_ids(args) do
      there = for {id, _stamp, _body} <- Programs.Store.definitions(state.programs), do: id

      removed =
        if args["program_ids"], do: Enum.filter(there, &(&1 in args["program_ids"])), else: there

      {:ok, %{"status" => "cleaned", "programs_removed" => length(removed)}}
    end
  end

  defp result(command, _args, _state, _in_flight) do
    # `execute`, say, is not near `execute_program`.
    parts = Enum.filter(@commands, &(command in String.split(&1, "_")))
    meant = if length(parts) == 1, do: hd(parts), else: Arguments.nearest(command, @commands)
    hint = if meant, do: "; did you mean #{meant}?", else: ""
    {:error, Error.new(:unknown_command, "Unknown command: #{command}#{hint}")}
  end

  defp details(id, {microseconds, _count, _node}, body, state) do
    definition = definition(body)
    {count, last} = Map.get(state.runs, id, {0, nil})

    %{
      "id" => id,
      "program_type" => definition["program_type"] || "predict",
      "signature" => definition["signature"],
      "created_at" => microseconds / 1_000_000,
      "execution_count" => count,
      "last_executed" => last
    }
  end

  defp definition("," <> body) do
    {:ok, %{"args" => args}} = Payload.decode("{" <> body)
    args
  end

  defp time, do: System.system_time(:microsecond) / 1_000_000

  defp flag(args, name) do
    if Map.get(args, name, false) in [true, false],
      do: :ok,
      else: refuse("#{name}: expected true or false")
  end

  defp program_ids(args) do
    ids = args["program_ids"]

    if ids == nil or (is_list(ids) and Enum.all?(ids, &is_binary/1)),
      do: :ok,
      else: refuse("program_ids: expected a list of strings")
  end

  defp refuse(text), do: Arguments.refuse(text)
end
