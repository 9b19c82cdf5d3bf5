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

  `--node` names a running node that has `:dspex`. Without it, the application of this project is started, and its bridges are
  shown.

  The columns: calls that wait for a reply in the BEAM (`pending`), `execute_program` calls that run in Python
  (`runs`) or wait for a slot there (`queued`), LM calls that wait for the limits of their account (`limited`), the median and the 99th percentile of the last 1000 of them, how many of
  all that this process has run failed (`errors`), its memory, how often it was replaced, calls per second since the
  last table (of all commands but `get_stats`, which this task uses), and how long it has run. `-` is unknown:
  while a peer starts, for example, or if it does not answer within half a second.

  Below them are the evaluations and optimizations that processes of that node have begun
  (`DSPex.PythonBridge.Evaluate`, `DSPex.PythonBridge.Optimize`), if there are any: how many examples or steps are done,
  the score so far, or the best one, how many runs failed, LM calls, and the time since it began.

  If a node cannot be reached, or has no `:dspex`, one line says so, and the exit status is 1. If the connection
  is lost later, it is tried again once a second, with a line each time.

  The cookie is that of `~/.erlang.cookie`, or the one that Elixir is started with:

      $ elixir --cookie COOKIE -S mix dspex.top --node my_app@10.0.0.7

  This node stays hidden from the other node's cluster. Without Mix: `DSPex.PythonBridge.Top.print/0`.
  """

  use Mix.Task

  alias DSPex.PythonBridge.Top

  @second 1_000
  # A snapshot takes one second at most.
  @answer_ms 3_000

  @impl Mix.Task
  @spec run([String.t()]) :: no_return()
  def run(args) do
    node =
      case OptionParser.parse!(args, strict: [node: :string]) do
        {[], []} -> start()
        {[node: name], []} -> distribute(name)
        _others -> Mix.raise("mix dspex.top takes --node NAME@HOST only; see mix help dspex.top")
      end

    case snapshot(node) do
      {:ok, snapshot} -> watch(node, snapshot, nil)
      {:error, text} -> Mix.raise(text)
    end
  end

  defp start do
    Mix.Task.run("app.start")
    node()
  end

  # Hidden, and no other node connects to this one. The host of its own name only has to be of the right kind.
  defp distribute(name) do
    unless name =~ ~r/\A[^@\s]+@[^@\s]+\z/,
      do: Mix.raise("node: expected name@host, got #{inspect(name)}")

    {host, domain} =
      if String.contains?(name, "."),
        do: {"127.0.0.1", :longnames},
        else: {"localhost", :shortnames}

    options = %{name_domain: domain, hidden: true, dist_listen: false}
    own = :"dspex_top_#{System.pid()}@#{host}"

    # If that fails, the node cannot be reached.
    unless Node.alive?(), do: :net_kernel.start(own, options)
    String.to_atom(name)
  end

  @spec watch(node(), Top.snapshot(), Top.snapshot() | nil) :: no_return()
  defp watch(node, snapshot, earlier) do
    clear = if IO.ANSI.enabled?(), do: [IO.ANSI.clear(), IO.ANSI.home()], else: ""
    IO.write([clear, Top.table(snapshot, earlier), "\n"])
    watch(node, next(node), snapshot)
  end

  # A second later; with a line for each second without a snapshot.
  defp next(node) do
    Process.sleep(@second)

    with {:error, text} <- snapshot(node) do
      IO.puts(text <> "; trying again")
      next(node)
    else
      {:ok, snapshot} -> snapshot
    end
  end

  defp snapshot(node) do
    {:ok, :erpc.call(node, Top, :snapshot, [], @answer_ms)}
  catch
    :error, {:erpc, :noconnection} ->
      {:error,
       "#{node} cannot be reached: is it running, is that its whole name, and has this node its cookie?"}

    :error, {:exception, :undef, [{Top, :snapshot, _args, _where} | _]} ->
      {:error, "#{node} has no :dspex"}

    _kind, reason ->
      {:error, "#{node} failed to look at its bridges: #{inspect(reason)}"}
  end
end
