defmodule Mix.Tasks.Dspex.TopTest do
  @moduledoc "`mix dspex.top`: in this BEAM, and as a command."

  # It makes this a distributed node.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Bridge
  alias DSPex.Test.Nodes
  alias Mix.Tasks.Dspex.Top

  # Runs until the test is over; gives the device that it writes to.
  defp watch(args) do
    {:ok, io} = StringIO.open("")
    task = fn -> Process.group_leader(self(), io) && Top.run(args) end
    start_supervised!({Task, task})
    io
  end

  defp lines(io), do: io |> StringIO.contents() |> elem(1) |> String.split("\n", trim: true)
  defp refusal(args), do: assert_raise(Mix.Error, fn -> Top.run(args) end).message

  test "another node's tables come one after another, until it is lost, and when it is back" do
    Nodes.distribute()
    node = Nodes.start()
    spec = {Bridge, real_opts(name: :far)}
    {:ok, _} = Nodes.on(node, Supervisor, :start_child, [DSPex.ApplicationSupervisor, spec])
    eventually(fn -> Bridge.get_status({:far, node}).state == :running end, 20_000)
    :ok = Nodes.on(node, :logger, :set_primary_config, [:level, :none])
    io = watch(["--node", Atom.to_string(node)])
    # With calls per second since the first table.
    later? = &(&1 =~ ~r/^:far +running .* 0 +0.0 +\d+ s$/)
    eventually(fn -> Enum.any?(lines(io), later?) end, 20_000)
    assert [_node, "bridge " <> _, first | _] = lines(io)
    assert first =~ ~r/^:far +running .* 0 +- +\d+ s$/

    lost = "#{node} cannot be reached: "
    Nodes.split(node, fn -> eventually(fn -> List.last(lines(io)) =~ lost end, 20_000) end)
    eventually(fn -> List.last(lines(io)) =~ ":far " end, 20_000)
  end

  test "without --node the bridges of this BEAM are shown" do
    bridge = start_supervised!({Bridge, real_opts()})
    eventually(fn -> Bridge.get_status(bridge).state == :running end, 20_000)
    io = watch([])
    eventually(fn -> Enum.any?(lines(io), &String.starts_with?(&1, inspect(bridge))) end, 20_000)
  end

  test "a node that cannot be shown: one line" do
    Nodes.distribute()
    assert refusal(["--node", "nobody@127.0.0.1"]) =~ ~r/\Anobody@127.0.0.1 cannot be reached: is/
    args = [~c"-setcookie", Atom.to_charlist(Node.get_cookie())]
    name = %{name: :peer.random_name(~c"bare"), host: ~c"127.0.0.1", longnames: true}
    {:ok, _peer, node} = :peer.start_link(Map.put(name, :args, args))
    assert refusal(["--node", Atom.to_string(node)]) == "#{node} has no :dspex"
    assert refusal(["--node", "here"]) == ~s(node: expected name@host, got "here")
    assert refusal(["secret"]) =~ ~r/\Amix dspex.top takes --node NAME@HOST only; see /
  end

  test "the command, with a cookie: this node has no name before" do
    Nodes.distribute()
    node = Nodes.start()
    :ok = Nodes.on(node, :logger, :set_primary_config, [:level, :none])
    args = ["--cookie", "no-such-cookie", "-S", "mix", "dspex.top", "--node", "#{node}"]
    opts = [env: [{"MIX_ENV", "test"}], stderr_to_stdout: true]
    assert {output, 1} = System.cmd("elixir", args, opts)

    assert output =~
             "** (Mix) #{node} cannot be reached: is it running, is that its whole name, and"
  end
end
