defmodule DSPex.PythonBridge.Top.Table do
  @moduledoc false
  # A snapshot of `DSPex.PythonBridge.Top` as tables of text: the bridges, and the runs if there are any; nil is shown as
  # `-`.

  alias DSPex.PythonBridge.Evaluate
  alias DSPex.PythonBridge.Top

  # Left out of the library's own names: a line should fit into 110 columns.
  @prefix "DSPex.PythonBridge."

  @header ["bridge", "state", "pid", "pending", "runs", "queued", "limited"] ++
            ["p50", "p99", "errors", "memory", "restarts", "calls/s", "uptime"]

  @runs ["run", "on", "done", "score", "failed", "LM calls", "time"]
  @longest_id 40

  @doc ~S"""
  The tables: a line with the node and the time, the columns' names, a line for each peer; then those of the runs.

      iex> snapshot = %{node: :app@host, time: "2026-01-01T00:00:00Z", peers: [], runs: []}
      iex> IO.iodata_to_binary(DSPex.PythonBridge.Top.Table.render(snapshot))
      "app@host  2026-01-01T00:00:00Z\nno bridges run here\n"
  """
  @spec render(Top.snapshot()) :: iodata()
  def render(%{node: node, time: time, peers: peers, runs: runs}),
    do: ["#{node}  #{time}\n", peers(peers), runs(runs)]

  defp peers([]), do: "no bridges run here\n"
  defp peers(peers), do: table([@header | Enum.map(peers, &line/1)])

  defp runs([]), do: []
  defp runs(runs), do: ["\n", table([@runs | Enum.map(runs, &run/1)])]

  defp table(lines) do
    widths =
      Enum.zip_with(lines, fn column -> column |> Enum.map(&String.length/1) |> Enum.max() end)

    Enum.map(lines, &aligned(&1, widths))
  end

  ## Cells

  defp line(peer) do
    [
      name(peer),
      cell(peer.state, &to_string/1),
      cell(peer.os_pid, &to_string/1),
      cell(peer.pending, &to_string/1),
      cell(peer.in_flight, &to_string/1),
      cell(peer.queued, &to_string/1),
      cell(peer.lm_waiting, &to_string/1),
      cell(peer.p50_ms, &ms/1),
      cell(peer.p99_ms, &ms/1),
      cell(peer.errors, &to_string/1),
      cell(peer.rss_bytes, &bytes/1),
      cell(peer.restarts, &to_string/1),
      cell(peer.calls_per_s, &decimal/1),
      cell(peer.uptime_ms, &duration/1)
    ]
  end

  defp run(run) do
    [
      "#{run.kind} #{cell(run.program, &id/1)}",
      short(run.server),
      done(run),
      cell(run.score, &Evaluate.Table.number/1),
      cell(run.failed, &to_string/1),
      cell(run.lm_calls, &to_string/1),
      duration(run.elapsed_ms)
    ]
  end

  defp done(%{done: done, total: nil}), do: cell(done, &to_string/1)
  defp done(%{done: done, total: total}), do: "#{cell(done, &to_string/1)}/#{total}"

  # Any text, as its caller has given it.
  defp id(text), do: text |> String.slice(0, @longest_id) |> inspect() |> String.trim("\"")

  defp name(%{pool: pool, number: number}) when pool != nil, do: "#{short(pool)} #{number}"
  defp name(%{bridge: bridge}), do: short(bridge)

  defp short(@prefix <> rest), do: rest
  defp short(name), do: name

  defp cell(nil, _text), do: "-"
  defp cell(value, text), do: text.(value)

  defp ms(ms) when ms < 999.5, do: decimal(ms) <> " ms"
  defp ms(ms), do: decimal(ms / 1_000) <> " s"

  defp bytes(bytes) when bytes < 9_999_500_000, do: decimal(bytes / 1_000_000) <> " MB"
  defp bytes(bytes), do: decimal(bytes / 1_000_000_000) <> " GB"

  defp duration(ms) when ms < 60_000, do: "#{div(ms, 1_000)} s"
  defp duration(ms) when ms < 3_600_000, do: "#{div(ms, 60_000)} min"
  defp duration(ms) when ms < 172_800_000, do: "#{div(ms, 3_600_000)} h"
  defp duration(ms), do: "#{div(ms, 86_400_000)} d"

  # Two digits at least.
  defp decimal(n) when n < 9.95, do: :erlang.float_to_binary(n / 1, decimals: 1)
  defp decimal(n), do: n |> round() |> Integer.to_string()

  ## Columns: the first two on the left, numbers on the right

  defp aligned([name, state | numbers], [name_width, state_width | widths]) do
    numbers = Enum.zip_with(numbers, widths, &[" ", blanks(&1, &2), &1])
    [name, blanks(name, name_width), "  ", state, blanks(state, state_width), numbers, "\n"]
  end

  defp blanks(text, width), do: String.duplicate(" ", width - String.length(text))
end
