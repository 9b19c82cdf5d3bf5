defmodule DSPex.PythonBridge.Pool.Cluster.RemoteCall do
  @moduledoc false
  # One call to another node of the cluster, by two processes: a courier on this node, and a proxy on the other one,
  # which makes the call there (`DSPex.PythonBridge.Pool.Remote`).
  #
  # The courier may block, on a connection whose buffer is full or a node that has stopped; the caller only waits for
  # the courier's message, until its timeout. The two processes are linked, and the courier monitors the caller: if the
  # caller gives up or dies, both end, and the bridge there, which monitors the proxy, cancels the request in its peer.
  # The link ends the courier when the other node is lost.
  #
  # A call with chunks or tools, or one that must not be made twice, is made by a proxy here and a relay there
  # (`DSPex.PythonBridge.Pool.Cluster.Relay`). A node of an older version has no relays, and counts as one that cannot
  # serve such calls.

  alias DSPex.PythonBridge.{Error, Programs}
  alias DSPex.PythonBridge.Client.Caller
  alias DSPex.PythonBridge.Pool.{Attempt, Handle, LocalCall, Remote, Request}

  # A node that has not started the proxy by then has stopped or cannot be reached: the runtime itself takes a minute
  # to notice. A large request may take longer, on a slow network.
  @reach_ms 2_000
  @bytes_per_ms 5_000

  @doc "Whether a call that may begin at any node begins at another one than this: by chance, each has the same."
  @spec first?(Handle.t()) :: boolean()
  def first?(%Handle{settings: %{cluster: nil}}), do: false
  def first?(%Handle{} = handle), do: :rand.uniform(length(serving(handle)) + 1) > 1

  @doc "Runs the call on another node, if there is one that can serve it."
  @spec run(Handle.t(), Request.t(), Attempt.t()) ::
          {:done, LocalCall.reply() | Attempt.begun()} | {:nobody, Request.t()}
  def run(%Handle{settings: %{cluster: nil}}, request, _attempt), do: {:nobody, request}

  def run(%Handle{} = handle, %Request{} = request, attempt) do
    case serving(handle) -- request.passed_nodes do
      [] -> {:nobody, request}
      others -> try_node(handle, request, Enum.random(others), attempt, nil)
    end
  end

  @doc "The nodes that can serve calls, as the pool's table has them."
  @spec serving(Handle.t()) :: [tuple()]
  # The tables are the pool's, which may end at any time.
  def serving(handle) do
    :ets.tab2list(handle.others)
  rescue
    ArgumentError -> []
  end

  defp definition(handle, program) do
    Programs.Store.get(handle.programs, program)
  rescue
    ArgumentError -> nil
  end

  defp try_node(handle, request, {coordinator, _since, name} = other, attempt, definition) do
    node = node(coordinator)

    served =
      if Attempt.plain?(attempt),
        do: carry(node, name, request, definition),
        else: relay(node, name, request, definition, attempt)

    case follow(request, other, served) do
      {:done, {:begun, call, frame}} ->
        call = Map.put(call, :follow, &follow(request, other, served(&1)))
        {:done, {:begun, call, frame}}

      {:done, reply} ->
        if definition == nil,
          do: repair(handle, request, other, attempt, reply),
          else: {:done, reply}

      # A peer of this node may be able to serve again by now.
      {:again, request} ->
        with {:nobody, request} <-
               LocalCall.run(handle, request, &Attempt.make(attempt, &1, &2, &3)),
             do: run(handle, request, attempt)
    end
  end

  defp follow(request, other, served) do
    passed = %{request | passed_nodes: [other | request.passed_nodes]}

    case served do
      {:done, reply} ->
        {:done, reply}

      {:nobody, deaths, overloaded} ->
        {:again, %{passed | deaths: deaths, overloaded: overloaded || request.overloaded}}

      :vanished ->
        {:again, passed}
    end
  end

  # The program may be in the table here and not yet there.
  defp repair(handle, request, other, attempt, {:error, %Error{type: :program_not_found}} = reply)
       when request.program != nil do
    case definition(handle, request.program) do
      nil -> {:done, reply}
      {stamp, body} -> try_node(handle, request, other, attempt, {request.program, stamp, body})
    end
  end

  defp repair(_handle, _request, _other, _attempt, reply), do: {:done, reply}

  ## On this node

  # A message that is sent to the alias too late is dropped by the runtime.
  defp carry(node, name, request, definition) do
    args = [self(), node, [name, pack(request), definition]]
    how = [monitor: [alias: :demonitor]]
    {courier, ref} = :erlang.spawn_opt(__MODULE__, :courier, args, how)
    send(courier, {:reply_to, ref})
    result = wait_for_proxy(request, ref)
    Process.exit(courier, :kill)
    Process.demonitor(ref, [:flush])
    flush(ref)
    result
  end

  defp wait_for_proxy(request, ref) do
    left = Request.left(request)
    reach_ms = reach_ms(request)

    receive do
      {^ref, :reached} -> wait_for_result(request, ref)
      {:DOWN, ^ref, :process, _courier, _reason} -> :vanished
    after
      # An atom is greater than any number.
      min(left, reach_ms) -> if left <= reach_ms, do: timeout(), else: :vanished
    end
  end

  defp reach_ms(request), do: @reach_ms + div(byte_size(request.body), @bytes_per_ms)

  defp wait_for_result(request, ref) do
    receive do
      {^ref, {:served, result}} -> result
      {:DOWN, ^ref, :process, _courier, _reason} -> :vanished
    after
      Request.left(request) -> timeout()
    end
  end

  # With the time that is left in place of the deadline: the other node has another clock.
  defp pack(request) do
    left = Request.left(request)
    %{request | deadline: left, passed: [], passed_nodes: [], repaired: []}
  end

  defp flush(ref) do
    receive do
      {^ref, _too_late} -> flush(ref)
    after
      0 -> :ok
    end
  end

  defp relay(node, name, request, definition, attempt) do
    how = %{retry: attempt.retry}

    case open(node, [self(), name, pack(%{request | body: ""}), definition, how], request) do
      {:ok, relay} -> attempt |> Attempt.make_there(relay, request) |> served()
      :timeout -> timeout()
      :vanished -> :vanished
    end
  end

  # By a process that may block, as the courier.
  defp open(node, args, request) do
    {opener, ref} =
      spawn_monitor(fn ->
        Process.flag(:sensitive, true)
        exit(opened(node, args))
      end)

    wait_ms = min(Request.left(request), @reach_ms)

    receive do
      {:DOWN, ^ref, :process, ^opener, {:ok, relay}} -> {:ok, relay}
      {:DOWN, ^ref, :process, ^opener, _reason} -> :vanished
    after
      wait_ms ->
        Process.exit(opener, :kill)
        Process.demonitor(ref, [:flush])
        if Request.left(request) == 0, do: :timeout, else: :vanished
    end
  end

  defp opened(node, args) do
    {:ok, :erpc.call(node, Remote, :open, args, @reach_ms)}
  catch
    # No such node, or another version of that module there.
    _kind, _reason -> :vanished
  end

  defp served({:served, served}), do: served
  defp served({:error, :bridge_not_running}), do: :vanished
  defp served({:begun, _call, _frame} = begun), do: {:done, begun}
  defp served({:error, _final} = reply), do: {:done, Caller.read(reply)}

  defp timeout, do: {:done, {:error, Error.new(:timeout)}}

  @doc false
  @spec courier(pid(), node(), list()) :: :ok
  def courier(caller, node, args) do
    Process.flag(:trap_exit, true)
    watch = Process.monitor(caller)

    receive do
      {:reply_to, ref} -> carry_to(ref, watch, node, args)
      {:DOWN, ^watch, :process, _caller, _reason} -> :ok
    end
  end

  # This may block.
  defp carry_to(ref, watch, node, args) do
    spawned = :erlang.spawn_request(node, Remote, :proxy, [self() | args], [:link])

    receive do
      {:spawn_reply, ^spawned, :ok, _proxy} ->
        send(ref, {ref, :reached})
        bring_back(ref, watch)

      # No such node, or another version of that module there.
      {:spawn_reply, ^spawned, :error, _reason} ->
        :ok

      {:DOWN, ^watch, :process, _caller, _reason} ->
        exit(:shutdown)
    end
  end

  defp bring_back(ref, watch) do
    receive do
      {:served, _result} = served -> send(ref, {ref, served})
      {:EXIT, _proxy, _reason} -> :ok
      {:DOWN, ^watch, :process, _caller, _reason} -> exit(:shutdown)
    end

    :ok
  end
end
