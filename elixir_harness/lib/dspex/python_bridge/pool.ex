defmodule DSPex.PythonBridge.Pool do
  @moduledoc """
  A pool of bridges: each call goes to the least busy peer that is up, and to another one if that dies.

      {:ok, _} = Pool.start_link(lm: "openai/gpt-4o-mini", pool_size: 3)
      {:ok, _} = Pool.call(:create_program, %{id: "qa", signature: "question -> answer"})
      {:ok, %{"answer" => _}} =
        Pool.call(:execute_program, %{program_id: "qa", inputs: %{question: "Why?"}})

  `call/4`, `request/4` and `stream/3` take and return what those of `DSPex.PythonBridge.Bridge` do, chunks and tools
  included. A peer works on many calls at once, so one is often enough. Several use more than one core, and serve calls
  during the second that a new peer needs to import DSPy.

  `create_program` and `cleanup` apply to all peers: one of them makes the change, and the others load a program when
  they first run it, as a restarted peer does.

  Pools of the same `:cluster` on connected nodes serve each other's calls if they cannot serve their own, and share
  their programs: see docs/cluster.md.

  The caller's process picks the peer and sends the call; no process of the pool is in between.
  """

  alias DSPex.PythonBridge.{Bridge, Client, Error, Options, Pool, Telemetry}
  alias DSPex.PythonBridge.Client.StreamReducer
  alias DSPex.PythonBridge.Pool.{Budgets, Caller, Cluster, Handle, LoadCounters, Parallel}
  alias DSPex.PythonBridge.Telemetry.CallSpan

  @typedoc "The name of a pool, or its pid."
  @type pool :: atom() | pid()
  @type status :: %{
          required(:peers) => [peer()],
          required(:nodes) => [node()],
          optional(:programs) => %{failed: %{(program_id :: String.t()) => reason :: String.t()}}
        }
  @type peer :: %{
          bridge: atom(),
          os_pid: pos_integer() | nil,
          state: :starting | :running | :restarting | :failed,
          pending: non_neg_integer(),
          checked_out: false,
          monitor: atom()
        }

  @doc """
  Starts a pool. Options, in addition to those of `DSPex.PythonBridge.Options`, which apply to all its bridges:

    * `:name` – an atom; by default this module. The names of the bridges are made from it
    * `:pool_size` – the number of peers; by default 3
    * `:cluster` – the name of the cluster, an atom or a string; by default nil, none
    * `:budgets` – what all runs of a tenant may spend: `[tenant: [usd: 5, per: :day]]` (docs/guide/lms.md); by default none

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

  @doc """
  Sends a command to a peer of the pool and waits for the reply, at most `timeout` ms. Arguments and results are
  those of `DSPex.PythonBridge.Bridge.call/4`.

  While no peer here or on another node can serve it, the call waits. `:python_process_died` is returned after
  `max_retries + 1` peers have died with the request; `:overloaded` if all peers that are up are overloaded:
  `request/4` has the text and the `meta` of the last peer that was, which name the limit.

  `create_program` and `cleanup` go to one peer, whose reply is the result. If it has made the change, the other peers of
  this node have been sent it before this returns; other nodes of the cluster get it unconfirmed. If several callers create
  one program at a time, the last one wins. `max_pending` does not apply to such calls. One that times out may still make
  its change later.

  `get_stats` and `list_programs` ask all peers of this node, and add their answers:

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
  def call(pool \\ __MODULE__, command, args \\ %{}, timeout \\ :default)

  # `call(command, args)` and `call(command, args, timeout)`.
  def call(command, args, timeout, :default) when is_map(args),
    do: call(__MODULE__, command, args, if(timeout == %{}, do: :default, else: timeout))

  def call(pool, command, args, timeout) do
    exchange = &Caller.exchange(pool, command, args, timeout, &1)

    case CallSpan.run(:pool, pool, command, args, [], exchange) do
      {:ok, _id, result, _meta} -> {:ok, result}
      {:error, error} -> {:error, Error.to_call_reason(error)}
    end
  end

  @doc """
  As `call/4`, with the options, results and errors of `DSPex.PythonBridge.Bridge.request/4`: `{:ok, result, meta}` or
  `{:error, %DSPex.PythonBridge.Error{}}`.

    * `:tools` run in the calling node. What they and the LM have answered goes with the call to the next peer
    * with `retry: false`, a run is not sent again after a peer has died with it. One that its peer has not got yet is
      sent to another
    * `meta["duration_ms"]` of `get_stats` and `list_programs` is the time until the answers were added; their `meta` has
      nothing else
  """
  @spec request(pool(), Bridge.command(), map(), [Bridge.request_option()]) ::
          {:ok, term(), map()} | {:error, Error.t()}
  def request(pool \\ __MODULE__, command, args \\ %{}, opts \\ [])

  # `request(command, args)` and `request(command, args, opts)`.
  def request(command, args, opts, []) when is_map(args),
    do: request(__MODULE__, command, args, if(opts == %{}, do: [], else: opts))

  def request(pool, command, args, opts) do
    requested(pool, command, args, opts, [])
  end

  # One of many calls, which begin at any node of the cluster. For `DSPex.PythonBridge.Evaluate`.
  @doc false
  @spec spread(pool(), Bridge.command(), map(), [Bridge.request_option()]) ::
          {:ok, term(), map()} | {:error, Error.t()}
  def spread(pool, command, args, opts), do: requested(pool, command, args, opts, spread: true)

  defp requested(pool, command, args, opts, more) do
    with {:ok, options} <- Client.Options.new(opts, [:on_chunk | Client.Options.of_stream()]),
         {:ok, args} <- Client.Options.arguments(options, command, args),
         exchange = &exchange(pool, command, args, %{options | opts: &1}),
         {:ok, _id, result, meta} <-
           CallSpan.run(:pool, pool, command, args, more ++ options.opts, exchange) do
      {:ok, result, meta}
    end
  end

  defp exchange(pool, command, args, %{timeout: timeout, opts: opts} = options) do
    opts = Budgets.begin(pool, command, opts)

    if options.on_chunk || opts[:tools] || opts[:journal] || opts[:counted],
      do:
        StreamReducer.run(Caller.streamed(pool, command, args, timeout, opts), options.on_chunk),
      else: Caller.exchange(pool, command, args, timeout, opts)
  end

  @doc """
  Streams an `execute_program` call, with the elements and options of `DSPex.PythonBridge.Bridge.stream/3`.

      for {:chunk, "answer", text} <- Pool.stream(%{program_id: "qa", inputs: %{question: "Why?"}}),
          do: IO.write(text)

  If its peer dies, it goes on at another one, where it was. A peer works on many streams at once.
  """
  @spec stream(pool(), map(), [Bridge.stream_option()]) :: Enumerable.t(Bridge.stream_element())
  def stream(pool \\ __MODULE__, args, opts \\ [])

  # `stream(args, opts)`.
  def stream(args, opts, []) when is_map(args), do: stream(__MODULE__, args, opts)

  def stream(pool, args, opts) do
    with {:ok, options} <- Client.Options.new(opts, Client.Options.of_stream()),
         {:ok, args} <- Client.Options.arguments(options, :execute_program, args) do
      StreamReducer.stream(
        Caller.streamed(pool, :execute_program, args, options.timeout, options.opts)
      )
    else
      {:error, error} -> [error: error]
    end
  end

  ## Its bridges

  @doc """
  The least busy bridge of this node: `{:ok, bridge}`, a name for the functions of `DSPex.PythonBridge.Bridge`. It is not
  reserved: a peer works on many calls at once, and the pool goes on using it. The name stays valid when the peer is
  restarted. `{:error, :pool_exhausted}` if no peer is running.

  Programs that are created or removed through a bridge are the pool's, too.
  """
  @spec checkout(pool()) :: {:ok, atom()} | {:error, :pool_exhausted | :bridge_not_running}
  def checkout(pool \\ __MODULE__) do
    started = System.monotonic_time()
    answer = least_busy(pool)
    Telemetry.checkout(pool, answer, started)
    answer
  end

  defp least_busy(pool) do
    with %Handle{counters: counters} = handle <- Handle.fetch(pool),
         index when index != nil <- LoadCounters.pick(counters) do
      # It counts as busier from now on, so that many that ask at once do not all get the same.
      LoadCounters.sending(counters, index)
      {:ok, Handle.bridge(handle, index)}
    else
      nil -> {:error, if(Handle.fetch(pool), do: :pool_exhausted, else: :bridge_not_running)}
    end
  end

  @doc "As `checkin/2`, to the pool named `DSPex.PythonBridge.Pool`."
  @spec checkin(atom() | pid()) :: :ok | {:error, :bridge_not_running}
  def checkin(bridge), do: checkin(__MODULE__, bridge)

  @doc "For code that checks in what it has checked out. It does nothing, since `checkout/1` reserves nothing."
  @spec checkin(pool(), atom() | pid()) :: :ok | {:error, :bridge_not_running}
  def checkin(pool, _bridge),
    do: if(Handle.fetch(pool), do: :ok, else: {:error, :bridge_not_running})

  @doc """
  Calls `fun` with the bridge that `checkout/1` gives: `{:ok, value}` with what it has returned.

      {:ok, facts} =
        Pool.with_bridge(fn bridge ->
          {:ok, _} = Bridge.call(bridge, :create_program, %{id: "qa", signature: "question -> answer"})
          Bridge.call(bridge, :execute_program, %{program_id: "qa", inputs: %{question: "Why?"}})
        end)
  """
  @spec with_bridge(pool(), (bridge :: atom() -> value)) ::
          {:ok, value} | {:error, :pool_exhausted | :bridge_not_running}
        when value: term()
  def with_bridge(pool \\ __MODULE__, fun)

  def with_bridge(pool, fun) when is_function(fun, 1) do
    with {:ok, bridge} <- checkout(pool), do: {:ok, fun.(bridge)}
  end

  def with_bridge(_pool, _other),
    do: raise(ArgumentError, "with_bridge: expected a function of one argument, the bridge")

  @doc """
  The state of the pool: its peers, as in `DSPex.PythonBridge.Bridge.get_status/1` (`checked_out` is always false), and the
  names of their bridges and of the monitors of these (`DSPex.PythonBridge.Monitor.get_health_status/1`); the nodes
  that have a pool of its cluster, this one included; and under `programs`, as `failed`, the programs that any of its
  peers could not load, with the reason. Of a pool that is not running only `peers` and `nodes` are there, both empty.
  """
  @spec status(pool()) :: status()
  def status(pool \\ __MODULE__) do
    case Handle.fetch(pool) do
      nil ->
        %{peers: [], nodes: []}

      handle ->
        bridges = Tuple.to_list(handle.bridges)
        answers = Parallel.map(bridges, &Bridge.get_status/1)
        states = for {bridge, index} <- Enum.with_index(bridges, 1), do: {index, answers[bridge]}

        %{
          peers: for({index, status} <- states, do: peer(handle, index, status)),
          nodes: Cluster.nodes(handle),
          programs: %{failed: failed(states)}
        }
    end
  end

  @doc """
  What the runs of this pool with this value of a key of `:budgets` have spent since its present hour, day or other
  time began: `Pool.spent(:tenant, "acme")`. A key without a budget is an error.
  """
  @spec spent(pool(), atom(), term()) :: Budgets.spent() | {:error, Error.t()}
  def spent(pool \\ __MODULE__, key, value) do
    with %Handle{} = handle <- Handle.fetch(pool) || {:error, Error.not_running(:pool, pool)},
         do: Budgets.spent(handle, key, value)
  end

  # A bridge that is being restarted says nothing of programs.
  defp failed(states) do
    for {_index, %{programs: %{failed: failed}}} <- states, reduce: %{} do
      all -> Map.merge(all, failed)
    end
  end

  defp peer(handle, index, status) do
    status
    |> Map.take([:os_pid, :state, :pending])
    |> Map.merge(%{
      bridge: Handle.bridge(handle, index),
      monitor: Handle.monitor(handle.name, index),
      checked_out: false
    })
  end
end
