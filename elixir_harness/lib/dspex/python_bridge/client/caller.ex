defmodule DSPex.PythonBridge.Client.Caller do
  @moduledoc """
  The way of one call, as far as it runs in the caller's process: arguments to bytes, to the
  bridge, and the reply's bytes to a result. It neither raises nor exits. With chunks or
  tools, `DSPex.PythonBridge.Client.StreamReducer` is the part in the middle; to a bridge of another node,
  `DSPex.PythonBridge.Client.StreamProxy` is.
  """

  alias DSPex.PythonBridge.{Error, Protocol}
  alias DSPex.PythonBridge.Calls.InFlight
  alias DSPex.PythonBridge.Client.StreamProxy
  alias DSPex.PythonBridge.OTP.Registry
  alias DSPex.PythonBridge.Programs.Change

  # The module of a bridge's process: a name only, since the room `bridge` depends on this one.
  @server :"Elixir.DSPex.PythonBridge.Bridge.Server"

  @default_timeout 30_000
  # `receive` takes no longer timeout.
  @max_timeout 4_294_967_295
  # A bridge answers questions at once.
  @longest_question_ms 1_000

  @typedoc "In monotonic ms."
  @type deadline :: integer() | :infinity
  @typedoc "A request that can be sent."
  @type request :: %{
          dest: dest(),
          deadline: deadline(),
          body: binary(),
          terms: InFlight.terms(),
          args: map()
        }
  @type dest :: pid() | {atom(), node()}
  @type reply :: {:frame, binary()} | {:error, :timeout | :proxy_died | InFlight.failure()}
  @type result :: {:ok, Protocol.id(), term(), map()} | {:error, Error.t()}

  @doc """
  Sends a command and waits for its reply. `timeout` is in ms, `:infinity`, or `:default` for the
  bridge's own. Options: `retry: false`, and those of
  `DSPex.PythonBridge.Protocol.encode_body/3`.
  """
  @spec exchange(GenServer.server(), Protocol.command(), map(), timeout() | :default, keyword()) ::
          result()
  def exchange(server, command, args, timeout, opts) do
    with {:ok, request} <- prepare(server, command, args, timeout, opts) do
      # Writing a large request takes time, too.
      left = left(request.deadline)
      conclude(request, send_and_wait(request.dest, left, request.body, request.terms))
    end
  end

  @doc "All that is done before a request is sent. The arguments are those of `exchange/5`."
  @spec prepare(GenServer.server(), Protocol.command(), map(), timeout() | :default, keyword()) ::
          {:ok, request()} | {:error, Error.t()}
  def prepare(server, command, args, timeout, opts) do
    started = now()

    with {:ok, dest} <- find(server),
         {:ok, timeout} <- check_timeout(timeout, dest),
         {:ok, body} <- Protocol.encode_body(command, args, opts) do
      {:ok,
       %{
         dest: dest,
         deadline: deadline(started, timeout),
         body: body,
         terms: terms(opts, Change.new(command, args)),
         args: args
       }}
    end
  end

  @doc "All that is done when the reply has come, or will not."
  @spec conclude(request(), reply()) :: result()
  def conclude(%{dest: dest, args: args, deadline: deadline}, reply) do
    case read(reply) do
      {:error, %Error{type: :program_not_found} = error} ->
        {:error, load_failure(dest, args, left(deadline)) || error}

      result ->
        result
    end
  end

  @doc """
  Sends a command whose reply nobody waits for. The bridge keeps its time: a cast has no caller
  that would.
  """
  @spec send_only(GenServer.server(), Protocol.command(), map()) :: :ok | {:error, String.t()}
  def send_only(server, command, args) do
    with {:ok, body} <- Protocol.encode_body(command, args),
         {:ok, dest} <- find(server) do
      timeout = with :infinity <- default_timeout(dest), do: @max_timeout
      request = {:request, nil, nil, timeout, body, terms([], Change.new(command, args))}

      # The connection to another node may have no room, for as long as that hangs.
      with :nosuspend <- :erlang.send(dest, request, [:nosuspend]),
           do: spawn(fn -> send(dest, request) end)

      :ok
    else
      {:error, %Error{type: :bridge_not_running}} -> :ok
      {:error, error} -> {:error, error.message}
    end
  end

  # The usual terms are made when this is compiled.
  defp terms([], nil), do: {:here, 0, nil}
  defp terms([meta: true], nil), do: {:here, 0, nil}

  defp terms(opts, change),
    do: {if(Keyword.get(opts, :retry, true), do: :here, else: :never), 0, change}

  # A program that its peer could not load again is missing there; the bridge knows why.
  defp load_failure(dest, args, left) do
    with id when id != nil <- Change.program_id(:execute_program, args),
         do: GenServer.call(dest, {:load_failure, id}, min(left, @longest_question_ms))
  catch
    :exit, _no_answer -> nil
  end

  @doc """
  Sends a body to a bridge and waits for what comes back, at most `timeout` ms.
  """
  @spec send_and_wait(dest(), timeout(), binary(), InFlight.terms()) :: reply()
  # The alias is what makes a late reply harmless: it ends with the first reply or with demonitor,
  # and what is sent to it afterwards goes nowhere.
  def send_and_wait(dest, timeout, body, terms) when is_pid(dest) and node(dest) == node() do
    ref = :erlang.monitor(:process, dest, alias: :reply_demonitor)
    send(dest, {:request, ref, self(), at_least_one(timeout), body, terms})

    receive do
      {^ref, reply} -> reply
      {:DOWN, ^ref, :process, _pid, _reason} -> {:error, :bridge_not_running}
    after
      timeout ->
        Process.demonitor(ref, [:flush])

        # The reply may have come between the two.
        receive do
          {^ref, reply} -> reply
        after
          0 ->
            send(dest, {:abandon, ref})
            {:error, :timeout}
        end
    end
  end

  # A node that hangs holds up whoever sends to it, and whoever only watches a process of it: not the caller.
  def send_and_wait(dest, timeout, body, terms) do
    deadline = deadline(now(), timeout)
    call = %{dest: dest, deadline: deadline, body: body, terms: terms}

    {:over, reply} =
      call |> StreamProxy.start(stream?: false, tools: %{}) |> StreamProxy.next(deadline)

    reply
  end

  @doc "What `send_and_wait/4` gave, as a result or an error."
  @spec read(reply()) :: result()
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
    text = "the request has #{size} bytes; max_frame_bytes is #{limit}"
    {:error, Error.new(:frame_too_large, text)}
  end

  def read({:error, {:died, _sent}}), do: {:error, Error.new(:python_process_died)}

  def read({:error, :replaced}) do
    text = "the Python process was replaced before it had replied, and the request, "
    text = text <> "of which chunks were given or which said retry: false, was not sent again"
    {:error, Error.new(:python_process_died, text)}
  end

  def read({:error, :proxy_died}) do
    text = "the process that made the call in the caller's place was killed"
    {:error, Error.new(:cancelled, text)}
  end

  def read({:error, type}), do: {:error, Error.new(type)}

  @doc "The ms that are left until a deadline."
  @spec left(deadline()) :: timeout()
  def left(:infinity), do: :infinity
  def left(deadline), do: max(deadline - now(), 0)

  defp deadline(_from, :infinity), do: :infinity
  defp deadline(from, timeout), do: from + timeout

  defp now, do: System.monotonic_time(:millisecond)

  @doc "The timeout as it goes with a request: the peer takes no deadline of 0."
  @spec at_least_one(timeout()) :: timeout()
  def at_least_one(0), do: 1
  def at_least_one(timeout), do: timeout

  @doc "The timeout in ms that is meant, or an error: it has to be one that `receive` takes."
  @spec check_timeout(term(), pid() | {atom(), node()}) :: {:ok, timeout()} | {:error, Error.t()}
  def check_timeout(:default, dest), do: {:ok, default_timeout(dest)}
  def check_timeout(:infinity, _dest), do: {:ok, :infinity}
  def check_timeout(ms, _dest) when ms in 0..@max_timeout, do: {:ok, ms}

  def check_timeout(_other, _dest) do
    text = "timeout: expected 0 to #{@max_timeout} ms or :infinity"
    {:error, Error.new(:invalid_request, text)}
  end

  @doc """
  Where the messages for a bridge go. A process of this node that is not a bridge is none of its kind that is not
  running: it would log what it is sent, or end by it.
  """
  @spec find(term()) :: {:ok, dest()} | {:error, Error.t()}
  def find(server) do
    dest = whereis(server)

    cond do
      bridge?(dest) -> {:ok, dest}
      dest != nil and Registry.get(:pool, dest) != nil -> {:error, a_pool(server)}
      true -> {:error, Error.new(:bridge_not_running)}
    end
  end

  # What is on another node is known there. A bridge is registered before it runs; once it does, its dictionary, and
  # with it what it began with, is hidden, but by then it has told its defaults: whoever saw neither looks again.
  defp bridge?(pid) when is_pid(pid) and node(pid) == node(),
    do: registered?(pid) or begins?(pid) or registered?(pid)

  defp bridge?(dest), do: dest != nil

  defp registered?(pid), do: Registry.get(:bridge, pid) != nil
  defp begins?(pid), do: match?({@server, :init, 1}, :proc_lib.translate_initial_call(pid))

  # It would log what it is sent, and not answer.
  defp a_pool(server) do
    text = "#{inspect(server)} is a pool: Pool.call, or a bridge of Pool.checkout"
    Error.new(:invalid_request, text)
  end

  # Any term may be given as a server; what is none, or cannot be reached, is not running.
  defp whereis(server) do
    case GenServer.whereis(server) do
      pid when is_pid(pid) -> pid
      {name, node} when is_atom(name) and is_atom(node) -> if Node.alive?(), do: {name, node}
      _none -> nil
    end
  catch
    # A registry is code of the host's: it may raise, exit or throw.
    _kind, _reason -> nil
  end

  defp default_timeout(dest) do
    case Registry.get(:bridge, dest) do
      %{default_timeout: timeout} -> timeout
      nil -> @default_timeout
    end
  end
end
