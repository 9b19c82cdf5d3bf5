defmodule DSPex.PythonBridge.Client.Caller do
  @moduledoc false
  # The part of a call that runs in the caller's process: arguments to bytes, to the bridge, and the bytes of the
  # reply to a result. It neither raises nor exits. With chunks or tools, `DSPex.PythonBridge.Client.StreamReducer`
  # is the part in the middle.

  alias DSPex.PythonBridge.{Error, Protocol}
  alias DSPex.PythonBridge.Calls.{Journal, Request}
  alias DSPex.PythonBridge.OTP.{Ask, Deadline, Registry, Server}
  alias DSPex.PythonBridge.Programs.{Change, Store, Tools}

  @another_node_ms 5_000
  # What is known of a bridge of another node.
  @elsewhere %{
    programs: nil,
    name: nil,
    default_timeout: 30_000,
    journal_bytes: 8 * 1024 * 1024
  }
  @replaced "the Python process was replaced before it had replied, and the request, which said " <>
              "retry: false, was not sent again"
  @tool_begun "the Python process was lost before it had replied, and the request, of which a tool with " <>
                "repeat: false had begun, was not sent again"
  # The longest timeout of `receive`.
  @max_timeout 4_294_967_295

  @typedoc "A call that is prepared, or under way. `server`: as the caller has given it."
  @type call :: %{
          server: GenServer.server(),
          dest: dest(),
          deadline: Deadline.t(),
          args: map()
        }
  @type dest :: pid() | {atom(), node()}
  @type result :: {:ok, Protocol.id(), term(), map()} | {:error, Error.t()}

  @doc """
  Sends a command and waits for its reply. `timeout` is in ms, `:infinity`, or `:default` for the
  bridge's own. Options: `retry: false`, and those of `DSPex.PythonBridge.Protocol.encode_body/3`.
  """
  @spec exchange(GenServer.server(), Protocol.command(), map(), timeout() | :default, keyword()) ::
          result()
  def exchange(server, command, args, timeout, opts) do
    with {:ok, call, request} <- prepare(server, command, args, timeout, opts) do
      # Encoding a large request takes time, too.
      conclude(call, send_and_wait(call.dest, Deadline.left(call.deadline), request))
    end
  end

  @doc "Prepares a call up to the sending of its request. The arguments are those of `exchange/5`."
  @spec prepare(GenServer.server(), Protocol.command(), map(), timeout() | :default, keyword()) ::
          {:ok, call(), Request.t()} | {:error, Error.t()}
  def prepare(server, command, args, timeout, opts) do
    started = Deadline.now()

    with {:ok, dest} <- find(server),
         {:ok, timeout} <- check_timeout(timeout, dest),
         # Only those of this node have entries.
         entry = Registry.get(:bridge, dest) || @elsewhere,
         :ok <- Tools.check(entry.programs, {:bridge, entry.name}, command, args, opts),
         {:ok, body} <- Protocol.encode_body(command, args, opts) do
      call = %{server: server, dest: dest, deadline: Deadline.new(timeout, started), args: args}
      resend = if Keyword.get(opts, :retry, true), do: :bridge, else: :never
      request = %Request{body: body, change: Change.new(command, args), resend: resend}
      stream? = Keyword.get(opts, :stream, false)
      journal = Journal.new(opts, command, args, entry.journal_bytes)
      {:ok, call, %{request | stream?: stream?, journal: journal}}
    end
  end

  @doc "Makes a reply the result of its call."
  @spec conclude(call(), Request.reply()) :: result()
  def conclude(%{dest: dest, args: args} = call, reply) do
    case read(reply) do
      {:error, %Error{type: :bridge_not_running}} ->
        {:error, Error.not_running(:bridge, call.server)}

      {:error, %Error{type: :program_not_found} = error} ->
        {:error, undeclared(dest, Change.program_id(:execute_program, args)) || error}

      result ->
        result
    end
  end

  # Why the declaration of a program that is missing is none, if the bridge is on this node.
  defp undeclared(dest, id) do
    with %{programs: programs} <- Registry.get(:bridge, dest),
         do: Store.undeclared(programs)[id]
  rescue
    # The table has ended with the bridge.
    ArgumentError -> nil
  end

  @doc """
  Sends a command whose reply nobody waits for. A cast has no caller that keeps its time, so the bridge does.
  """
  @spec send_only(GenServer.server(), Protocol.command(), map()) :: :ok | {:error, String.t()}
  def send_only(server, command, args) do
    with {:ok, body} <- Protocol.encode_body(command, args),
         {:ok, dest} <- find(server) do
      timeout = with :infinity <- default_timeout(dest), do: @max_timeout
      request = %Request{body: body, change: Change.new(command, args), timeout: timeout}
      unsuspended(fn -> send(dest, {:request, request}) end)
      :ok
    else
      {:error, %Error{type: :bridge_not_running}} -> :ok
      {:error, error} -> {:error, error.message}
    end
  end

  @doc "Sends a request to a bridge or a pool's coordinator and waits for the reply, at most `timeout` ms."
  @spec send_and_wait(dest(), timeout(), Request.t()) :: Request.reply()
  def send_and_wait(dest, timeout, request) do
    message = fn ref -> {:request, %{request | ref: ref, pid: self(), timeout: timeout}} end
    ask = fn -> ask(dest, timeout, message) end
    if is_pid(dest) and node(dest) == node(), do: ask.(), else: unsuspended(ask)
  end

  defp ask(dest, timeout, message) do
    case Ask.ask(dest, timeout, message) do
      {:ok, reply} ->
        reply

      :down ->
        {:error, :bridge_not_running}

      {:timeout, ref} ->
        send(dest, {:abandon, ref})
        {:error, :timeout}
    end
  end

  # A node that hangs would suspend a process that sends to it, or monitors a process of it.
  defp unsuspended(fun) do
    before = :erlang.process_flag(:async_dist, true)

    try do
      fun.()
    after
      :erlang.process_flag(:async_dist, before)
    end
  end

  @doc "Makes a reply a result, or an error."
  @spec read(Request.reply()) :: result()
  def read({:frame, frame}) do
    case Protocol.decode_reply(frame) do
      {:ok, _id, _result, _meta} = reply ->
        reply

      {:error, _id, error} ->
        {:error, error}

      {:error, {_kind, text}} ->
        {:error, Error.new(:internal, "the peer sent no valid reply: #{text}")}
    end
  end

  def read({:error, {:too_large, size, limit}}) do
    text =
      "the request has #{size} bytes; max_frame_bytes is #{limit}, 64 of which are for its head"

    {:error, Error.new(:frame_too_large, text)}
  end

  def read({:error, {:not_started, reason}}), do: {:error, Error.not_started(reason)}
  def read({:error, {:died, _sent}}), do: {:error, Error.new(:python_process_died)}
  def read({:error, :replaced}), do: {:error, Error.new(:python_process_died, @replaced)}

  def read({:error, :tool_begun}),
    do: {:error, %{Error.new(:python_process_died, @tool_begun) | retryable: false}}

  def read({:error, :proxy_died}),
    do: {:error, Error.new(:cancelled, "the process that made the call was killed")}

  def read({:error, {:ended, why}}),
    do: {:error, Error.new(:cancelled, "the run was ended: #{why}")}

  def read({:error, type}), do: {:error, Error.new(type)}

  @doc "A result of a call that must not be made again: a tool of it with `repeat: false` has begun."
  @spec once(result()) :: result()
  def once({:error, %Error{type: type}})
      when type in [:bridge_not_running, :python_process_died],
      do: read({:error, :tool_begun})

  def once({:error, error}), do: {:error, %{error | retryable: false}}
  def once(result), do: result

  @doc "A timeout in ms, `:default` resolved, or the error for one that `receive` does not take."
  @spec check_timeout(term(), dest()) :: {:ok, timeout()} | {:error, Error.t()}
  def check_timeout(:default, dest), do: {:ok, default_timeout(dest)}
  def check_timeout(:infinity, _dest), do: {:ok, :infinity}
  def check_timeout(ms, _dest) when ms in 0..@max_timeout, do: {:ok, ms}

  def check_timeout(_other, _dest) do
    text = "timeout: expected 0 to #{@max_timeout} ms or :infinity"
    {:error, Error.new(:invalid_request, text)}
  end

  defp default_timeout(dest), do: (Registry.get(:bridge, dest) || @elsewhere).default_timeout

  @doc """
  The address of a bridge. A process of this node that is not a bridge counts as a bridge that is not running: it
  would log what it is sent, or end by it.
  """
  @spec find(term()) :: {:ok, dest()} | {:error, Error.t()}
  def find(server) do
    case Server.find(server) do
      {:bridge, dest} -> {:ok, dest}
      {:pool, _handle} -> {:error, a_pool(server)}
      :none -> {:error, Error.not_running(:bridge, server)}
    end
  end

  @doc """
  As `find/1`, and for a process of another node that node is asked, within 5 s: one of another kind may end by a message
  that it does not know, or never answer.
  """
  @spec find_anywhere(term()) :: {:ok, dest()} | {:error, Error.t()}
  def find_anywhere(server) do
    case find(server) do
      {:ok, {name, node}} ->
        :erpc.call(node, __MODULE__, :find, [name], @another_node_ms)

      {:ok, pid} when node(pid) != node() ->
        :erpc.call(node(pid), __MODULE__, :find, [pid], @another_node_ms)

      here_or_not ->
        here_or_not
    end
  catch
    # The node cannot be reached, has no such module, or is an older one.
    _kind, _reason -> {:error, Error.not_running(:bridge, server)}
  end

  defp a_pool(server) do
    text =
      "#{inspect(server)} is a pool: use Pool.call, Pool.request or Pool.stream, " <>
        "or Pool.with_bridge for one of its bridges"

    Error.new(:invalid_request, text)
  end
end
