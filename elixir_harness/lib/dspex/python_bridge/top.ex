defmodule DSPex.PythonBridge.Top do
  @moduledoc """
  The state of all bridges of a node, however they were started, and the evaluations and optimizations that it runs.
  `mix dspex.top` shows it; without Mix:

      iex> DSPex.PythonBridge.Top.print()

      $ bin/my_app rpc "DSPex.PythonBridge.Top.print()"

  All peers are asked for their `get_stats` at once, with a short timeout: if a peer does not answer, the values
  that only it has are nil.

  These calls emit no telemetry events and are not among the counted calls.
  """

  alias DSPex.PythonBridge.Bridge
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.Top.{Finder, Table}

  # A peer answers in a millisecond, after a big frame in about ten.
  @stats_ms 500

  @typedoc """
  One bridge and its peer. What is not known is nil: while a peer starts, or if it does not answer.

    * `bridge` – its name, or its pid where it has none, as `inspect/1` writes them
    * `pool`, `number` – of a member of a pool: the pool's name, and its place there; else nil
    * `state`, `os_pid`, `pending`, `restarts`, `uptime_ms` – see
      `DSPex.PythonBridge.Bridge.get_status/1`; `state` is nil where the bridge does not answer
    * `in_flight`, `queued` – `execute_program` calls that run, and that wait for a slot, in the peer
    * `lm_waiting` – LM calls in the peer that wait for the limits of their account
    * `p50_ms`, `p99_ms` – of the last 1000 `execute_program` calls; nil before the first
    * `rss_bytes` – the peer's memory
    * `executes`, `errors`, `calls` – since the peer's start: `execute_program` calls, those of them that failed, and the
      calls of all commands but `get_stats`
    * `stats_at_ms` – when the peer counted them, in ms since its start, by its own clock
    * `calls_per_s` – see `with_rates/2`
  """
  @type peer :: %{
          bridge: String.t(),
          pool: String.t() | nil,
          number: pos_integer() | nil,
          state: :starting | :running | :restarting | :failed | nil,
          os_pid: pos_integer() | nil,
          pending: non_neg_integer() | nil,
          restarts: non_neg_integer() | nil,
          uptime_ms: non_neg_integer() | nil,
          in_flight: non_neg_integer() | nil,
          queued: non_neg_integer() | nil,
          lm_waiting: non_neg_integer() | nil,
          p50_ms: number() | nil,
          p99_ms: number() | nil,
          rss_bytes: non_neg_integer() | nil,
          executes: non_neg_integer() | nil,
          errors: non_neg_integer() | nil,
          calls: non_neg_integer() | nil,
          stats_at_ms: non_neg_integer() | nil,
          calls_per_s: float() | nil
        }
  @typedoc """
  An evaluation or an optimization that a process of this node has begun and that is under way. What is not known is nil.

    * `kind`
    * `program` – its id
    * `server` – the name of the bridge or pool, or its pid where it has none, as `inspect/1` writes them
    * `caller` – the process, as `inspect/1` writes it
    * `done`, `total` – of an evaluation examples, of an optimization as it counts its steps
    * `score` – so far; of an optimization the best
    * `failed` – how many runs of the program
    * `lm_calls`, `elapsed_ms`
  """
  @type run :: %{
          kind: :evaluate | :optimize,
          program: String.t() | nil,
          server: String.t(),
          caller: String.t(),
          done: non_neg_integer() | nil,
          total: non_neg_integer() | nil,
          score: float() | nil,
          failed: non_neg_integer() | nil,
          lm_calls: non_neg_integer() | nil,
          elapsed_ms: non_neg_integer()
        }
  @typedoc """
  `time` is in ISO 8601, UTC; the peers are in the order of their names, the runs in that of their starts.
  """
  @type snapshot :: %{node: node(), time: String.t(), peers: [peer()], runs: [run()]}

  @status [:state, :os_pid, :pending, :restarts, :uptime_ms]
  @figures [:in_flight, :queued, :lm_waiting, :p50_ms, :p99_ms, :rss_bytes, :executes] ++
             [:errors, :calls, :stats_at_ms, :calls_per_s]
  @unknown Map.new(@status ++ @figures, &{&1, nil})

  @doc """
  The bridges of this node now, without `calls_per_s`, and the evaluations and optimizations that its processes make.

  Options: `:timeout`, the time that a peer has to answer, in ms (default 500). It takes twice that at most, and only
  if the process of a bridge does not answer.
  """
  @spec snapshot([{:timeout, pos_integer()}]) :: snapshot()
  def snapshot(opts \\ []) do
    timeout = Keyword.get(opts, :timeout, @stats_ms)
    found = Finder.bridges()
    time = DateTime.utc_now() |> DateTime.truncate(:second) |> DateTime.to_iso8601()
    %{node: node(), time: time, peers: ask_all(found, timeout), runs: Finder.runs()}
  end

  @doc """
  Adds the calls of each peer per second since an earlier snapshot of the same node; nil if the peer was replaced
  since, or either snapshot has no counts.
  """
  @spec with_rates(snapshot(), snapshot()) :: snapshot()
  def with_rates(%{peers: peers} = snapshot, %{peers: earlier}) do
    earlier = Map.new(earlier, &{{&1.bridge, &1.os_pid}, &1})

    rate = fn peer ->
      %{peer | calls_per_s: rate(peer, Map.get(earlier, {peer.bridge, peer.os_pid}))}
    end

    %{snapshot | peers: Enum.map(peers, rate)}
  end

  defp rate(%{calls: calls, stats_at_ms: at}, %{calls: calls_then, stats_at_ms: then})
       when is_integer(calls) and is_integer(calls_then) and at > then,
       do: Float.round((calls - calls_then) * 1_000 / (at - then), 2)

  defp rate(_peer, _unknown), do: nil

  @doc """
  Prints the tables of this node, and takes a second for the calls per second. `mix help dspex.top`
  explains the columns.
  """
  @spec print() :: :ok
  def print do
    earlier = snapshot()
    Process.sleep(1_000)
    IO.write(Table.render(with_rates(snapshot(), earlier)))
  end

  ## One peer

  defp ask_all(found, timeout) do
    found
    |> Task.async_stream(&ask(&1, timeout),
      max_concurrency: max(length(found), 1),
      timeout: 2 * timeout,
      on_timeout: :kill_task,
      zip_input_on_exit: true
    )
    |> Enum.map(fn
      {:ok, peer} -> peer
      # The bridge's process is suspended.
      {:exit, {bridge, _reason}} -> unknown(bridge)
    end)
  end

  defp ask(bridge, timeout) do
    status = bridge.server |> Bridge.get_status() |> Map.take(@status)
    peer = Map.merge(unknown(bridge), status)

    # In any other state the call would wait for a peer.
    if status.state == :running,
      do: Map.merge(peer, stats(bridge.server, timeout)),
      else: peer
  end

  defp unknown(bridge), do: Map.merge(@unknown, Map.take(bridge, [:bridge, :pool, :number]))

  # Not by Bridge.call, which emits telemetry events. If the peer dies, its successor is not asked.
  defp stats(server, timeout) do
    case Caller.exchange(server, :get_stats, %{}, timeout, retry: false) do
      {:ok, _id, %{} = stats, _meta} -> figures(stats)
      _no_answer -> %{}
    end
  end

  # Another peer script may answer anything.
  defp figures(
         %{"in_flight" => in_flight, "queued" => queued, "uptime" => uptime} =
           %{"memory_usage" => %{"rss" => rss}, "commands" => %{} = commands} = stats
       )
       when is_number(uptime) do
    executes = commands["execute_program"] || %{}
    calls = for {name, command} <- commands, name != "get_stats", do: command["count"]

    %{
      in_flight: in_flight,
      queued: queued,
      lm_waiting: stats["lm_waiting"],
      p50_ms: executes["p50_ms"],
      p99_ms: executes["p99_ms"],
      rss_bytes: rss,
      executes: executes["count"] || 0,
      errors: executes["errors"] || 0,
      calls: Enum.sum(calls),
      stats_at_ms: round(uptime * 1_000)
    }
  end

  defp figures(_other), do: %{}
end
