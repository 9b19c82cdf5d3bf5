defmodule DSPex.PythonBridge.Top do
  @moduledoc """
  The state of all bridges of a node, however they were started, and the evaluations and optimizations that it runs.
  `mix dspex.top` shows it; without Mix:

      iex> DSPex.PythonBridge.Top.print()

      $ bin/my_app rpc "DSPex.PythonBridge.Top.print()"

  All peers are asked for their `get_stats` at once, with a short timeout. These calls emit no telemetry events and are not
  among the counted calls.
  """

  alias DSPex.PythonBridge.{Bridge, Evaluate}
  alias DSPex.PythonBridge.Pool.LoadCounters
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.OTP.Registry
  alias DSPex.PythonBridge.Pool.Handle
  alias DSPex.PythonBridge.Programs.Declared
  alias DSPex.PythonBridge.Telemetry.RunSpan

  # A peer answers in a millisecond, after a big frame in about ten.
  @stats_ms 500
  # Left out of the library's own names: a line should fit into 110 columns.
  @prefix "DSPex.PythonBridge."
  @runs ["run", "on", "done", "score", "failed", "LM calls", "time"]

  @typedoc """
  A bridge and its peer. Keys whose values are not known are missing: while a peer starts, or if it does not answer.

    * `bridge` – its name, or its pid where it has none, as `inspect/1` writes them; `server` – the same as a term
    * `pool`, `number` – of a member of a pool: the pool's name, and its place there; else nil
    * `state`, `os_pid`, `pending`, `restarts`, `uptime_ms` – see `DSPex.PythonBridge.Bridge.get_status/1`
    * `in_flight`, `queued`, `lm_waiting`, `p50_ms`, `p99_ms`, `errors`, `rss_bytes` – of the peer, see `mix help dspex.top`
    * `calls` – of all commands but `get_stats`, since the peer's start, which was `stats_at_ms` before
  """
  @type peer :: %{required(:bridge) => String.t(), optional(atom()) => term()}
  @typedoc """
  The `peers` are in the order of their names, the `runs` (evaluations and optimizations that processes of this node have
  begun) in that of their starts. `time` is in ISO 8601, UTC.
  """
  @type snapshot :: %{node: node(), time: String.t(), peers: [peer()], runs: [map()]}

  @doc """
  The bridges and runs of this node now. Options: `:timeout`, the time that a peer has to answer, in ms (default 500).
  """
  @spec snapshot([{:timeout, pos_integer()}]) :: snapshot()
  def snapshot(opts \\ []) do
    timeout = Keyword.get(opts, :timeout, @stats_ms)
    found = bridges()
    time = DateTime.utc_now() |> DateTime.truncate(:second) |> DateTime.to_iso8601()

    peers =
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
        {:exit, {bridge, _reason}} -> bridge
      end)

    %{node: node(), time: time, peers: peers, runs: RunSpan.list()}
  end

  @doc """
  Prints the tables of this node, and takes a second for the calls per second. `mix help dspex.top`
  explains the columns.
  """
  @spec print() :: :ok
  def print do
    earlier = snapshot()
    Process.sleep(1_000)
    IO.write(table(snapshot(), earlier))
  end

  ## The bridges: those of pools, of supervisors, and others

  defp bridges do
    # Each pool is in the list by its pid and by its name.
    members =
      for {pid, _handle} when is_pid(pid) <- Registry.list(:pool),
          handle = Handle.fetch(pid),
          index <- LoadCounters.indexes(handle.counters),
          do: found(Handle.bridge(handle, index), inspect(handle.name), index)

    names = MapSet.new(members, & &1.bridge)

    others =
      for {pid, %{name: name}} <- Registry.list(:bridge),
          inspect(name) not in names and Process.alive?(pid),
          do: %{found(name, nil, nil) | server: pid}

    Enum.sort_by(members ++ others, &{&1.pool || &1.bridge, &1.number})
  end

  defp found(name, pool, number),
    do: %{server: name, bridge: inspect(name), pool: pool, number: number}

  defp ask(%{server: server} = bridge, timeout) do
    status = Bridge.get_status(server)
    peer = Map.merge(bridge, status)

    # In any other state the call would wait for a peer.
    if status.state == :running, do: Map.merge(peer, stats(server, timeout)), else: peer
  end

  # Not by Bridge.call, which emits telemetry events. If the peer dies, its successor is not asked.
  defp stats(server, timeout) do
    case Caller.exchange(server, :get_stats, %{}, timeout, retry: false) do
      {:ok, _id, %{"commands" => %{} = commands, "uptime" => uptime} = stats, _meta} ->
        executes = commands["execute_program"] || %{}
        calls = for {name, %{"count" => count}} <- commands, name != "get_stats", do: count

        %{
          in_flight: stats["in_flight"],
          queued: stats["queued"],
          lm_waiting: stats["lm_waiting"],
          p50_ms: executes["p50_ms"],
          p99_ms: executes["p99_ms"],
          errors: executes["errors"] || 0,
          rss_bytes: stats["memory_usage"]["rss"],
          calls: Enum.sum(calls),
          stats_at_ms: round(uptime * 1_000)
        }

      _no_answer ->
        %{}
    end
  end

  ## As tables of text

  @doc false
  # The calls per second are those since an earlier snapshot, by the peer's clock.
  @spec table(snapshot(), snapshot() | nil) :: iodata()
  def table(%{node: node, time: time, peers: peers, runs: runs}, earlier) do
    before = Map.new((earlier && earlier.peers) || [], &{{&1.bridge, &1[:os_pid]}, &1})
    lines = for peer <- peers, do: line(peer, before[{peer.bridge, peer[:os_pid]}])
    head = ~w(bridge state pid pending runs queued limited p50 p99 errors memory restarts calls/s)

    [
      "#{node}  #{time}\n",
      if(peers == [], do: "no bridges run here\n", else: aligned([head ++ ["uptime"] | lines])),
      if(runs == [], do: "", else: ["\n", aligned([@runs | Enum.map(runs, &run/1)])])
    ]
  end

  defp line(peer, earlier) do
    [
      if(peer.pool, do: "#{short(peer.pool)} #{peer.number}", else: short(peer.bridge)),
      cell(peer[:state]),
      cell(peer[:os_pid]),
      cell(peer[:pending]),
      cell(peer[:in_flight]),
      cell(peer[:queued]),
      cell(peer[:lm_waiting]),
      cell(peer[:p50_ms], &ms/1),
      cell(peer[:p99_ms], &ms/1),
      cell(peer[:errors]),
      cell(peer[:rss_bytes], &"#{round(&1 / 1_000_000)} MB"),
      cell(peer[:restarts]),
      cell(rate(peer, earlier)),
      cell(peer[:uptime_ms], &duration/1)
    ]
  end

  defp rate(%{calls: calls, stats_at_ms: at}, %{calls: calls_then, stats_at_ms: then})
       when at > then,
       do: Float.round((calls - calls_then) * 1_000 / (at - then), 1)

  defp rate(_peer, _unknown), do: nil

  defp run(%{metadata: metadata, figures: figures} = run) do
    total = if figures[:total], do: "/#{figures.total}"

    [
      "#{run.kind} #{cell(metadata.program_id, &Declared.shown/1)}",
      short(inspect(metadata.pool || metadata.bridge)),
      "#{cell(figures[:done])}#{total}",
      cell(figures[:score], &Evaluate.Table.number/1),
      cell(figures[:failed]),
      cell(figures[:lm_calls]),
      duration(run.elapsed_ms)
    ]
  end

  defp short(@prefix <> rest), do: rest
  defp short(name), do: name

  defp cell(value, text \\ &to_string/1)
  defp cell(nil, _text), do: "-"
  defp cell(value, text), do: text.(value)

  defp ms(ms) when ms < 999.5, do: "#{round(ms)} ms"
  defp ms(ms), do: "#{Float.round(ms / 1_000, 1)} s"

  defp duration(ms) when ms < 60_000, do: "#{div(ms, 1_000)} s"
  defp duration(ms) when ms < 3_600_000, do: "#{div(ms, 60_000)} min"
  defp duration(ms), do: "#{div(ms, 3_600_000)} h"

  # The first two columns on the left, numbers on the right.
  defp aligned(lines) do
    widths =
      Enum.zip_with(lines, fn cells -> cells |> Enum.map(&String.length/1) |> Enum.max() end)

    for line <- lines do
      [name, state | numbers] = Enum.zip(line, widths)
      padded = for {cell, width} <- numbers, do: [" ", String.pad_leading(cell, width)]
      [left(name), "  ", left(state), padded, "\n"]
    end
  end

  defp left({cell, width}), do: String.pad_trailing(cell, width)
end
