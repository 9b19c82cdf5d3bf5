defmodule DSPex.Test.Nodes do
  @moduledoc """
  Other BEAM nodes on loopback, with this project's code, for tests of the cluster. They end with the
  process that started them, a test's.

  Each is controlled by a connection of its own (`:peer`'s), separate from the distribution: so a test can look
  at a node that is out of reach of this one.
  """

  import DSPex.Test.Helpers, only: [eventually: 1, eventually: 2]

  @host ~c"127.0.0.1"
  @ms 20_000

  @doc "Makes this node one of a cluster, until the tests are over."
  def distribute do
    unless Node.alive?() do
      # It stays if it is there; nothing else is needed of it.
      {_, 0} = System.cmd("epmd", ["-daemon"])
      {:ok, _} = :net_kernel.start([:"tests#{System.pid()}@127.0.0.1", :longnames])
    end

    :ok
  end

  @doc "Starts a node, connected to this one, with the application running."
  def start do
    # Found again by the node's name: see peer/1.
    {:ok, peer, node} =
      :peer.start_link(%{
        name: :peer.random_name(~c"dspex"),
        host: @host,
        longnames: true,
        connection: {{127, 0, 0, 1}, 0},
        args: [~c"-connect_all", ~c"false", ~c"-setcookie", Atom.to_charlist(Node.get_cookie())]
      })

    Process.put({__MODULE__, node}, peer)
    :ok = :peer.call(peer, :code, :add_paths, [:code.get_path()], @ms)

    :ok =
      :peer.call(
        peer,
        :application,
        :set_env,
        [:dspex, :autostart, false, [persistent: true]],
        @ms
      )

    :ok =
      :peer.call(peer, :application, :set_env, [:logger, :level, :error, [persistent: true]], @ms)

    {:ok, _} = :peer.call(peer, :application, :ensure_all_started, [:dspex], @ms)
    connect(peer)
    node
  end

  # To all that are there: this one and its others.
  defp connect(peer) do
    for node <- [Node.self() | Node.list()], do: :peer.call(peer, Node, :connect, [node], @ms)
    :ok
  end

  @doc "Starts a pool there that outlives the call: below the application's supervisor."
  def start_pool(node, opts) do
    spec = DSPex.PythonBridge.Pool.child_spec(opts)
    {:ok, pool} = on(node, Supervisor, :start_child, [DSPex.ApplicationSupervisor, spec])
    pool
  end

  @doc "Calls a function on a node, this one included."
  def on(node, module, function, args) when node == node(), do: apply(module, function, args)
  def on(node, module, function, args), do: :erpc.call(node, module, function, args, @ms)

  @doc "For a process of another node that is to do nothing until it is killed: it has no functions of a test's."
  def stay(_any), do: Process.sleep(:infinity)

  @doc "The same past the distribution, to a node that may be out of reach."
  def aside(node, module, function, args), do: :peer.call(peer(node), module, function, args, @ms)

  @doc "Ends a node at once."
  def stop(node) do
    os_pid = aside(node, System, :pid, [])
    Process.unlink(peer(node))
    {_, 0} = System.cmd("/bin/sh", ["-c", "kill -9 #{os_pid}"])
    eventually(fn -> node not in Node.list() end)
  end

  @doc "Runs `fun` while this node and that one are out of reach of each other, then connects them again."
  def split(node, fun) do
    cookie = Node.get_cookie()
    # A connection would be made again with the next message.
    Node.set_cookie(node, :another)
    aside(node, Node, :set_cookie, [node(), :yet_another])
    Node.disconnect(node)
    eventually(fn -> node not in Node.list() end)

    try do
      fun.()
    after
      Node.set_cookie(node, cookie)
      aside(node, Node, :set_cookie, [node(), cookie])
      eventually(fn -> Node.connect(node) == true end, 10_000)
    end
  end

  defp peer(node), do: Process.get({__MODULE__, node})
end
