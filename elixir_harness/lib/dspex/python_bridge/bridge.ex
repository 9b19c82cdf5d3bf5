defmodule DSPex.PythonBridge.Bridge do
  @moduledoc """
  Calls to a Python peer that runs DSPy programs.

      {:ok, _} = Bridge.start_link(lm: "openai/gpt-4o-mini")
      {:ok, _} = Bridge.call(:create_program, %{id: "qa", signature: "question -> answer"})
      {:ok, %{"answer" => _}} =
        Bridge.call(:execute_program, %{program_id: "qa", inputs: %{question: "Why?"}})

  A bridge is one Python process that works on many calls at once. It belongs under a supervisor: `{Bridge, opts}`, or
  `DSPex.PythonBridge.Supervisor` with a monitor. Several bridges need different names.

  Requests are encoded and replies decoded in the caller's process, so that a 5 MB reply delays no other caller.

  Commands are atoms or strings; `args` are maps with a JSON form; results have string keys. Timeouts are in
  milliseconds, or `:infinity`. The peer receives them, too, and stops work whose time is over; if a caller times out
  or dies, its request is cancelled. None of these functions exits or raises in the caller.
  """

  alias DSPex.PythonBridge.{Client, Error, Options, Protocol}
  alias DSPex.PythonBridge.Bridge.Server
  alias DSPex.PythonBridge.Client.{Caller, StreamReducer}
  alias DSPex.PythonBridge.Telemetry.CallSpan

  # The time that a bridge may take to end, after its calls are finished.
  @ending_ms 2_000
  # A bridge answers questions at once.
  @question_ms 5_000

  @type server :: GenServer.server()
  @type command :: Protocol.command()
  @type call_error ::
          String.t() | :timeout | :python_process_died | :bridge_not_running | :overloaded
  @type stream_option ::
          {:timeout, timeout() | :default}
          | {:retry, boolean()}
          | {:tools, %{(atom() | String.t()) => tool() | {tool(), [repeat: boolean()]}}}
          | {:attempts, 1..10}
          | {:budget, keyword() | map()}
          | {:max_concurrency, pos_integer()}
          | {:item_timeout_ms, pos_integer()}
          | {:history, boolean()}
          | {:traceparent, String.t() | nil}
          | {:telemetry_metadata, map()}
  @typedoc "Called with the arguments, a map with string keys, and the `call_key`: see `request/4`."
  @type tool :: (args :: map() -> term()) | (args :: map(), call_key :: String.t() -> term())
  @type request_option :: stream_option() | {:on_chunk, (map() -> term())}
  @type stream_element ::
          {:chunk, field :: String.t(), text :: String.t()}
          | {:reset, field :: String.t()}
          | {:status, String.t()}
          | {:item, non_neg_integer(), {:ok, map()} | {:error, Error.t()}}
          | {:ok, result :: term(), meta :: map()}
          | {:error, Error.t()}
  @type status :: %{
          required(:state) => :starting | :running | :restarting | :failed,
          required(:os_pid) => pos_integer() | nil,
          required(:pending) => non_neg_integer(),
          required(:restarts) => non_neg_integer(),
          required(:uptime_ms) => non_neg_integer(),
          optional(:late_replies) => non_neg_integer(),
          optional(:unreadable_frames) => non_neg_integer(),
          optional(:last_error) => String.t() | nil,
          optional(:programs) => %{failed: %{(program_id :: String.t()) => reason :: String.t()}}
        }

  ## Start and end

  @doc """
  Starts a bridge. Options: see `DSPex.PythonBridge.Options`.

  It returns before the interpreter runs; calls wait for it within their own timeouts. A wrong option gives
  `{:error, %ArgumentError{}}`, which names it. If Python cannot be started, the bridge logs the reason and
  tries again, after a delay that grows from 50 ms to 5 s. After `:max_retries` more attempts calls fail at once, with the
  reason, until one succeeds.
  """
  @spec start_link(keyword()) :: GenServer.on_start() | {:error, Exception.t()}
  def start_link(opts \\ []) do
    with {:ok, options} <- Options.new(opts, __MODULE__), do: Server.start_link(options)
  end

  @doc """
  The child specification of `{Bridge, opts}`; the id is the bridge's name. Secrets in the options do not show in the
  supervisor's reports.
  """
  @spec child_spec(keyword()) :: Supervisor.child_spec()
  def child_spec(opts) do
    # Wrong options are refused by start_link.
    drain_ms = with {:ok, options} <- Options.new(opts), do: options.drain_ms, else: (_ -> 0)

    %{
      id: if(Keyword.keyword?(opts), do: opts[:name]) || __MODULE__,
      start: {__MODULE__, :start_link, [Options.seal(opts)]},
      shutdown: drain_ms + @ending_ms
    }
  end

  @doc """
  Replaces the peer: another one is started, gets the programs, which it loads when they are run, and then the calls. The old peer serves until then and
  finishes its calls; those that it has not finished after `DSPY_BRIDGE_DRAIN_MS` (5 s by default) are sent again to
  the new one. Callers do not notice, except if their call is not finished by then and cannot be sent again, because of
  `retry: false`, or a tool with `repeat: false` that has begun: they get
  `:python_process_died`. A `create_program` or `cleanup` that the old one has not answered then is made by the new one.

  Of a pool each bridge is restarted by itself, by its name in `DSPex.PythonBridge.Pool.status/1`; for the pool's own name
  the error says so.

  It returns once the new peer serves. If that does not start, the old one keeps serving, and the error is a string
  with the reason; without an old peer, the attempts go on.
  """
  @spec restart(server()) :: :ok | {:error, :bridge_not_running | String.t()}
  def restart(server \\ __MODULE__),
    do: ask(server, :restart, &{:error, &1 || :bridge_not_running}, :infinity)

  @doc """
  Stops the bridge. Calls that the peer has are still answered, within `DSPY_BRIDGE_DRAIN_MS` (5 s by default); other
  calls, and later ones, get `:bridge_not_running`. Then the peer sees the end of its input; if it has not ended 0.6 s
  later it is killed, with all that it started, before this returns. It also returns `:ok` if the bridge was not
  running.

  The name is free at once. A bridge under a supervisor is started again by that, with the programs of its
  `DSPex.PythonBridge.Supervisor` or Pool: to end it for good, stop the supervisor, or have it do so (`Supervisor.terminate_child/2`).
  """
  @spec stop(server()) :: :ok
  def stop(server \\ __MODULE__) do
    with {:ok, bridge} <- Caller.find_anywhere(server),
         do: GenServer.stop(bridge)

    :ok
  catch
    _kind, _not_running -> :ok
  end

  @doc """
  The state of the bridge; answered at once, whatever the peer does. (A bridge that does not answer within 5 s, since
  it was suspended, counts as not running.)

    * `:state` – `:starting` (the first peer does not serve yet), `:running`, `:restarting` (a peer has died and the
      next does not serve yet), `:failed` (after the first, `max_retries` attempts in a row to start one have failed; they go on, and
      calls fail at once, with the reason, until one succeeds; or the bridge is not running: then only the first five keys are there, all 0 or nil; for a pool
      `:last_error` names what to ask instead)
    * `:os_pid` – of the peer; nil while there is none
    * `:pending` – calls that wait for a reply, sent or not
    * `:restarts` – peers started after the first
    * `:uptime_ms` – of the present peer
    * `:late_replies` – replies and chunks that were dropped because no caller waited for them (any longer)
    * `:unreadable_frames` – frames that were dropped because they had no readable id, were too large, or were chunks or tool calls
      that could not be read
    * `:last_error` – why the last peer died, until the next one serves: its exit status, and if it did not start, the
      last line that it wrote to stderr
    * `:programs` – `failed`: the declared programs that could not be loaded when the bridge started, and why, except those
      that were removed or created anew since
  """
  @spec get_status(server()) :: status()
  def get_status(server \\ __MODULE__) do
    nothing = %{state: :failed, os_pid: nil, pending: 0, restarts: 0, uptime_ms: 0}
    ask(server, :get_status, &if(&1, do: Map.put(nothing, :last_error, &1), else: nothing))
  end

  ## Calls

  @doc """
  Sends a command to the peer and waits for its reply, at most `timeout` ms (or `:infinity`; `:default` is the
  `:default_timeout` of the bridge).

    * `{:ok, result}`
    * `{:error, message}` – the peer's text, or why the request could not be sent (no JSON form, larger than
      `:max_frame_bytes`; no Python starts, while the bridge's state is `:failed`)
    * `{:error, :timeout}` – here or in the peer, whichever was first
    * `{:error, :overloaded}` – too many calls wait, here or in the peer; nothing was done
    * `{:error, :python_process_died}` – while it had the request, which was sent again `:max_retries` times
    * `{:error, :bridge_not_running}`
  """
  @spec call(server(), command(), map(), timeout() | :default) ::
          {:ok, term()} | {:error, call_error()}
  def call(server \\ __MODULE__, command, args \\ %{}, timeout \\ :default)

  # `call(command, args)` and `call(command, args, timeout)`.
  def call(command, args, timeout, :default) when is_map(args),
    do: call(__MODULE__, command, args, if(timeout == %{}, do: :default, else: timeout))

  def call(server, command, args, timeout) do
    exchange = &Caller.exchange(server, command, args, timeout, &1)

    case CallSpan.run(:bridge, server, command, args, [], exchange) do
      {:ok, _id, result, _meta} -> {:ok, result}
      {:error, error} -> {:error, Error.to_call_reason(error)}
    end
  end

  @doc """
  As `call/4`, with the metadata of the reply, and errors with a type: `{:ok, result, meta}` or
  `{:error, %DSPex.PythonBridge.Error{}}`.

  `meta` has string keys, all of docs/protocol.md: `"duration_ms"`, `"queue_ms"`, `"wait_ms"`, `"lm_usage"`, `"lm_calls"`,
  `"cache_hits"` and others. An error of the peer has it, too: `error.meta`.

  Options:

    * `:timeout` – ms, `:infinity` or `:default`
    * `:retry` – true by default; with false, the request is not sent again when the peer dies with it, but gives
      `:python_process_died`
    * `:tools` – a map of functions by their names, atoms or strings: the tools that the program was
      created with. A name that is none of them is refused (`:invalid_args`), if this bridge has created the program. The first
      call of a program with tools that is given none is logged as a warning. The peer calls one with a map of arguments with string keys. The value that it returns is the tool's
      result, if it has a JSON form (`{:ok, term}` counts as `term`). `{:error, reason}`, and what the function raises,
      throws or exits with, becomes an error for the program: a string `reason` unchanged, all else on one line. Each
      call runs in its own process, several at once if the peer asks for it, and is killed when the request is over.
      One that has captured more than 64 KB is not copied for each call: its processes make one call after the other.

      When the peer dies, the next one gets what the LM has answered, asks for the rest only, and makes the same tool
      calls. A tool call with the name and the arguments of an earlier one gets the answer of that, without the function:
      the first of such calls that of the first, and so on. It waits for one that is still running. All other calls are
      new. The answers are kept until the run is over, those of the LM up to the bridge's `:journal_bytes`.

      `{function, repeat: false}` in place of a function: once it has begun, the request is not sent again, but gives
      `:python_process_died`, with `retryable: false`. By default `repeat: true`.

      A function of two arguments gets as the second one the `call_key`: a string of 32 hexadecimal digits, the same when
      the run is sent again, and different for each other call of this or another request. It is for the
      idempotency keys of other services.
    * `:attempts` – of `execute_program`: how often the LM is asked at most, 1 to 10, if its answer does not fit the
      signature (`:output_invalid`); by default once
    * `:budget` – of `execute_program`: what its LM calls may take together, `[lm_calls: 20, tokens: 50_000, usd: 0.05]`, or some
      of these. When one is spent the run ends with `:budget_spent`; `meta["budget"]` has what it took (docs/protocol.md)
    * `:max_concurrency`, `:item_timeout_ms` – of `execute_program` with a list of inputs: how many of them run at once, and
      how long each may take
    * `:history` – with true, `meta["history"]` has the LM calls of the run, prompts and answers included:
      `DSPex.PythonBridge.History.print/1` shows them. By default false
    * `:traceparent` – the [W3C trace context](https://www.w3.org/TR/trace-context/) of the call, such as
      `"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"`; nil by default. The HTTP requests to the LM have it
      as a header, and what Python logs for the call as metadata.
    * `:telemetry_metadata` – a map that the events of the call have as metadata under this name, such as
      `%{tenant: "acme"}`; by default empty. It stays on this node.
    * `:on_chunk` – a function of one argument, called in this process with each map that comes before the reply, in
      order: `%{"field" => …, "chunk" => …}`, `%{"status" => …}`, and for a list of inputs each result,
      `%{"index" => …, "success" => …, …}`. If the peer dies in between, `%{"status" => "restarted"}` comes, and the next
      one goes on: what was given does not come again. `%{"field" => …, "reset" => true}`: the field begins anew, and its
      chunks up to then are void. If it raises, the request is cancelled and the caller gets the exception.

  A wrong option gives an error of type `:invalid_request` that names it.
  """
  @spec request(server(), command(), map(), [request_option()]) ::
          {:ok, term(), map()} | {:error, Error.t()}
  def request(server \\ __MODULE__, command, args \\ %{}, opts \\ [])

  # `request(command, args)` and `request(command, args, opts)`.
  def request(command, args, opts, []) when is_map(args),
    do: request(__MODULE__, command, args, if(opts == %{}, do: [], else: opts))

  def request(server, command, args, opts) do
    with {:ok, options} <- Client.Options.new(opts, [:on_chunk | Client.Options.of_stream()]),
         {:ok, args} <- Client.Options.arguments(options, command, args),
         exchange = &exchange(server, command, args, %{options | opts: &1}),
         {:ok, _id, result, meta} <-
           CallSpan.run(:bridge, server, command, args, options.opts, exchange) do
      {:ok, result, meta}
    end
  end

  defp exchange(server, command, args, %{timeout: timeout, opts: opts} = options) do
    if options.on_chunk || opts[:tools] || opts[:journal],
      do:
        StreamReducer.run(
          StreamReducer.to_bridge(server, command, args, timeout, opts),
          options.on_chunk
        ),
      else: Caller.exchange(server, command, args, timeout, opts)
  end

  @doc """
  Streams an `execute_program` call, as a lazy enumerable of:

    * `{:chunk, field, text}` – more of an output field
    * `{:reset, field}` – the field begins anew: its chunks up to then are void
    * `{:status, text}` – the program's present step; `"restarted"` if the peer has died, and the next one goes on: what was
      given does not come again
    * `{:item, index, result}` – for a list of inputs, the result of that index, as `{:ok, fields}` or
      `{:error, %DSPex.PythonBridge.Error{}}`
    * always last, the result of `request/4`: `{:ok, result, meta}` or `{:error, %DSPex.PythonBridge.Error{}}`

  For example, to print an answer as it is generated:

      for element <- Bridge.stream(%{program_id: "qa", inputs: %{question: "Why?"}}) do
        case element do
          {:chunk, "answer", text} -> IO.write(text)
          {:error, error} -> IO.puts(:stderr, Exception.message(error))
          _other -> :ok
        end
      end

  Nothing is sent before it is enumerated; each enumeration is a call of its own. If it is not enumerated to its end,
  also because of an exception or the death of the process, the call is cancelled.

  Options: those of `request/4` except `:on_chunk`; `:timeout` is for the whole call. While the consumer does other things
  the call goes on, and its elements are kept; if the result comes in time, the consumer gets all of them, however late
  it asks.
  """
  @spec stream(server(), map(), [stream_option()]) :: Enumerable.t(stream_element())
  def stream(server \\ __MODULE__, args, opts \\ [])

  # `stream(args, opts)`.
  def stream(args, opts, []) when is_map(args), do: stream(__MODULE__, args, opts)

  def stream(server, args, opts) do
    with {:ok, options} <- Client.Options.new(opts, Client.Options.of_stream()),
         {:ok, args} <- Client.Options.arguments(options, :execute_program, args) do
      StreamReducer.stream(
        StreamReducer.to_bridge(server, :execute_program, args, options.timeout, options.opts)
      )
    else
      {:error, error} -> [error: error]
    end
  end

  @doc """
  Sends a command whose reply nobody waits for; the bridge's `:default_timeout` applies. `:ok` says nothing about the
  peer or the bridge; an error says why the request could not be encoded.
  """
  @spec cast(server(), command(), map()) :: :ok | {:error, String.t()}
  def cast(server \\ __MODULE__, command, args \\ %{})

  # `cast(command, args)`.
  def cast(command, args, none) when is_map(args) and none == %{},
    do: cast(__MODULE__, command, args)

  def cast(server, command, args), do: Caller.send_only(server, command, args)

  # `otherwise`: of a pool's name, or of what is not running.
  defp ask(server, question, otherwise, timeout \\ @question_ms) do
    with {:ok, bridge} <- Caller.find_anywhere(server) do
      GenServer.call(bridge, question, timeout)
    else
      {:error, %Error{type: :invalid_request}} -> otherwise.(a_pool(server))
      _another -> otherwise.(nil)
    end
  catch
    # Any term may be given as a server, and may raise.
    _kind, _not_running -> otherwise.(nil)
  end

  defp a_pool(server),
    do: "#{inspect(server)} is a pool: name one of its bridges, which Pool.status/1 lists"
end
