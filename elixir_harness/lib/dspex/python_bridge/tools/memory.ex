defmodule DSPex.PythonBridge.Tools.Memory do
  @moduledoc false
  # The tool calls of one run, and their answers: part of `DSPex.PythonBridge.Tools.Functions`.
  #
  # When a peer dies, the next one starts the run from the beginning. Its first call of a tool with certain arguments
  # is taken for the first such call of the peers before it, the second for the second, and so on: it gets the answer of
  # that one, or waits for it. Calls beyond these are new, and so are all of which no peer has made one like it.
  #
  # The answers are kept until the end of the run, or until it is certain that the run is not sent again.

  defstruct counts: %{}, calls: %{}, kept?: true

  @typedoc """
  `counts`: how many calls the present peer has made, by their digest. `kept?`: whether answers are kept.
  """
  @type t(answer) :: %__MODULE__{
          counts: %{digest() => pos_integer()},
          calls: %{call() => state(answer)},
          kept?: boolean()
        }
  @typedoc "The name of a tool and its arguments."
  @type digest :: binary()
  @typedoc "A call of a run, whichever peers make it."
  @type call :: {digest(), nth :: pos_integer()}
  # claimed: it has not begun. waiting: the aliases of those that wait for the answer.
  @typep state(answer) ::
           {:claimed, pid()}
           | {:running, pid(), waiting :: [reference()]}
           | {:answered, answer}

  @doc "Starts the counting for the next peer; returns the aliases that wait for answers of earlier ones."
  @spec next_peer(t(answer)) :: {[reference()], t(answer)} when answer: term()
  def next_peer(%__MODULE__{calls: calls} = memory) do
    waiting = for {_call, {:running, _user, waiting}} <- calls, ref <- waiting, do: ref
    calls = Map.new(calls, fn {call, state} -> {call, without_waiting(state)} end)
    {waiting, %{memory | counts: %{}, calls: calls}}
  end

  defp without_waiting({:running, user, _waiting}), do: {:running, user, []}
  defp without_waiting(state), do: state

  @doc """
  Notes a call of the present peer: one that is answered, one that runs, for whose answer `ref` then waits, or a new one,
  which is the user's to make: to begin first if it is `:claimed`.
  """
  @spec ask(t(answer), digest(), {pid(), reference()}, :running | :claimed) ::
          {{:answered, answer} | :wait | {:new, call()}, t(answer)}
        when answer: term()
  def ask(%__MODULE__{counts: counts, calls: calls} = memory, digest, {user, ref}, as) do
    nth = Map.get(counts, digest, 0) + 1
    call = {digest, nth}
    memory = %{memory | counts: Map.put(counts, digest, nth)}

    case calls do
      %{^call => {:answered, _answer} = answered} ->
        {answered, memory}

      %{^call => {:running, maker, waiting}} ->
        {:wait, put(memory, call, {:running, maker, [ref | waiting]})}

      # Whoever has claimed it for an earlier peer can no longer begin.
      _new ->
        state = if as == :running, do: {:running, user, []}, else: {:claimed, user}
        {{:new, call}, put(memory, call, state)}
    end
  end

  @doc "Notes that a claimed call begins; `:error` if it is no longer the user's."
  @spec begin(t(answer), call(), pid()) :: {:ok, t(answer)} | :error when answer: term()
  def begin(%__MODULE__{calls: calls} = memory, call, user) do
    case calls do
      %{^call => {:claimed, ^user}} -> {:ok, put(memory, call, {:running, user, []})}
      _another -> :error
    end
  end

  @doc "Notes the answer of a call; returns the aliases that wait for it."
  @spec answer(t(answer), call(), pid(), answer) :: {[reference()], t(answer)} when answer: term()
  def answer(%__MODULE__{calls: calls} = memory, call, user, answer) do
    case calls do
      %{^call => {:running, ^user, waiting}} when memory.kept? ->
        {waiting, put(memory, call, {:answered, answer})}

      %{^call => {:running, ^user, waiting}} ->
        {waiting, %{memory | calls: Map.delete(calls, call)}}

      _another ->
        {[], memory}
    end
  end

  @doc """
  Notes the end of a user. `:unanswered` if it has begun its call and has not answered it; then another process has to,
  with `replace/4`.
  """
  @spec ended(t(answer), call(), pid()) :: {:ok | :unanswered, t(answer)} when answer: term()
  def ended(%__MODULE__{calls: calls} = memory, call, user) do
    case calls do
      %{^call => {:claimed, ^user}} -> {:ok, %{memory | calls: Map.delete(calls, call)}}
      %{^call => {:running, ^user, _waiting}} -> {:unanswered, memory}
      _another -> {:ok, memory}
    end
  end

  @doc "Makes another process the one that answers a call."
  @spec replace(t(answer), call(), pid(), pid()) :: t(answer) when answer: term()
  def replace(%__MODULE__{calls: calls} = memory, call, user, by) do
    %{^call => {:running, ^user, waiting}} = calls
    put(memory, call, {:running, by, waiting})
  end

  @doc "Keeps no answers any longer: the run is not sent again."
  @spec forget(t(answer)) :: t(answer) when answer: term()
  def forget(%__MODULE__{calls: calls} = memory) do
    calls = Map.reject(calls, fn {_call, state} -> match?({:answered, _answer}, state) end)
    %{memory | kept?: false, calls: calls}
  end

  defp put(%__MODULE__{calls: calls} = memory, call, state),
    do: %{memory | calls: Map.put(calls, call, state)}
end
