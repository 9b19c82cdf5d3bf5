defmodule DSPex.PythonBridge.Bridge do
  @moduledoc """
  Calls to a Python peer that runs DSPy programs.

      {:ok, _} = Bridge.start_link(lm: "openai/gpt-4o-mini")
      {:ok, _} = Bridge.call(:create_program, %{id: "qa", signature: "question -> answer"})
      {:ok, %{"answer" => _}} =
        Bridge.call(:execute_program, %{program_id: "qa", inputs: %{question: "Why?"}})

  One bridge is one Python process that works on many calls at once. A bridge belongs under a
  supervisor (`{Bridge, opts}`, or all of `DSPex.PythonBridge.Supervisor`); several need names of
  their own.

  Requests are written and replies read in the caller's process (`DSPex.PythonBridge.Client.Caller`), so
  that a 5 MB reply costs no other caller anything; `DSPex.PythonBridge.Bridge.Server` is the bridge's own.

  Commands are atoms or texts; `args` are maps with a JSON form; results have string keys.
  Timeouts are milliseconds or `:infinity`. They are sent along, so that the peer does not work on
  what nobody waits for; a caller that times out or dies has its request cancelled. None of the
  functions that call ends the caller.
  """

  alias DSPex.PythonBridge.{Client, Error, Options, Protocol, Telemetry}
  alias DSPex.PythonBridge.Bridge.Server
  alias DSPex.PythonBridge.Client.{Caller, EventStream, StreamReducer}

  # From the end of draining to the end of the last process.
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
          | {:tools, %{(atom() | String.t()) => (map() -> term())}}
          | {:traceparent, String.t() | nil}
  @type request_option :: stream_option() | {:on_chunk, (map() -> term())}
  @type status :: %{
          required(:state) => :starting | :running | :restarting | :failed,
          required(:os_pid) => pos_integer() | nil,
          required(:pending) => non_neg_integer(),
          required(:restarts) => non_neg_integer(),
          required(:uptime_ms) => non_neg_integer(),
          optional(:late_replies) => non_neg_integer(),
          optional(:unreadable_frames) => non_neg_integer(),
          optional(:last_error) => String.t() | nil
        }

  ## Life

  @doc """
  Starts a bridge. Options: see `DSPex.PythonBridge.Options`.

  Returns before the interpreter runs; calls made meanwhile wait for it within their own timeouts.
  An option that cannot be right gives `{:error, %ArgumentError{}}` with a text that names it. A
  Python that cannot be started is no such error: see `DSPex.PythonBridge.Bridge.Server` for what happens
  then.
  """
  @spec start_link(keyword()) :: GenServer.on_start() | {:error, Exception.t()}
  def start_link(opts \\ []) do
    with {:ok, options} <- Options.new(opts, __MODULE__) do
      GenServer.start_link(Server, options, if(options.name, do: [name: options.name], else: []))
    end
  end

  @doc """
  The child specification `{Bridge, opts}` of a supervisor; the id is the bridge's name. Keys among
  the options do not show in the supervisor's reports.
  """
  @spec child_spec(keyword()) :: Supervisor.child_spec()
  def child_spec(opts) do
    # Options that cannot be right are start_link's to refuse.
    drain_ms = with {:ok, options} <- Options.new(opts), do: options.drain_ms, else: (_ -> 0)

    %{
      id: if(Keyword.keyword?(opts), do: opts[:name]) || __MODULE__,
      start: {__MODULE__, :start_link, [Options.seal(opts)]},
      shutdown: drain_ms + @ending_ms
    }
  end

  @doc """
  Replaces the peer: starts another, gives it the programs, then sends calls to it. The old one
  serves until then, and finishes what it was given; what it has not finished after
  `DSPY_BRIDGE_DRAIN_MS` (5 s where nothing is said) is sent again to the new one. No caller sees it, bar
  those whose calls are not finished by then and cannot be sent again, since they said `retry: false` or
  have been given a chunk: `:python_process_died`. A change of the programs that comes meanwhile, and what
  comes after it, waits for the new one. A program that was left out since peers died while they loaded it is
  tried again.

  Returns once the new peer serves. If it does not come up, the old one goes on serving, and the
  error is a text that says why; if there was none to go on, the attempts go on.
  """
  @spec restart(server()) :: :ok | {:error, :bridge_not_running | String.t()}
  def restart(server \\ __MODULE__),
    do: ask(server, :restart, {:error, :bridge_not_running}, :infinity)

  @doc """
  Stops the bridge. Calls that the peer has are still answered, within `DSPY_BRIDGE_DRAIN_MS` (5 s where
  nothing is said); calls that it has not, and later ones, get `:bridge_not_running`. Then the peer sees
  the end of its input; if it is still there 0.6 s later it is killed, and so is all that it started,
  before this returns. Also `:ok` if the bridge was not running.
  """
  @spec stop(server()) :: :ok
  def stop(server \\ __MODULE__) do
    with {:ok, bridge} <- find(server), do: GenServer.stop(bridge)
    :ok
  catch
    _kind, _not_running -> :ok
  end

  @doc """
  How the bridge is; answered at once, whatever the peer does. (A bridge that does not answer within
  5 s, which only one that somebody suspended does, counts as not running.)

    * `:state` – `:starting` (the first peer does not serve yet), `:running`, `:restarting` (between a
      peer's death and the service of its successor), `:failed` (`max_retries` attempts in a row to
      start one have failed; they go on, and calls wait; or the bridge is not running, in which
      case only the first five keys are there, all 0 or nil)
    * `:os_pid` – of the peer; nil while there is none
    * `:pending` – calls that wait for a reply, sent or not
    * `:restarts` – peers started after the first
    * `:uptime_ms` – of the present peer
    * `:late_replies` – replies and chunks dropped because nobody waited (any more)
    * `:unreadable_frames` – frames dropped because they had no readable id, or were chunks or calls of
      tools that could not be read
    * `:last_error` – why the last peer died, until the next serves: its exit status, and where it did
      not come up, the last line that it writes to stderr
  """
  @spec get_status(server()) :: status()
  def get_status(server \\ __MODULE__) do
    ask(server, :get_status, %{state: :failed, os_pid: nil, pending: 0, restarts: 0, uptime_ms: 0})
  end

  ## Calls

  @doc "As `call/4`, to the bridge named `DSPex.PythonBridge.Bridge`."
  @spec call(command()) :: {:ok, term()} | {:error, call_error()}
  def call(command), do: call(__MODULE__, command, %{}, :default)

  @doc "`call(command, args)` or `call(server, command)`: as `call/4`."
  @spec call(command() | server(), map() | command()) :: {:ok, term()} | {:error, call_error()}
  def call(server, command) when is_atom(command) or is_binary(command),
    do: call(server, command, %{}, :default)

  def call(command, args), do: call(__MODULE__, command, args, :default)

  @doc "`call(command, args, timeout)` or `call(server, command, args)`: as `call/4`."
  @spec call(command() | server(), map() | command(), timeout() | :default | map()) ::
          {:ok, term()} | {:error, call_error()}
  def call(server, command, args) when is_map(args), do: call(server, command, args, :default)
  def call(command, args, timeout), do: call(__MODULE__, command, args, timeout)

  @doc """
  Has the peer carry out a command and waits for its reply, at most `timeout` ms (`:infinity` is
  allowed; `:default`, or nothing said, is the `:default_timeout` of the bridge).

    * `{:ok, result}`
    * `{:error, message}` – the peer's text, or that of a request that could not be sent (no JSON
      form, larger than `:max_frame_bytes`)
    * `{:error, :timeout}` – here or in the peer, whichever was first
    * `{:error, :overloaded}` – too many calls wait, here or in the peer; nothing was done
    * `{:error, :python_process_died}` – with the request, which was sent again `:max_retries` times
    * `{:error, :bridge_not_running}`
  """
  @spec call(server(), command(), map(), timeout() | :default) ::
          {:ok, term()} | {:error, call_error()}
  def call(server, command, args, timeout) do
    exchange = fn -> Caller.exchange(server, command, args, timeout, []) end

    case Telemetry.call(:bridge, server, command, args, exchange) do
      {:ok, _id, result, _meta} -> {:ok, result}
      {:error, error} -> {:error, Error.to_call_reason(error)}
    end
  end

  @doc "As `request/4`, to the bridge named `DSPex.PythonBridge.Bridge`."
  @spec request(command()) :: {:ok, term(), map()} | {:error, Error.t()}
  def request(command), do: request(__MODULE__, command, %{}, [])

  @doc "`request(command, args)` or `request(server, command)`: as `request/4`."
  @spec request(command() | server(), map() | command()) ::
          {:ok, term(), map()} | {:error, Error.t()}
  def request(server, command) when is_atom(command) or is_binary(command),
    do: request(server, command, %{}, [])

  def request(command, args), do: request(__MODULE__, command, args, [])

  @doc "`request(command, args, opts)` or `request(server, command, args)`: as `request/4`."
  @spec request(command() | server(), map() | command(), keyword() | map()) ::
          {:ok, term(), map()} | {:error, Error.t()}
  def request(server, command, args) when is_map(args), do: request(server, command, args, [])
  def request(command, args, opts), do: request(__MODULE__, command, args, opts)

  @doc """
  As `call/4`, with what the peer tells beside the result, and errors that say more:
  `{:ok, result, meta}` or `{:error, %DSPex.PythonBridge.Error{}}`.

  `meta` has string keys: `"duration_ms"`, `"queue_ms"`, `"lm_usage"`.

  Options:

    * `:timeout` – ms, `:infinity` or `:default`
    * `:retry` – true; false: when the peer dies with the request, it is not sent again but gives
      `:python_process_died`
    * `:tools` – a map of functions of one argument by their names, atoms or texts: the tools that the
      program was created with. The peer calls one with a map of arguments, string keys. What it
      returns is the tool's result, if it has a JSON form (`{:ok, term}` counts as `term`);
      `{:error, reason}`, and whatever it raises, throws or exits with, is an error that the program
      is told: a text as `reason` as it is, all else in a line. Each call runs in a process of its own,
      several at once if the peer makes them so, and is killed when the request is over. After the
      peer's death they are made anew. Each call takes a copy of what the function has taken along.
    * `:traceparent` – the [W3C trace context](https://www.w3.org/TR/trace-context/) that the call belongs
      to, such as `"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"`; nil, or nothing said: none. It
      is a header of the HTTP requests that LM calls of the execute make, and metadata of what Python logs
      for it.
    * `:on_chunk` – a function of one argument, called in this process with each map that comes before
      the reply, in order: `%{"field" => …, "chunk" => …}`, `%{"status" => …}`, and for a list of
      inputs each result, `%{"index" => …, "success" => …, …}`. Once it was called, the request is not
      sent again when the peer dies. If it raises, the request is cancelled, and the exception is the
      caller's.

  An option that cannot be right gives an error of type `:invalid_request` that names it.
  """
  @spec request(server(), command(), map(), [request_option()]) ::
          {:ok, term(), map()} | {:error, Error.t()}
  def request(server, command, args, opts) do
    with {:ok, options} <-
           Client.Options.new(opts, [:timeout, :retry, :tools, :traceparent, :on_chunk]),
         request = {server, command, args, options.timeout, options.opts},
         {:ok, _id, result, meta} <- make(request, options) do
      {:ok, result, meta}
    end
  end

  defp make({server, command, args, timeout, opts} = request, options) do
    Telemetry.call(:bridge, server, command, args, fn ->
      if options.on_chunk || opts[:tools],
        do: StreamReducer.run(request, options.on_chunk),
        else: Caller.exchange(server, command, args, timeout, opts)
    end)
  end

  @doc "As `stream/3`, by the bridge named `DSPex.PythonBridge.Bridge`."
  @spec stream(map()) :: Enumerable.t(EventStream.element())
  def stream(args), do: stream(__MODULE__, args, [])

  @doc "`stream(args, opts)` or `stream(server, args)`: as `stream/3`."
  @spec stream(map() | server(), [stream_option()] | map()) :: Enumerable.t(EventStream.element())
  def stream(server, args) when is_map(args), do: stream(server, args, [])
  def stream(args, opts), do: stream(__MODULE__, args, opts)

  @doc """
  An `execute_program` as a lazy enumerable of what comes of it, as it comes:

    * `{:chunk, field, text}` – more of an output field
    * `{:status, text}` – what the program is at
    * `{:item, index, result}` – of a list of inputs, the result of that index, as `{:ok, fields}` or
      `{:error, %DSPex.PythonBridge.Error{}}`
    * last, and always, what `request/4` gives: `{:ok, result, meta}` or
      `{:error, %DSPex.PythonBridge.Error{}}`

  For example, to write an answer while it is made:

      for element <- Bridge.stream(%{program_id: "qa", inputs: %{question: "Why?"}}) do
        case element do
          {:chunk, "answer", text} -> IO.write(text)
          {:error, error} -> IO.puts(:stderr, Exception.message(error))
          _other -> :ok
        end
      end

  Nothing is sent before it is enumerated; each enumeration is an execute of its own. One that is not
  enumerated to its end cancels the execute, also by an exception or the death of the process.

  Options: `:timeout`, for the whole execute, `:retry`, `:tools` and `:traceparent`, as for `request/4`.
  While the consumer does other things, the execute goes on, and what comes of it is kept; if the result
  comes in time, all of it is given, however late it is asked for.
  """
  @spec stream(server(), map(), [stream_option()]) :: Enumerable.t(EventStream.element())
  def stream(server, args, opts) do
    case Client.Options.new(opts, [:timeout, :retry, :tools, :traceparent]) do
      {:ok, options} ->
        EventStream.new({server, :execute_program, args, options.timeout, options.opts})

      {:error, error} ->
        [error: error]
    end
  end

  @doc """
  Sends a command whose reply nobody waits for: `cast(command, args)` or `cast(server, command)`.
  As `cast/3`.
  """
  @spec cast(command() | server(), map() | command()) :: :ok | {:error, String.t()}
  def cast(command, args) when is_map(args), do: cast(__MODULE__, command, args)
  def cast(server, command), do: cast(server, command, %{})

  @doc """
  Sends a command whose reply nobody waits for; the bridge's `:default_timeout` bounds it. `:ok`
  tells nothing of the peer, nor of the bridge; an error is the text of a request that cannot be
  written.
  """
  @spec cast(server(), command(), map()) :: :ok | {:error, String.t()}
  def cast(server, command, args), do: Caller.send_only(server, command, args)

  defp ask(server, question, otherwise, timeout \\ @question_ms) do
    with {:ok, bridge} <- find(server),
         answer when answer != {:error, :unknown_call} <-
           GenServer.call(bridge, question, timeout) do
      answer
    else
      _another -> otherwise
    end
  catch
    # Any term may be given as a server: what is none raises.
    _kind, _not_running -> otherwise
  end

  # On its own node, where it can be told from a process of another kind: a supervisor would end by a question
  # that it does not know.
  defp find(server) do
    case Caller.find(server) do
      {:ok, {name, node} = far} -> find_there(node, name, far)
      {:ok, pid} when node(pid) != node() -> find_there(node(pid), pid, pid)
      here_or_not -> here_or_not
    end
  end

  # A node of an older version has no such function: then the server is asked unchecked.
  defp find_there(node, server, as_given) do
    :erpc.call(node, Caller, :find, [server], @question_ms)
  catch
    :error, {:exception, :undef, [{Caller, :find, _, _} | _]} -> {:ok, as_given}
  end
end
