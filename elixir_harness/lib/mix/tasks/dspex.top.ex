defmodule Mix.Tasks.Dspex.Top do
  @shortdoc "Shows the running bridges: calls, times, memory; evaluations and optimizations"

  @moduledoc """
  Shows the bridges of a node in a table, once a second, until it is ended (Ctrl-C twice).

      $ mix dspex.top --node my_app@10.0.0.7
      my_app@10.0.0.7  2026-01-01T00:00:00Z
      bridge  state     pid pending runs queued limited    p50   p99 errors memory restarts calls/s uptime
      Pool 1  running 40117      12   12      0       0 812 ms 2.1 s      3 141 MB        0      14  3 min
      Pool 2  running 40120      11   11      0       2 797 ms 2.0 s      0 139 MB        1      13   41 s

      run                on     done score failed LM calls time
      evaluate triage    Pool 96/250 0.823      1       97 11 s
      optimize summarize Pool  14/40 0.610      -      512 4 min

    * `--node NAME@HOST` – a running node that has `:dspex`. Without it, the application of this project
      is started, and its bridges are shown
    * `--once` – one table, after a second; its `calls/s` are of that second
    * `--json` – an object on one line in place of each table: `node`, `time`, `peers`, a list whose keys
      are those of `t:DSPex.PythonBridge.Top.peer/0`, and `runs`, whose are those of `t:DSPex.PythonBridge.Top.run/0`

  The columns: calls that wait for a reply in the BEAM (`pending`), `execute_program` calls that run in Python
  (`runs`) or wait for a slot there (`queued`), LM calls that wait for the limits of their account (`limited`), the median and the 99th percentile of the last 1000 of them, how many of
  all that this process has run failed (`errors`), its memory, how often it was replaced, calls per second since the
  last table (of all commands but `get_stats`, which this task uses), and how long it has run. `-` is unknown:
  while a peer starts, for example, or if it does not answer within half a second.

  Below them are the evaluations and optimizations that processes of that node have begun
  (`DSPex.PythonBridge.Evaluate`, `DSPex.PythonBridge.Optimize`), if there are any: how many examples or steps are done,
  the score so far, or the best one, how many runs failed, LM calls, and the time since it began.

  If a node cannot be reached, or has no `:dspex`, one line says so, and the exit status is 1. If the connection
  is lost later, it is tried again once a second, with a line each time; with `--json`, an object that has `error` in
  place of `peers`.

  The cookie is that of `~/.erlang.cookie`, or the one that Elixir is started with:

      $ elixir --cookie COOKIE -S mix dspex.top --node my_app@10.0.0.7

  This node stays hidden from the other node's cluster. Without Mix: `DSPex.PythonBridge.Top.print/0`.
  """

  use Mix.Task

  alias DSPex.PythonBridge.Top
  alias DSPex.PythonBridge.Top.{Remote, Table}

  @switches [node: :string, once: :boolean, json: :boolean]
  @second 1_000

  @impl Mix.Task
  @spec run([String.t()]) :: :ok
  def run(args) do
    options = parse(args)
    node = if options[:node], do: or_raise(Remote.node(options[:node])), else: start(options)
    first = or_raise(Remote.snapshot(node))
    if options[:once], do: once(first, node, options), else: watch(first, node, options)
  end

  ## Arguments

  defp parse(args) do
    case OptionParser.parse!(args, strict: @switches) do
      {options, []} ->
        options

      {_options, _words} ->
        Mix.raise("mix dspex.top takes switches only; see mix help dspex.top")
    end
  end

  ## The node

  defp start(options) do
    if options[:json], do: keep_output_clean()
    Mix.Task.run("app.start")
    node()
  end

  # The compiler and Logger write to standard output, which must have JSON only.
  defp keep_output_clean do
    Mix.DSPex.load_config(quiet: true)
  end

  defp or_raise({:ok, value}), do: value
  defp or_raise({:error, text}), do: Mix.raise(text)

  ## Output

  defp once(earlier, node, options) do
    Process.sleep(@second)
    node |> Remote.snapshot() |> or_raise() |> Top.with_rates(earlier) |> show(options)
  end

  @spec watch(Top.snapshot(), node(), keyword()) :: no_return()
  defp watch(snapshot, node, options) do
    show(snapshot, options)
    node |> next(options) |> Top.with_rates(snapshot) |> watch(node, options)
  end

  # A second later; with a line for each second without a snapshot.
  defp next(node, options) do
    Process.sleep(@second)

    case Remote.snapshot(node) do
      {:ok, snapshot} ->
        snapshot

      {:error, text} ->
        show_error(node, text, options)
        next(node, options)
    end
  end

  defp show(snapshot, options),
    do: if(options[:json], do: put_json(snapshot), else: put(Table.render(snapshot), options))

  defp show_error(node, text, options) do
    time = DateTime.utc_now() |> DateTime.truncate(:second) |> DateTime.to_iso8601()

    if options[:json],
      do: put_json(%{node: node, time: time, error: text}),
      else: put([to_string(node), "  ", time, "\n", text, "; trying again\n"], options)
  end

  defp put_json(map), do: IO.write([JSON.encode!(map), "\n"])

  defp put(text, options) do
    if !options[:once] and terminal?(),
      do: IO.write([IO.ANSI.clear(), IO.ANSI.home(), text]),
      else: IO.write([text, "\n"])
  end

  defp terminal? do
    options = :io.getopts()
    is_list(options) and Keyword.get(options, :stdout, false)
  end
end
