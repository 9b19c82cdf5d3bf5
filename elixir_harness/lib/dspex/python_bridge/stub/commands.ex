defmodule DSPex.PythonBridge.Stub.Commands do
  @moduledoc false
  # The commands of a stub that need no answer of a test's: the results are the peer's, over the definitions that the
  # stub was given. And the arguments of a run.

  alias DSPex.PythonBridge.{Error, Programs}
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Stub.Definition

  @commands ~w(ping create_program execute_program list_programs get_stats cleanup)
  @execute ~w(program_id inputs config lm attempts max_concurrency item_timeout_ms options)
  @most_attempts 10

  @typedoc """
  `runs`: of each program, how many and when the last one was. `counts`: of each command. `in_flight`: runs. `started`: in
  monotonic ms.
  """
  @type state :: %{
          programs: Programs.Store.table(),
          runs: %{String.t() => {pos_integer(), float()}},
          counts: %{String.t() => %{String.t() => non_neg_integer()}},
          in_flight: non_neg_integer(),
          started: integer()
        }
  @typedoc "The arguments of a run."
  @type run :: %{
          program: String.t(),
          inputs: map() | [term()],
          max_concurrency: pos_integer() | :infinity,
          item_timeout: pos_integer() | :infinity
        }

  @doc "The result of a command, or the error of the peer. The definitions are the caller's to change."
  @spec run(String.t(), map(), state()) :: {:ok, map()} | {:error, Error.t()}
  def run("ping", _args, _state), do: {:ok, %{"status" => "ok", "timestamp" => time()}}

  def run("create_program", args, _state) do
    with :ok <- Definition.check(args),
         do: {:ok, %{"program_id" => args["id"], "status" => "created"}}
  end

  def run("list_programs", args, state) do
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

  def run("get_stats", _args, state) do
    {:ok,
     %{
       "programs_count" => Programs.Store.count(state.programs),
       "memory_usage" => %{"rss" => 0, "vms" => 0},
       "uptime" => (System.monotonic_time(:millisecond) - state.started) / 1000,
       "in_flight" => state.in_flight,
       "queued" => 0,
       "commands" => state.counts,
       "threads" => %{"running" => 0, "abandoned" => 0, "max" => 0},
       "pid" => nil,
       "versions" => %{},
       "degraded" => []
     }}
  end

  def run("cleanup", args, state) do
    with :ok <- Definition.known(args, ["program_ids"], ""), :ok <- program_ids(args) do
      there = for {id, _stamp, _body} <- Programs.Store.definitions(state.programs), do: id

      removed =
        if args["program_ids"], do: Enum.filter(there, &(&1 in args["program_ids"])), else: there

      {:ok, %{"status" => "cleaned", "programs_removed" => length(removed)}}
    end
  end

  def run(command, _args, _state) do
    # `execute`, say, is not near `execute_program`.
    parts = Enum.filter(@commands, &(command in String.split(&1, "_")))
    meant = if length(parts) == 1, do: hd(parts), else: Definition.nearest(command, @commands)
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

  @doc "The arguments of a `create_program`, from the body of its request."
  @spec definition(binary()) :: map()
  def definition("," <> body) do
    {:ok, %{"args" => args}} = Payload.decode("{" <> body)
    args
  end

  @doc "The present time, in unix seconds."
  @spec time() :: float()
  def time, do: System.system_time(:microsecond) / 1_000_000

  @doc "The arguments of an `execute_program`."
  @spec read_run(map()) :: {:ok, run()} | {:error, Error.t()}
  def read_run(args) do
    with :ok <- Definition.known(args, @execute, ""),
         :ok <- Definition.text(args, "program_id"),
         :ok <- inputs(args["inputs"]),
         :ok <- Definition.object(args, "config", "an object"),
         :ok <- count(args, "attempts", @most_attempts),
         :ok <- count(args, "max_concurrency", :infinity),
         :ok <- milliseconds(args, "item_timeout_ms"),
         :ok <- of_list(args, "max_concurrency"),
         :ok <- of_list(args, "item_timeout_ms") do
      {:ok,
       %{
         program: args["program_id"],
         inputs: args["inputs"],
         max_concurrency: args["max_concurrency"] || :infinity,
         item_timeout: args["item_timeout_ms"] || :infinity
       }}
    end
  end

  defp inputs(inputs) when is_map(inputs) or is_list(inputs), do: :ok

  defp inputs(_other) do
    refuse(
      "inputs: expected an object of the signature's input fields, or a list of such objects"
    )
  end

  defp count(args, name, most) do
    case args[name] do
      nil -> :ok
      n when is_integer(n) and n >= 1 and n <= most -> :ok
      _other when most == :infinity -> refuse("#{name}: expected a whole number of at least 1")
      _other -> refuse("#{name}: expected a whole number from 1 to #{most}")
    end
  end

  defp milliseconds(args, name) do
    if args[name] == nil or (is_number(args[name]) and args[name] > 0),
      do: :ok,
      else: refuse("#{name}: expected a number of milliseconds greater than 0")
  end

  defp of_list(%{"inputs" => inputs} = args, name) do
    if args[name] != nil and is_map(inputs),
      do: refuse("#{name}: only for a list of inputs"),
      else: :ok
  end

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

  defp refuse(text), do: {:error, Error.new(:invalid_args, text)}
end
