defmodule DSPex.PythonBridge.Durable.Session do
  @moduledoc false
  # The process that has a run's claim while the run is at work, for the process that makes the call. It alone appends records. It
  # extends the claim, and ends with that process.
  #
  # Tools ask it before they begin. One that must wait for a decision is held until no other tool of the run is at work; then it
  # ends the run.

  use GenServer

  alias DSPex.PythonBridge.Durable.{History, Run, Store}
  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Tools.{Answer, Runner}

  # Parallel tool calls come within a few ms: all that need an approval wait for it together.
  @gather_ms 100
  @suspended "it is suspended"

  # until: the end of the claim, in monotonic ms. lost: why nothing can be stored any more. running: the keys of the calls that
  # are at work, by the processes of their tools. held: those that must wait for a decision. gather: the timer after which these end the run.
  @enforce_keys [:store, :id, :owner, :lease, :tools]
  defstruct @enforce_keys ++ [:until, :history, :lost, :gather, running: %{}, held: []]

  @typedoc "`functions`: by their names. `approve`: the names of those that need an approval for each call."
  @type tools :: %{functions: Runner.tools(), approve: MapSet.t(String.t())}

  @doc "Claims a run and reads it, for the calling process; without `tools` its records may be damaged, and are not read."
  @spec start(Store.t(), Store.id(), pos_integer(), tools() | nil) ::
          {:ok, pid(), History.t()} | {:error, :claimed | String.t()}
  def start(store, id, lease, tools) do
    callers = [self() | Process.get(:"$callers", [])]

    case GenServer.start(__MODULE__, {self(), callers, store, id, lease, tools}) do
      {:ok, pid} -> {:ok, pid, GenServer.call(pid, :history, :infinity)}
      {:error, {:shutdown, reason}} -> {:error, reason}
    end
  end

  @doc "Stores a record."
  @spec append(pid(), binary()) :: :ok | {:error, String.t()}
  def append(session, record), do: ask(session, {:append, record})

  @doc """
  Ends the claim: the run, with the text of its error, and whether one of its tools has ended it to wait for a decision.
  """
  @spec finish(pid(), error :: String.t() | nil) ::
          {:ok, Run.t(), suspended? :: boolean()} | {:error, String.t()}
  def finish(session, error), do: ask(session, {:finish, error})

  @doc "Stores, for a tool whose process was killed, the error that the LM is told."
  @spec killed(pid(), tool :: pid(), String.t()) :: :ok | {:error, String.t()}
  def killed(session, pid, text), do: ask(session, {:killed, pid, text})

  @doc "Erases the run."
  @spec delete(pid()) :: :ok | {:error, :claimed | String.t()}
  def delete(session), do: ask(session, :delete)

  # Nothing that the session does takes longer than the lease.
  defp ask(session, question) do
    GenServer.call(session, question, :infinity)
  catch
    :exit, _reason -> {:error, "the process of the run has ended"}
  end

  ## In the process of a tool

  @doc "The functions that a peer's calls get in place of the run's own."
  @spec wrapped(pid(), tools()) :: %{String.t() => (map(), String.t() -> term())}
  def wrapped(session, %{functions: functions}) do
    Map.new(functions, fn {name, {function, _repeat?}} ->
      {name, &call(session, name, function, &1, &2)}
    end)
  end

  defp call(session, name, function, args, key) do
    case ask(session, {:begin, key, name, args}) do
      {:answered, answer} -> answer
      :run -> run(session, name, function, args, key)
      {:error, why} -> Answer.end_run(why)
    end
  end

  defp run(session, name, function, args, key) do
    case Answer.of(fn -> returned(function, args, key) end) do
      {{:ok, {:suspend, info}}, :returned} ->
        info = as_json(name, {:ok, info})
        {:error, why} = ask(session, {:suspend, key, name, args, elem(info, 1)})
        Answer.end_run(why)

      {result, how} ->
        answer = as_json(name, result)
        stored = ask(session, {:answer, key, History.record(Map.new([{:answer, key}, answer]))})
        ended(stored, how, answer)
    end
  end

  defp ended({:error, why}, _how, _answer), do: Answer.end_run(why)
  defp ended(:ok, :returned, answer), do: answer

  defp ended(:ok, {kind, reason, stacktrace}, _answer),
    do: :erlang.raise(kind, reason, stacktrace)

  # `{:ok, term}` counts as the term, and this is a pair.
  defp returned(function, args, key) do
    value = if is_function(function, 1), do: function.(args), else: function.(args, key)
    with {:suspend, info} <- value, do: {:ok, {:suspend, info}}
  end

  # What is stored, and what the peer gets: it is the same when the run is resumed.
  defp as_json(name, {kind, value}) do
    with {:ok, json} <- Payload.encode(value, if(kind == :ok, do: "result", else: "error")),
         {:ok, value} <- json |> IO.iodata_to_binary() |> Payload.decode() do
      {kind, value}
    else
      {:error, %{message: text}} -> {:error, Answer.about(name, text)}
      {:error, {:invalid_json, text}} -> {:error, Answer.about(name, text)}
    end
  end

  ## The process

  @impl GenServer
  def init({caller, callers, store, id, lease, tools}) do
    Process.flag(:sensitive, true)
    Process.put(:"$callers", callers)
    Process.monitor(caller)
    owner = Base.encode16(:crypto.strong_rand_bytes(16), case: :lower)
    state = %__MODULE__{store: store, id: id, owner: owner, lease: lease, tools: tools}

    with {:ok, state} <- claim(state),
         {:ok, records} <- if(tools, do: Store.call(store, :read, [id], lease), else: {:ok, []}),
         {:ok, history} <- History.read(records) do
      {:ok, %{state | history: history}}
    else
      {:error, reason} -> {:stop, {:shutdown, reason}}
    end
  end

  @impl GenServer
  def handle_call(:history, _from, state) do
    # A run's entries are kept by its call from now on.
    {:reply, state.history, %{state | history: %{state.history | entries: []}}}
  end

  def handle_call({:append, record}, _from, state) do
    {reply, state} = store(state, record)
    {:reply, reply, state}
  end

  def handle_call({:begin, key, name, args}, {pid, _tag} = from, state) do
    history = state.history

    cond do
      answer = history.answers[key] ->
        {:reply, {:answered, answer}, state}

      is_map_key(history.waiting, key) ->
        {:noreply, hold(state, from)}

      name in state.tools.approve and key not in history.approved ->
        wait(state, from, key, name, args, "approve")

      is_map_key(history.begun, key) and match?({_, false}, state.tools.functions[name]) ->
        wait(state, from, key, name, args, "unknown_outcome")

      true ->
        {reply, state} = store(state, History.record(%{began: key, tool: name}))

        if reply == :ok,
          do: {:reply, :run, gather(put_in(state.running[pid], key))},
          else: {:reply, reply, state}
    end
  end

  def handle_call({:suspend, key, name, args, info}, {pid, _tag} = from, state),
    do: wait(at_rest(state, pid), from, key, name, args, info)

  # Without a call at work, its answer is stored already, or it has not begun: the LM must not be told anything else.
  def handle_call({:killed, pid, text}, _from, state) do
    case state.running do
      %{^pid => key} ->
        {reply, state} = store(state, History.record(%{answer: key, error: text}))
        {:reply, reply, state |> at_rest(pid) |> gather()}

      _none ->
        {:reply, {:error, "the process of a tool was killed"}, state}
    end
  end

  def handle_call({:answer, _key, record}, {pid, _tag}, state) do
    {reply, state} = store(state, record)
    {:reply, reply, state |> at_rest(pid) |> gather()}
  end

  def handle_call({:finish, error}, _from, state) do
    suspended? = state.held != [] or (error == nil and map_size(state.history.waiting) > 0)
    run = Run.of(state.id, state.history, if(suspended?, do: nil, else: error))
    args = [state.id, state.owner, Run.summary(run)]
    # If it fails, the records say the same, and the claim ends by itself.
    Store.call(state.store, :finish, args, state.lease)
    {:stop, :normal, {:ok, run, suspended?}, state}
  end

  def handle_call(:delete, _from, state),
    do: {:stop, :normal, Store.call(state.store, :delete, [state.id], state.lease), state}

  @impl GenServer
  def handle_info(:renew, state) do
    case claim(state) do
      {:ok, state} -> {:noreply, state}
      {:error, :claimed} -> {:noreply, lost(state, "another process has claimed it")}
      # It is tried until the lease is over.
      {:error, _text} -> {:noreply, renew_later(state)}
    end
  end

  def handle_info({:timeout, gather, :gathered}, %{gather: gather} = state) do
    for from <- state.held, do: GenServer.reply(from, {:error, @suspended})
    # No tool begins any more.
    {:noreply, %{state | gather: nil, lost: @suspended}}
  end

  # The caller.
  def handle_info({:DOWN, _monitor, :process, _pid, _reason}, state) do
    {:stop, :normal, _reply, state} = handle_call({:finish, "its process has ended"}, nil, state)
    {:stop, :normal, state}
  end

  def handle_info(_late, state), do: {:noreply, state}

  @impl GenServer
  def format_status(status), do: ServerGuard.format_status(status)

  ## The claim

  defp claim(%__MODULE__{lease: lease} = state) do
    until = now() + lease

    with :ok <- Store.call(state.store, :claim, [state.id, state.owner, lease], lease),
         do: {:ok, renew_later(%{state | until: until})}
  end

  defp renew_later(state) do
    Process.send_after(self(), :renew, div(state.lease, 3))
    state
  end

  defp store(%__MODULE__{lost: nil} = state, record) do
    with true <- now() < state.until || {:error, "the lease is over"},
         :ok <- Store.call(state.store, :append, [state.id, state.owner, record], state.lease) do
      {:ok, history} = History.add(state.history, record)
      {:ok, %{state | history: %{history | entries: []}}}
    else
      # The record may be there in part: nothing is added after it.
      {:error, :claimed} -> {:error, "another process has claimed it"} |> failed(state)
      error -> failed(error, state)
    end
  end

  defp store(%__MODULE__{lost: why} = state, _record), do: {{:error, why}, state}

  defp failed({:error, why} = error, state), do: {error, lost(state, why)}
  defp lost(state, why), do: %{state | lost: why}
  defp now, do: System.monotonic_time(:millisecond)

  ## Waiting for decisions

  defp wait(state, from, key, name, args, why) do
    record = History.record(%{wait: key, tool: name, args: args, why: why})

    case store(state, record) do
      {:ok, state} -> {:noreply, hold(state, from)}
      {error, state} -> {:reply, error, state}
    end
  end

  defp hold(state, from), do: gather(%{state | held: [from | state.held]})

  defp at_rest(state, pid), do: %{state | running: Map.delete(state.running, pid)}

  defp gather(state) do
    if state.held != [] and state.running == %{},
      do: %{state | gather: :erlang.start_timer(@gather_ms, self(), :gathered)},
      else: %{state | gather: nil}
  end
end
