defmodule DSPex.PythonBridge.Tools.FunctionHolder do
  @moduledoc false
  # The process that holds the caller's functions during a call with tools: one for each such call, opened by the
  # caller. Each `DSPex.PythonBridge.Client.StreamProxy` that makes the call attends it in turn: a pool starts another one
  # for each peer that it tries.
  #
  # It sends each process of a tool (`DSPex.PythonBridge.Tools.Invocation`) the one function that it runs. That copies
  # all that the function has captured, which may take long: the proxy, which keeps the time of the call, must not do it.
  #
  # If the run is sent again, tool calls that were made before are not made again (`DSPex.PythonBridge.Tools.Memory`):
  # those that still run go on, and their answers are kept. A function of which each call is for one peer only
  # (`repeat: false`) is given in two steps: between them its process makes sure that the bridge does not send the
  # run again. Nor does a pool afterwards, since no other proxy may attend.
  #
  # It ends, and the tools with it, when it is closed at the end of the call, with the caller, and with a proxy that was
  # killed. It uses no links, which a function may remove, or survive by trapping exits.

  alias DSPex.PythonBridge.OTP.{Ask, ServerGuard}
  alias DSPex.PythonBridge.Tools.{Answer, Memory, Outcome}

  @enforce_keys [:functions, :caller, :run_id, :memory]
  defstruct [:functions, :caller, :run_id, :memory, :proxy, :watch] ++
              [peer: 0, users: %{}, bound?: false]

  @typedoc "A function, and whether a call of it may be made again."
  @type tool ::
          {function :: (map() -> term()) | (map(), String.t() -> term()), repeat? :: boolean()}
  @type functions :: %{String.t() => tool()}
  @typedoc "A peer: the proxy that attends, and the number of the peer, by which it counts them."
  @type source :: {holder :: pid(), proxy :: pid(), peer :: pos_integer()}
  # run_id: of the whole call. proxy, watch: the present proxy, nil between two of them, and its monitor. users: the
  # processes that have a function, or will answer in their place, by their monitors. bound?: whether a function has
  # begun after which the run is not sent again.
  @typep t :: %__MODULE__{
           functions: functions(),
           caller: pid(),
           run_id: binary(),
           memory: Memory.t(Answer.t()),
           proxy: pid() | nil,
           watch: reference() | nil,
           peer: non_neg_integer(),
           users: %{reference() => {pid(), Memory.call()}},
           bound?: boolean()
         }

  @doc "Starts it for the calling process, the caller; nil without functions. `retry?`: whether the run may be sent again."
  @spec open(functions(), retry? :: boolean()) :: pid() | nil
  def open(functions, retry? \\ true)
  def open(functions, _retry?) when functions == %{}, do: nil

  def open(functions, retry?) do
    caller = self()
    spawn(fn -> ServerGuard.run(fn -> init(functions, caller, retry?) end) end)
  end

  @doc """
  Makes the calling process its proxy, in the place of an earlier one: only tools of its peers get functions. `:bound` if
  the run must not be sent to another peer.
  """
  @spec attend(pid()) :: :ok | :bound
  def attend(holder) do
    proxy = self()
    # Without a holder the caller is gone, too.
    with {:ok, answer} <- Ask.ask(holder, :infinity, &{:attend, &1, proxy}),
         do: answer,
         else: (:down -> :ok)
  end

  @doc """
  What the calling process is to do with a tool call of a peer: `:run` a function; `:claimed`, with `begin/3` before it
  runs; the answer of an earlier peer's call; or nothing, since there is no such function, or the call is `:over`, or has
  gone on to another peer. It waits while the call of an earlier peer is running.
  """
  @spec fetch(source(), String.t(), Memory.digest()) ::
          {:run, function(), Memory.call(), run_id :: binary()}
          | {:claimed, Memory.call()}
          | {:answered, Answer.t()}
          | {:unknown, [String.t()]}
          | :over
  def fetch({holder, proxy, peer}, name, digest),
    do: ask(holder, &{:fetch, {self(), &1}, {proxy, peer}, name, digest})

  @doc "Begins a claimed call: from then on the holder lets no other proxy attend."
  @spec begin(source(), String.t(), Memory.call()) ::
          {:run, function(), Memory.call(), run_id :: binary()} | :over
  def begin({holder, proxy, peer}, name, call),
    do: ask(holder, &{:begin, {self(), &1}, {proxy, peer}, name, call})

  defp ask(holder, message) do
    case Ask.ask(holder, :infinity, message) do
      {:ok, answer} -> answer
      :down -> :over
    end
  end

  @doc "Takes the answer of the call that the calling process has made."
  @spec answered(pid(), Memory.call(), Answer.t()) :: :ok
  def answered(holder, call, answer) do
    send(holder, {:answered, self(), call, answer})
    :ok
  end

  @doc "Keeps no answers any longer: the run is not sent again."
  @spec forget(pid()) :: :ok
  def forget(holder) do
    send(holder, :forget)
    :ok
  end

  @doc """
  Ends it, and the tools before this returns. It may have ended already. `:bound` if a function had begun that must not be
  called again.
  """
  @spec close(pid() | nil) :: :ok | :bound
  def close(nil), do: :ok

  def close(holder) do
    with {:ok, answer} <- Ask.ask(holder, :infinity, &{:close, &1}),
         do: answer,
         else: (:down -> :ok)
  end

  ## The process

  defp init(functions, caller, retry?) do
    # The functions have the caller's contents.
    Process.flag(:sensitive, true)
    Process.monitor(caller)
    state = %{functions: functions, caller: caller, run_id: :crypto.strong_rand_bytes(16)}
    loop(struct!(__MODULE__, Map.put(state, :memory, %Memory{kept?: retry?})))
  end

  @spec loop(t()) :: :ok
  defp loop(%__MODULE__{caller: caller, proxy: proxy, watch: watch, users: users} = state) do
    receive do
      {:fetch, {user, ref} = from, of_peer, name, digest}
      when is_pid(user) and is_reference(ref) ->
        serve(state, from, of_peer, &fetch(&1, from, name, digest))

      {:begin, {user, ref} = from, of_peer, name, call} when is_pid(user) and is_reference(ref) ->
        serve(state, from, of_peer, &begin(&1, from, name, call))

      {:answered, user, call, answer} when is_pid(user) ->
        {waiting, memory} = Memory.answer(state.memory, call, user, answer)
        for ref <- waiting, do: send(ref, {ref, {:answered, answer}})
        loop(%{state | memory: memory})

      {:attend, ref, next} when is_reference(ref) and is_pid(next) ->
        send(ref, {ref, if(state.bound?, do: :bound, else: :ok)})
        if watch, do: Process.demonitor(watch, [:flush])
        loop(%{state | proxy: next, watch: Process.monitor(next), peer: 0})

      :forget ->
        loop(%{state | memory: Memory.forget(state.memory)})

      {:close, ref} when is_reference(ref) ->
        close(state, ref)

      {:DOWN, monitor, :process, user, reason} when is_map_key(users, monitor) ->
        loop(ended(state, monitor, user, reason))

      # It has given its caller a reply after which a pool may try another peer.
      {:DOWN, ^watch, :process, ^proxy, :normal} ->
        loop(%{state | proxy: nil, watch: nil})

      {:DOWN, _monitor, :process, pid, _reason} when pid in [proxy, caller] ->
        end_all(state)

      other ->
        ServerGuard.drop(other, __MODULE__)
        loop(state)
    end
  end

  # For a tool call of the present peer, of the next one, or of an earlier one.
  defp serve(%__MODULE__{proxy: proxy, peer: present} = state, _from, {proxy, peer}, fun)
       when proxy != nil and peer >= present do
    # Their end may be in the mailbox behind many such messages.
    receive do
      {:close, ref} when is_reference(ref) -> close(state, ref)
    after
      0 ->
        if Process.alive?(proxy) and Process.alive?(state.caller),
          do: state |> go_on_to(peer) |> fun.() |> loop(),
          else: end_all(state)
    end
  end

  defp serve(state, {_user, ref}, _earlier_peer, _fun) do
    send(ref, {ref, :over})
    loop(state)
  end

  defp go_on_to(%__MODULE__{peer: peer} = state, peer), do: state

  defp go_on_to(state, peer) do
    {waiting, memory} = Memory.next_peer(state.memory)
    for ref <- waiting, do: send(ref, {ref, :over})
    %{state | peer: peer, memory: memory}
  end

  defp fetch(%__MODULE__{functions: functions} = state, {_user, ref} = from, name, digest) do
    case functions do
      %{^name => {function, repeat?}} ->
        as = if repeat?, do: :running, else: :claimed
        {what, memory} = Memory.ask(state.memory, digest, from, as)
        give(%{state | memory: memory}, from, function, {as, what})

      _others ->
        send(ref, {ref, {:unknown, functions |> Map.keys() |> Enum.sort()}})
        state
    end
  end

  defp give(state, _from, _function, {_as, :wait}), do: state

  defp give(state, {_user, ref}, _function, {_as, {:answered, _answer} = answered}) do
    send(ref, {ref, answered})
    state
  end

  defp give(state, {user, ref}, function, {as, {:new, call}}) do
    # Before it has the function: it may end at once.
    users = Map.put(state.users, Process.monitor(user), {user, call})

    if as == :running,
      do: send(ref, {ref, {:run, function, call, state.run_id}}),
      else: send(ref, {ref, {:claimed, call}})

    %{state | users: users}
  end

  defp begin(%__MODULE__{functions: functions} = state, {user, ref}, name, call) do
    case Memory.begin(state.memory, call, user) do
      {:ok, memory} ->
        {function, _repeat?} = Map.fetch!(functions, name)
        send(ref, {ref, {:run, function, call, state.run_id}})
        %{state | memory: Memory.forget(memory), bound?: true}

      :error ->
        send(ref, {ref, :over})
        state
    end
  end

  defp ended(state, monitor, user, reason) do
    {{^user, call}, users} = Map.pop!(state.users, monitor)

    case Memory.ended(state.memory, call, user) do
      {:ok, memory} ->
        %{state | users: users, memory: memory}

      {:unanswered, memory} ->
        explain(%{state | users: users, memory: memory}, call, user, reason)
    end
  end

  # It was killed, for example. The message may take user code, so another process makes it.
  defp explain(state, call, user, reason) do
    holder = self()

    {pid, monitor} =
      spawn_monitor(fn ->
        ServerGuard.run(fn ->
          answered(holder, call, Answer.error(0, Outcome.message(:exit, reason, [])))
        end)
      end)

    memory = Memory.replace(state.memory, call, user, pid)
    %{state | memory: memory, users: Map.put(state.users, monitor, {pid, call})}
  end

  defp close(state, ref) do
    end_all(state)
    send(ref, {ref, if(state.bound?, do: :bound, else: :ok)})
    :ok
  end

  # A function may trap exits.
  defp end_all(%__MODULE__{users: users}) do
    for {_monitor, {pid, _call}} <- users, do: Process.exit(pid, :kill)
    :ok
  end
end
