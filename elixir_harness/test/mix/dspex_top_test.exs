defmodule Mix.Tasks.Dspex.TopTest do
  @moduledoc "`mix dspex.top`: in this BEAM, and as a command."

  # It makes this a distributed node.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import ExUnit.CaptureIO

  alias DSPex.PythonBridge.Bridge
  alias DSPex.PythonBridge.Telemetry.RunSpan
  alias DSPex.Test.Nodes
  alias Mix.Tasks.Dspex.Top

  setup_all do
    Nodes.distribute()
    # For the tests that neither lose nor end one.
    %{far: node_with_bridge(), bare: Nodes.start()}
  end

  defp node_with_bridge do
    node = Nodes.start()
    spec = {Bridge, real_opts(name: :far)}
    {:ok, _} = Nodes.on(node, Supervisor, :start_child, [DSPex.ApplicationSupervisor, spec])
    eventually(fn -> Bridge.get_status({:far, node}).state == :running end, 20_000)
    node
  end

  # It would log the connections that it refuses.
  defp quiet(node) do
    :ok = Nodes.on(node, :logger, :set_primary_config, [:level, :none])
    node
  end

  # The command itself: the lines that it wrote, errors included, and its exit status. In this project,
  # where it is not a dependency, mix compiles first if anything has changed.
  defp mix(args, cookie) do
    args = ["--cookie", cookie, "-S", "mix", "dspex.top" | args]
    opts = [env: [{"MIX_ENV", "test"}], stderr_to_stdout: true]
    {output, status} = System.cmd("elixir", args, opts)
    {output |> String.trim() |> String.split("\n"), status}
  end

  # Runs until the test is over; gives the device that it writes to.
  defp watch(args) do
    {:ok, io} = StringIO.open("")
    watch(args, io)
    io
  end

  defp watch(args, device) do
    start_supervised!(
      {Task,
       fn ->
         Process.group_leader(self(), device)
         Top.run(args)
       end}
    )
  end

  defp lines(text) when is_binary(text), do: String.split(text, "\n", trim: true)
  defp lines(io), do: io |> StringIO.contents() |> elem(1) |> lines()
  defp refusal(args), do: assert_raise(Mix.Error, fn -> Top.run(args) end).message

  describe "the command" do
    test "shows a node by name and cookie as JSON; the task in this BEAM shows it as a table", %{
      far: node
    } do
      # Not that of ~/.erlang.cookie; who is connected stays so.
      cookie = "cookie#{System.unique_integer([:positive])}"
      true = Nodes.on(node, :erlang, :set_cookie, [String.to_atom(cookie)])
      args = ["--node", Atom.to_string(node), "--once"]
      assert {lines, 0} = mix(["--json" | args], cookie)
      assert %{"node" => name, "time" => time, "peers" => [peer]} = JSON.decode!(List.last(lines))
      assert name == Atom.to_string(node)
      assert {:ok, _time, 0} = DateTime.from_iso8601(time)
      assert %{"bridge" => ":far", "state" => "running"} = peer
      assert peer["calls_per_s"] == 0.0
      assert %{"pool" => nil, "in_flight" => 0, "queued" => 0, "rss_bytes" => rss} = peer
      assert rss > 10_000_000
      assert peer["os_pid"] == Bridge.get_status({:far, node}).os_pid

      text = capture_io(fn -> Top.run(args) end)
      assert [heading, "bridge " <> _, ":far    running " <> _] = lines(text)
      assert heading =~ ~r/\A#{node}  \d{4}-/
    end

    test "fails with one line if the cookie is not the node's" do
      node = quiet(Nodes.start())
      assert {lines, 1} = mix(["--node", Atom.to_string(node)], "no-such-cookie")

      assert List.last(lines) ==
               "** (Mix) #{node} cannot be reached: is it running, is that its whole name, and has this node its cookie?"
    end
  end

  describe "a node that cannot be shown" do
    test "is not there" do
      for node <- ["nobody@127.0.0.1", "nobody@no-host.invalid"],
          do:
            assert(refusal(["--node", node]) =~ ~r/\A#{node} cannot be reached: is it running, /)
    end

    test "has no :dspex" do
      args = [~c"-setcookie", Atom.to_charlist(Node.get_cookie())]
      name = %{name: :peer.random_name(~c"bare"), host: ~c"127.0.0.1", longnames: true}
      {:ok, _peer, node} = :peer.start_link(Map.put(name, :args, args))
      assert refusal(["--node", Atom.to_string(node)]) == "#{node} has no :dspex"
    end

    test "does not answer", %{bare: node} do
      os_pid = Nodes.on(node, System, :pid, [])
      {_, 0} = System.cmd("/bin/sh", ["-c", "kill -STOP #{os_pid}"])

      try do
        # It may still have answered the first question.
        args = ["--node", Atom.to_string(node), "--once"]
        assert refusal(args) =~ "#{node} does not answer within "
      after
        {_, 0} = System.cmd("/bin/sh", ["-c", "kill -CONT #{os_pid}"])
      end
    end
  end

  test "wrong switches are named, values that may be a secret are not" do
    for args <- [["--nod", "a@b"], ["--cookie=secret"], ["--cookie", "secret"], ["--node"]] do
      error = assert_raise OptionParser.ParseError, fn -> Top.run(args) end
      assert error.message =~ hd(String.split(hd(args), "="))
      refute error.message =~ "secret"
    end

    assert refusal(["secret"]) =~ ~r/\Amix dspex.top takes switches only; see /
    assert refusal(["--node", "here"]) == ~s(node: expected name@host, got "here")
    assert refusal(["--node", "a@b c"]) == ~s(node: expected name@host, got "a@b c")
    assert refusal(["--node", "a@" <> String.duplicate("b", 254)]) =~ "node: expected name@host"
  end

  describe "evaluations and optimizations" do
    test "of another node are shown below its bridges, if it has any, until they end, or their caller does",
         %{bare: node} do
      about = %{program_id: "qa", telemetry_metadata: %{}}
      run = [:optimize, :there, about, %{done: 1, total: 2, score: 0.5}, &Nodes.stay/1]
      caller = Node.spawn(node, RunSpan, :run, run)
      args = ["--node", Atom.to_string(node), "--once"]
      show = fn more -> capture_io(fn -> Top.run(args ++ more) end) end

      json = Task.async(fn -> show.(["--json"]) end)

      assert show.([]) =~
               ~r/^no bridges run here\n\nrun .*\noptimize qa +:there +1\/2 0.500 +- +- +\d s$/m

      assert %{"runs" => [json]} = JSON.decode!(Task.await(json, 20_000))
      assert %{"kind" => "optimize", "program" => "qa", "done" => 1, "score" => 0.5} = json
      Process.exit(caller, :kill)
      eventually(fn -> Nodes.on(node, DSPex.PythonBridge.Top, :snapshot, []).runs == [] end)
      assert %{"runs" => []} = JSON.decode!(show.(["--json"]))
    end
  end

  describe "without --node" do
    test "the bridges of this BEAM are shown" do
      bridge = start_supervised!({Bridge, real_opts()})
      eventually(fn -> Bridge.get_status(bridge).state == :running end, 20_000)
      shell = Mix.shell()
      json = capture_io(fn -> Top.run(["--once", "--json"]) end)
      assert %{"peers" => peers} = JSON.decode!(json)
      assert %{"calls" => 1} = Enum.find(peers, &(&1["bridge"] == inspect(bridge)))
      assert Mix.shell() == shell
    end
  end

  describe "without --once" do
    test "tables come one after another; the second has calls per second", %{far: node} do
      io = watch(["--node", Atom.to_string(node)])
      eventually(fn -> length(lines(io)) >= 6 end, 20_000)
      [_, header, first, _, header, second | _] = lines(io)
      assert first =~ ~r/ 0 +- +\d+ s$/
      assert second =~ ~r/ 0 +0.0 +\d+ s$/
      refute elem(StringIO.contents(io), 1) =~ "\e"
    end

    test "on a terminal each table takes the place of the last", %{bare: node} do
      test = self()
      node = Atom.to_string(node)
      watch(["--node", node], spawn_link(fn -> terminal(test) end))
      for _ <- 1..2, do: assert_receive({:shown, "\e[2J\e[H" <> ^node <> "  " <> _}, 20_000)
    end

    test "a lost node is tried again until it is back, with a line each time" do
      node = quiet(node_with_bridge())
      io = watch(["--json", "--node", Atom.to_string(node)])
      maps = fn -> Enum.map(lines(io), &JSON.decode!/1) end
      eventually(fn -> match?([%{"peers" => [_]} | _], maps.()) end, 20_000)

      Nodes.split(node, fn ->
        eventually(fn -> Enum.count(maps.(), & &1["error"]) >= 2 end, 20_000)
      end)

      lost = Enum.find(maps.(), & &1["error"])
      assert lost["error"] =~ "#{node} cannot be reached: "
      assert lost["node"] == Atom.to_string(node)
      assert {:ok, _time, 0} = DateTime.from_iso8601(lost["time"])
      eventually(fn -> match?(%{"peers" => [_]}, List.last(maps.())) end, 20_000)
    end
  end

  # An output device that says it is one.
  defp terminal(test) do
    receive do
      {:io_request, from, ref, {:put_chars, :unicode, chars}} ->
        send(test, {:shown, IO.chardata_to_string(chars)})
        send(from, {:io_reply, ref, :ok})

      {:io_request, from, ref, :getopts} ->
        send(from, {:io_reply, ref, [stdout: true]})
    end

    terminal(test)
  end
end
