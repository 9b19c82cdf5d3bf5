defmodule DSPex.PythonBridge.Tools.Functions do
  @moduledoc false
  # The caller's functions in a call with tools, and what the peers of the call have done with them: the state of
  # `DSPex.PythonBridge.Tools.FunctionHolder`, whose process gets and sends the messages.

  alias DSPex.PythonBridge.OTP.ServerGuard
  alias DSPex.PythonBridge.Tools.{Answer, Memory, Outcome, Span}

  @enforce_keys [:tools, :run, :memory]
  defstruct [:tools, :run, :memory, peer: 0, users: %{}, bound?: false]

  @typedoc """
  `peer`: the present one, as the present proxy counts them. `users`: the processes that have a function, or answer in
  the place of one that had, by their monitors. `bound?`: whether a function has begun after which the run is not sent
  again.
  """
  @type t :: %__MODULE__{
          tools: tools(),
          run: run(),
          memory: Memory.t(Answer.t()),
          peer: non_neg_integer(),
          users: %{reference() => {pid(), Memory.call()}},
          bound?: boolean()
        }
  @type tools :: %{String.t() => tool()}
  @typedoc "A function, and whether a call of it may be made again."
  @type tool ::
          {function :: (map() -> term()) | (map(), String.t() -> term()), repeat? :: boolean()}
  @typedoc "The whole call: an id that no other one has, and what its events have."
  @type run :: {id :: binary(), Span.about()}
  @typedoc "A process that asks, and the alias for its answer."
  @type from :: {pid(), reference()}

  @doc "The functions of a call; `kept?`: whether answers are kept, since the run may be sent again."
  @spec new(tools(), Span.about(), boolean()) :: t()
  def new(tools, about, kept?) do
    run = {:crypto.strong_rand_bytes(16), about}
    %__MODULE__{tools: tools, run: run, memory: %Memory{kept?: kept?}}
  end

  @doc "Another proxy attends: it counts its peers from the beginning."
  @spec next_proxy(t()) :: t()
  def next_proxy(%__MODULE__{} = functions), do: %{functions | peer: 0}

  @doc "The present peer is this one: those that wait for an answer for another one need it no longer."
  @spec go_on_to(t(), pos_integer()) :: t()
  def go_on_to(%__MODULE__{peer: peer} = functions, peer), do: functions

  def go_on_to(%__MODULE__{} = functions, peer) do
    {waiting, memory} = Memory.next_peer(functions.memory)
    for ref <- waiting, do: send(ref, {ref, :over})
    %{functions | peer: peer, memory: memory}
  end

  @doc "Answers what a process is to do with a tool call, now or when the like call of an earlier peer has ended."
  @spec fetch(t(), from(), String.t(), Memory.digest()) :: t()
  def fetch(%__MODULE__{tools: tools} = functions, {_user, ref} = from, name, digest) do
    case tools do
      %{^name => {function, repeat?}} ->
        as = if repeat?, do: :running, else: :claimed
        {what, memory} = Memory.ask(functions.memory, digest, from, as)
        give(%{functions | memory: memory}, from, {as, function}, what)

      _others ->
        send(ref, {ref, {:unknown, tools |> Map.keys() |> Enum.sort(), functions.run}})
        functions
    end
  end

  defp give(functions, _from, _tool, :wait), do: functions

  defp give(functions, {_user, ref}, _tool, {:answered, answer}) do
    send(ref, {ref, {:answered, answer, functions.run}})
    functions
  end

  defp give(functions, {user, ref}, {as, function}, {:new, call}) do
    # Before it has the function: it may end at once.
    users = Map.put(functions.users, Process.monitor(user), {user, call})

    if as == :running,
      do: send(ref, {ref, {:run, function, call, functions.run}}),
      else: send(ref, {ref, {:claimed, call}})

    %{functions | users: users}
  end

  @doc "Gives a process the function of a call that it has claimed. From then on the run is not sent again."
  @spec begin(t(), from(), String.t(), Memory.call()) :: t()
  def begin(%__MODULE__{} = functions, {user, ref}, name, call) do
    case Memory.begin(functions.memory, call, user) do
      {:ok, memory} ->
        {function, _repeat?} = Map.fetch!(functions.tools, name)
        send(ref, {ref, {:run, function, call, functions.run}})
        %{functions | memory: Memory.forget(memory), bound?: true}

      :error ->
        send(ref, {ref, :over})
        functions
    end
  end

  @doc "Takes an answer, for those that wait for it and for later peers."
  @spec answer(t(), Memory.call(), pid(), Answer.t()) :: t()
  def answer(%__MODULE__{} = functions, call, user, answer) do
    {waiting, memory} = Memory.answer(functions.memory, call, user, answer)
    for ref <- waiting, do: send(ref, {ref, {:answered, answer, functions.run}})
    %{functions | memory: memory}
  end

  @doc "Keeps no answers any longer."
  @spec forget(t()) :: t()
  def forget(%__MODULE__{} = functions),
    do: %{functions | memory: Memory.forget(functions.memory)}

  @doc """
  Notes the end of a user. If it was killed, for example, and has given no answer, another process sends the calling one
  `{:answered, pid, call, answer}`: the message may take user code.
  """
  @spec ended(t(), reference(), reason :: term()) :: t()
  def ended(%__MODULE__{} = functions, monitor, reason) do
    {{user, call}, users} = Map.pop!(functions.users, monitor)

    case Memory.ended(functions.memory, call, user) do
      {:ok, memory} ->
        %{functions | users: users, memory: memory}

      {:unanswered, memory} ->
        holder = self()
        {pid, monitor} = spawn_monitor(fn -> explain(holder, call, reason) end)
        users = Map.put(users, monitor, {pid, call})
        %{functions | users: users, memory: Memory.replace(memory, call, user, pid)}
    end
  end

  defp explain(holder, call, reason) do
    ServerGuard.run(fn ->
      answer = Answer.error(0, Outcome.message(:exit, reason, []))
      send(holder, {:answered, self(), call, answer})
    end)
  end

  @doc "Ends all users. A function may trap exits."
  @spec end_all(t()) :: :ok
  def end_all(%__MODULE__{users: users}) do
    for {_monitor, {pid, _call}} <- users, do: Process.exit(pid, :kill)
    :ok
  end
end
