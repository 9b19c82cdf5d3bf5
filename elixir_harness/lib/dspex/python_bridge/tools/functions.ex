defmodule DSPex.PythonBridge.Tools.Functions do
  @moduledoc false
  # The caller's functions in a call with tools, and the tool calls that the peers of the call have made: the state of
  # `DSPex.PythonBridge.Tools.FunctionHolder`, whose process gets and sends the messages.
  #
  # When a peer dies, the next one starts the run from the beginning. Its first call of a tool with certain arguments
  # is taken for the first such call of the peers before it, the second for the second, and so on: it gets the answer of
  # that one, or waits for it. Calls beyond these are new, and so are all of which no peer has made one like it.
  #
  # The answers are kept until the end of the run, or until it is certain that the run is not sent again.

  alias DSPex.PythonBridge.Tools.{Answer, Outcome, Span}

  @enforce_keys [:tools, :run, :kept?]
  defstruct [:tools, :run, :kept?, peer: 0, counts: %{}, calls: %{}, users: %{}, bound?: false]

  @typedoc """
  `kept?`: whether answers are kept. `peer`: the present one, as the present proxy counts them. `counts`: how many calls
  it has made, by their digest. `users`: the processes that have a function, by their monitors. `bound?`: whether a
  function has begun after which the run is not sent again.
  """
  @type t :: %__MODULE__{
          tools: tools(),
          run: run(),
          kept?: boolean(),
          peer: non_neg_integer(),
          counts: %{digest() => pos_integer()},
          calls: %{call() => state()},
          users: %{reference() => {pid(), call()}},
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
  @typedoc "The name of a tool and its arguments."
  @type digest :: binary()
  @typedoc "A call of a run, whichever peers make it."
  @type call :: {digest(), nth :: pos_integer()}
  # claimed: it has not begun. waiting: the aliases of those that wait for the answer.
  @typep state ::
           {:claimed, pid()}
           | {:running, pid(), waiting :: [reference()]}
           | {:answered, Answer.t()}

  @doc "The functions of a call; `kept?`: whether answers are kept, since the run may be sent again."
  @spec new(tools(), Span.about(), boolean()) :: t()
  def new(tools, about, kept?) do
    run = {:crypto.strong_rand_bytes(16), about}
    %__MODULE__{tools: tools, run: run, kept?: kept?}
  end

  @doc "Another proxy attends: it counts its peers from the beginning."
  @spec next_proxy(t()) :: t()
  def next_proxy(%__MODULE__{} = functions), do: %{functions | peer: 0}

  @doc "The present peer is this one: those that wait for an answer for another one need it no longer."
  @spec go_on_to(t(), pos_integer()) :: t()
  def go_on_to(%__MODULE__{peer: peer} = functions, peer), do: functions

  def go_on_to(%__MODULE__{} = functions, peer) do
    calls =
      Map.new(functions.calls, fn
        {call, {:running, user, waiting}} ->
          for ref <- waiting, do: send(ref, {ref, :over})
          {call, {:running, user, []}}

        other ->
          other
      end)

    %{functions | peer: peer, counts: %{}, calls: calls}
  end

  @doc "Answers what a process is to do with a tool call, now or when the like call of an earlier peer has ended."
  @spec fetch(t(), from(), String.t(), digest()) :: t()
  def fetch(%__MODULE__{tools: tools} = functions, {_user, ref} = from, name, digest) do
    case tools do
      %{^name => tool} ->
        nth = Map.get(functions.counts, digest, 0) + 1
        functions = %{functions | counts: Map.put(functions.counts, digest, nth)}
        give(functions, from, tool, {digest, nth})

      _others ->
        send(ref, {ref, {:unknown, tools |> Map.keys() |> Enum.sort(), functions.run}})
        functions
    end
  end

  defp give(%__MODULE__{calls: calls} = functions, {user, ref}, {function, repeat?}, call) do
    case calls do
      %{^call => {:answered, answer}} ->
        send(ref, {ref, {:answered, answer, functions.run}})
        functions

      %{^call => {:running, maker, waiting}} ->
        put(functions, call, {:running, maker, [ref | waiting]})

      # Whoever has claimed it for an earlier peer can no longer begin.
      _new ->
        # Before it has the function: it may end at once.
        users = Map.put(functions.users, Process.monitor(user), {user, call})

        if repeat?,
          do: send(ref, {ref, {:run, function, call, functions.run}}),
          else: send(ref, {ref, {:claimed, call}})

        state = if repeat?, do: {:running, user, []}, else: {:claimed, user}
        put(%{functions | users: users}, call, state)
    end
  end

  @doc "Gives a process the function of a call that it has claimed. From then on the run is not sent again."
  @spec begin(t(), from(), String.t(), call()) :: t()
  def begin(%__MODULE__{calls: calls} = functions, {user, ref}, name, call) do
    case calls do
      %{^call => {:claimed, ^user}} ->
        {function, _repeat?} = Map.fetch!(functions.tools, name)
        send(ref, {ref, {:run, function, call, functions.run}})
        %{forget(put(functions, call, {:running, user, []})) | bound?: true}

      _another ->
        send(ref, {ref, :over})
        functions
    end
  end

  @doc "Takes an answer, for those that wait for it and for later peers."
  @spec answer(t(), call(), pid(), Answer.t()) :: t()
  def answer(%__MODULE__{calls: calls} = functions, call, user, answer) do
    case calls do
      %{^call => {:running, ^user, waiting}} ->
        for ref <- waiting, do: send(ref, {ref, {:answered, answer, functions.run}})

        if functions.kept?,
          do: put(functions, call, {:answered, answer}),
          else: %{functions | calls: Map.delete(calls, call)}

      _another ->
        functions
    end
  end

  defp put(functions, call, state),
    do: %{functions | calls: Map.put(functions.calls, call, state)}

  @doc "Keeps no answers any longer: the run is not sent again."
  @spec forget(t()) :: t()
  def forget(%__MODULE__{calls: calls} = functions) do
    calls = Map.reject(calls, fn {_call, state} -> match?({:answered, _answer}, state) end)
    %{functions | kept?: false, calls: calls}
  end

  @doc "Notes the end of a user. If it was killed, for example, and has given no answer, that is an error."
  @spec ended(t(), reference(), reason :: term()) :: t()
  def ended(%__MODULE__{} = functions, monitor, reason) do
    {{user, call}, users} = Map.pop!(functions.users, monitor)
    answer(%{functions | users: users}, call, user, Answer.error(0, Outcome.ended(reason)))
  end

  @doc "Ends all users. A function may trap exits."
  @spec end_all(t()) :: :ok
  def end_all(%__MODULE__{users: users}) do
    for {_monitor, {pid, _call}} <- users, do: Process.exit(pid, :kill)
    :ok
  end
end
