# The least GenServer that does what a bridge does for a plain call: the baseline for `Bridge.call`
# (`ROW=calls make bench`).
#
# Its guarantees of delivery are those of a bridge: each call has one result; the caller monitors the server, and the
# server the caller; a call whose time is over, or whose caller has died, is cancelled in the peer, and its late reply goes
# nowhere; a peer that dies answers all its callers. JSON is encoded and decoded in the caller's process. It has one peer,
# and neither restarts, retries, limits, programs, streams, tools nor events; a peer that does not read blocks it.

defmodule Bench.LeastServer do
  use GenServer

  @doc "Starts a server with its port program: `{executable, args}`."
  def start(command), do: GenServer.start(__MODULE__, command)

  def call(server, command, args, timeout) do
    [command, args, ms] = for term <- [command, args, timeout], do: JSON.encode_to_iodata!(term)
    body = IO.iodata_to_binary(["\"command\":", command, ",\"args\":", args, ",\"timeout_ms\":", ms, "}"])
    ref = :erlang.monitor(:process, server, alias: :reply_demonitor)
    send(server, {:request, ref, self(), body})

    receive do
      {^ref, frame} when is_binary(frame) -> result(JSON.decode!(frame))
      {^ref, error} -> error
      {:DOWN, ^ref, :process, _pid, _reason} -> {:error, :not_running}
    after
      timeout ->
        Process.demonitor(ref, [:flush])
        send(server, {:abandon, ref})
        last(ref)
    end
  end

  # The reply may have come between the end of the time and that of the alias.
  defp last(ref) do
    receive do
      {^ref, frame} when is_binary(frame) -> result(JSON.decode!(frame))
      {^ref, error} -> error
    after
      0 -> {:error, :timeout}
    end
  end

  defp result(%{"success" => true, "result" => result}), do: {:ok, result}
  defp result(%{"success" => false, "error" => error}), do: {:error, error}

  ## The server. `calls`: by id, the caller's alias and its monitor; `refs`: the ids by alias.

  @impl GenServer
  def init({executable, args}) do
    port = Port.open({:spawn_executable, executable}, [{:packet, 4}, :binary, :exit_status, args: args])
    {:ok, %{port: port, next_id: 1, calls: %{}, refs: %{}}}
  end

  @impl GenServer
  def handle_info({port, {:data, <<"{\"id\":", rest::binary>> = frame}}, %{port: port} = state) do
    {id, _rest} = Integer.parse(rest)

    case take(state, id) do
      {ref, state} ->
        send(ref, {ref, frame})
        {:noreply, state}

      # Too late.
      nil ->
        {:noreply, state}
    end
  end

  def handle_info({:request, ref, pid, body}, %{next_id: id} = state) do
    monitor = :erlang.monitor(:process, pid, tag: {:caller_down, id})
    Port.command(state.port, ["{\"id\":", Integer.to_string(id), ",", body])
    calls = Map.put(state.calls, id, {ref, monitor})
    {:noreply, %{state | next_id: id + 1, calls: calls, refs: Map.put(state.refs, ref, id)}}
  end

  def handle_info({:abandon, ref}, state) do
    case state.refs do
      %{^ref => id} -> cancel(state, id)
      _answered -> {:noreply, state}
    end
  end

  def handle_info({{:caller_down, id}, _monitor, :process, _pid, _reason}, state), do: cancel(state, id)

  def handle_info({port, {:exit_status, _code}}, %{port: port} = state) do
    for {_id, {ref, _monitor}} <- state.calls, do: send(ref, {ref, {:error, :died}})
    {:stop, :normal, state}
  end

  defp cancel(state, id) do
    case take(state, id) do
      {_ref, state} ->
        Port.command(state.port, ["{\"cancel\":", Integer.to_string(id), "}"])
        {:noreply, state}

      nil ->
        {:noreply, state}
    end
  end

  defp take(%{calls: calls, refs: refs} = state, id) do
    case calls do
      %{^id => {ref, monitor}} ->
        Process.demonitor(monitor)
        {ref, %{state | calls: Map.delete(calls, id), refs: Map.delete(refs, ref)}}

      _gone ->
        nil
    end
  end
end
