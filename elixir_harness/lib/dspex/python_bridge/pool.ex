defmodule DSPex.PythonBridge.Pool do
  @moduledoc """
  A pool of bridges: each call goes to the least busy peer that is up, and to another one if that dies.

      {:ok, _} = Pool.start_link(lm: "openai/gpt-4o-mini", pool_size: 3)
      {:ok, _} = Pool.call(:create_program, %{id: "qa", signature: "question -> answer"})
      {:ok, %{"answer" => _}} =
        Pool.call(:execute_program, %{program_id: "qa", inputs: %{question: "Why?"}})

  A peer works on many calls at once, so one is often enough. Several use more than one core, and serve calls during the
  second that a new peer needs to import DSPy.

  `create_program` and `cleanup` apply to all peers, and a restarted peer gets all programs before it serves
  anything. `checkout/1` reserves a peer for one process.

  Pools of the same `:cluster` on connected nodes serve each other's calls if they cannot serve their own, and share
  their programs: see docs/cluster.md.

  The caller's process picks the peer and sends the call; no process of the pool is in between.
  """

  import DSPex.PythonBridge.Pool.Sums, only: [is_summed: 1]

  alias DSPex.PythonBridge.{Bridge, Calls, Error, Options, Pool, Protocol, Telemetry}
  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Pool.{CoordinatorClient, Handle, Request, Router, Sums}
  alias DSPex.PythonBridge.Pool.Cluster.Membership
  alias DSPex.PythonBridge.Programs.{Change, Tools}
  alias DSPex.PythonBridge.Telemetry.CallSpan

  # The coordinator answers at once, unless it is being restarted.
  @coordinator_ms 5_000

  @typedoc "The name of a pool, or its pid."
  @type pool :: atom() | pid()
  @type status :: %{peers: [peer()], nodes: [node()]}
  @type peer :: %{
          bridge: atom(),
          os_pid: pos_integer() | nil,
          state: :starting | :running | :restarting | :failed,
          pending: non_neg_integer(),
          checked_out: boolean(),
          monitor: atom()
        }

  @doc """
  Starts a pool. Options, in addition to those of `DSPex.PythonBridge.Options`, which apply to all its bridges:

    * `:name` – an atom; by default this module. The names of the bridges are made from it
    * `:pool_size` – the number of peers; by default 3
    * `:cluster` – the name of the cluster, an atom or a string; by default nil, none

  `:default_timeout` is also that of the pool's calls, and `:max_retries` is how often a call is sent again after a peer
  died with it. Returns before the interpreters run. A wrong option gives `{:error, %ArgumentError{}}` with a
  text that names it.
  """
  @spec start_link(keyword()) :: Supervisor.on_start() | {:error, Exception.t()}
  def start_link(opts \\ []) do
    with {:ok, settings} <- Pool.Options.new(opts, __MODULE__),
         do: Pool.Supervisor.start_link(settings)
  end

  @doc """
  The child specification of `{Pool, opts}`; the id is the pool's name. Keys in the options do not show in the
  supervisor's reports.
  """
  @spec child_spec(keyword()) :: Supervisor.child_spec()
  def child_spec(opts) do
    %{
      id: if(Keyword.keyword?(opts), do: opts[:name]) || __MODULE__,
      start: {__MODULE__, :start_link, [Options.seal(opts)]},
      type: :supervisor
    }
  end

  ## Calls

  @doc "As `call/4`, to the pool named `DSPex.PythonBridge.Pool`."
  @spec call(Bridge.command()) :: {:ok, term()} | {:error, Bridge.call_error()}
  def call(command), do: call(__MODULE__, command, %{}, :default)

  @doc "`call(command, args)` or `call(pool, command)`: as `call/4`."
  @spec call(Bridge.command() | pool(), map() | Bridge.command()) ::
          {:ok, term()} | {:error, Bridge.call_error()}
  def call(pool, command) when is_atom(command) or is_binary(command),
    do: call(pool, command, %{}, :default)

  def call(command, args), do: call(__MODULE__, command, args, :default)

  @doc "`call(command, args, timeout)` or `call(pool, command, args)`: as `call/4`."
  @spec call(Bridge.command() | pool(), map() | Bridge.command(), timeout() | :default | map()) ::
          {:ok, term()} | {:error, Bridge.call_error()}
  def call(pool, command, args) when is_map(args), do: call(pool, command, args, :default)
  def call(command, args, timeout), do: call(__MODULE__, command, args, timeout)

  @doc """
  Sends a command to a peer of the pool and waits for the reply, at most `timeout` ms. Arguments and results are
  those of `DSPex.PythonBridge.Bridge.call/4`.

  While no peer here or on another node can serve it, the call waits. `:python_process_died` is returned after
  `max_retries + 1` peers have died with the request; `:overloaded` if all peers that are up are overloaded.

  `create_program` and `cleanup` run on all peers, and on all nodes of the cluster. If such a call times out, or
  returns `:bridge_not_running` since the pool's coordinator crashed meanwhile, the change may still be made later.

  `get_stats` and `list_programs` ask all peers of this node, those that are checked out included, and add their answers:

    * `"peers"` is the number of peers that answered. `"missing"` has the names of the bridges, as strings, whose peer did
      not answer within 2 s, or the timeout if that is shorter; if none has by then, the first one that does is waited for
    * `get_stats`: `"programs_count"` is that of the pool; `"uptime"` and the quantiles are the largest; `"degraded"` has
      what any peer has; `"versions"` is of one peer, and `"pid"` is left out. All other numbers are sums: `"in_flight"`,
      `"queued"`, `"memory_usage"`, `"threads"`, and of each command `"count"` and `"errors"`
    * `list_programs`: the programs that any peer has. With `details`, `"execution_count"` is a sum, `"last_executed"` the
      latest, `"created_at"` the earliest
  """
  @spec call(pool(), Bridge.command(), map(), timeout() | :default) ::
          {:ok, term()} | {:error, Bridge.call_error()}
  def call(pool, command, args, timeout) do
    exchange = &exchange(pool, command, args, timeout, &1)

    case CallSpan.run(:pool, pool, command, args, [], exchange) do
      {:ok, _id, result, _meta} -> {:ok, result}
      {:error, error} -> {:error, Error.to_call_reason(error)}
    end
  end

  defp exchange(pool, command, args, timeout, opts) do
    started = Deadline.now()

    with %Handle{} = handle <- Handle.fetch(pool),
         {:ok, timeout} <- check_timeout(timeout, handle),
         :ok <- Tools.check(handle.programs, {:pool, handle.name}, command, args, nil),
         {:ok, body} <- Protocol.encode_body(command, args, opts) do
      if is_summed(command) do
        Sums.run(handle, command, args, Deadline.new(timeout, started))
      else
        request = Request.new(body, program(command, args), started, timeout)
        carry_out(handle, request, command, args)
      end
    else
      nil -> {:error, Error.not_running(:pool, pool)}
      {:error, error} -> {:error, error}
    end
  end

  defp check_timeout(:default, handle), do: {:ok, handle.settings.default_timeout}
  defp check_timeout(timeout, handle), do: Caller.check_timeout(timeout, handle.pid)

  defp carry_out(handle, request, command, args) do
    case Change.new(command, args) do
      nil -> Router.run(handle, request)
      change -> change(handle, request, change)
    end
  end

  defp change(handle, request, change) do
    case CoordinatorClient.await(handle.name, request.deadline) do
      nil ->
        {:error, Error.not_running(:pool, handle.name)}

      coordinator ->
        sent = %Calls.Request{body: request.body, change: change}
        Caller.read(Caller.send_and_wait(coordinator, Request.left(request), sent))
    end
  end

  defp program(command, args) when command in [:execute_program, "execute_program"],
    do: Change.program_id(command, args)

  defp program(_command, _args), do: nil

  ## Checkouts

  @doc """
  Checks out a peer of this node: `{:ok, bridge}`. `call/4` does not use it until it is checked in by `checkin/2`, or the
  calling process ends. Calls that it has already are still answered.

  `bridge` is a name for the functions of `DSPex.PythonBridge.Bridge`; it stays valid when the peer is restarted. If
  no other is free, a peer that is not up yet may be checked out: calls to it wait. If all are checked out, returns
  `{:error, :pool_exhausted}` at once.

  Programs that are created through the bridge itself belong to the pool, too, but the other peers get them only when
  they need them, and other nodes do not: create and remove programs with `call/4`.
  """
  @spec checkout(pool()) :: {:ok, atom()} | {:error, :pool_exhausted | :bridge_not_running}
  def checkout(pool \\ __MODULE__) do
    started = System.monotonic_time()
    answer = with_handle(pool, &CoordinatorClient.checkout(&1, @coordinator_ms))
    Telemetry.checkout(pool, answer, started)
    answer
  end

  @doc "As `checkin/2`, to the pool named `DSPex.PythonBridge.Pool`."
  @spec checkin(atom() | pid()) :: :ok | {:error, String.t() | :bridge_not_running}
  def checkin(bridge), do: checkin(__MODULE__, bridge)

  @doc """
  Checks a bridge in; any process may. An error text if it is not a bridge of the pool, or not checked out.
  """
  @spec checkin(pool(), atom() | pid()) :: :ok | {:error, String.t() | :bridge_not_running}
  def checkin(pool, bridge),
    do: with_handle(pool, &CoordinatorClient.checkin(&1, bridge, @coordinator_ms))

  defp with_handle(pool, fun) do
    case Handle.fetch(pool) do
      nil -> {:error, :bridge_not_running}
      handle -> fun.(handle)
    end
  end

  @doc """
  The state of the pool: its peers, as in `DSPex.PythonBridge.Bridge.get_status/1`, whether they are checked out, and the
  names of their bridges and of the monitors of these (`DSPex.PythonBridge.Monitor.get_health_status/1`); and the nodes
  that have a pool of its cluster, this one included.
  """
  @spec status(pool()) :: status()
  def status(pool \\ __MODULE__) do
    case Handle.fetch(pool) do
      nil ->
        %{peers: [], nodes: []}

      handle ->
        %{
          peers: Enum.map(LoadCounters.indexes(handle.counters), &peer(handle, &1)),
          nodes: Membership.nodes(handle)
        }
    end
  end

  defp peer(handle, index) do
    bridge = Handle.bridge(handle, index)

    bridge
    |> Bridge.get_status()
    |> Map.take([:os_pid, :state, :pending])
    |> Map.merge(%{
      bridge: bridge,
      monitor: Handle.monitor(handle.name, index),
      checked_out: LoadCounters.checked_out?(handle.counters, index)
    })
  end
end
