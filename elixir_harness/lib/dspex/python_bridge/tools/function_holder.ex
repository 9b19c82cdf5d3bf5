defmodule DSPex.PythonBridge.Tools.FunctionHolder do
  @moduledoc false
  # The process that holds the caller's functions during a call with tools (`DSPex.PythonBridge.Tools.Functions`): one for
  # each such call, opened by the caller. Each `DSPex.PythonBridge.Client.StreamProxy` that makes the call attends it in
  # turn: a pool starts another one for each peer that it tries.
  #
  # It sends each process of a tool (`DSPex.PythonBridge.Tools.Invocation`) the one function that it runs. That copies
  # all that the function has captured, unless it is large (`DSPex.PythonBridge.Tools.LargeFunction`).
  #
  # If the run is sent again, tool calls that were made before are not made again (`DSPex.PythonBridge.Tools.Functions`):
  # those that still run go on, and their answers are kept. A function with `repeat: false` is given in two steps: between
  # them its process makes sure that the bridge does not send the run again. Nor does a pool afterwards, since no other
  # proxy may attend.
  #
  # It ends, and the tools with it, when it is closed at the end of the call, with the caller, and with a proxy that was
  # killed. It uses no links, which a function may remove, or survive by trapping exits.

  alias DSPex.PythonBridge.OTP.{Ask, ServerGuard}
  alias DSPex.PythonBridge.Tools.{Answer, Functions, LargeFunction}

  @enforce_keys [:functions, :caller]
  defstruct [:functions, :caller, :proxy, :watch]

  @typedoc "A peer: the proxy that attends, and the number of the peer, by which it counts them."
  @type source :: {holder :: pid(), proxy :: pid(), peer :: pos_integer()}
  # proxy, watch: the present proxy, nil between two of them, and its monitor.
  @typep t :: %__MODULE__{
           functions: Functions.t(),
           caller: pid(),
           proxy: pid() | nil,
           watch: reference() | nil
         }

  @doc """
  Starts it for the calling process, the caller, with the options of its call, of which it takes `:tools`, `:retry` and
  `:telemetry_metadata`; nil without functions. `pool`: its name, if it is a call to one.
  """
  @spec open(keyword(), pool :: term(), program_id :: String.t() | nil) :: pid() | nil
  def open(opts, pool, program_id) do
    case Keyword.get(opts, :tools, %{}) do
      none when none == %{} ->
        nil

      tools ->
        metadata = Keyword.get(opts, :telemetry_metadata, %{})
        about = %{pool: pool, program_id: program_id, telemetry_metadata: metadata}
        functions = {tools, about, Keyword.get(opts, :retry, true)}
        caller = self()
        spawn(fn -> ServerGuard.run(fn -> init(functions, caller) end) end)
    end
  end

  @doc """
  Makes the calling process its proxy, in the place of an earlier one: only tools of its peers get functions. `:bound` if
  the run must not be sent to another peer.
  """
  @spec attend(pid()) :: :ok | :bound
  def attend(holder) do
    proxy = self()
    # Without a holder the caller is gone, too.
    ask(holder, &{:attend, &1, proxy}, :ok)
  end

  @doc """
  What the calling process is to do with a tool call of a peer: `:run` a function; `:claimed`, with `begin/3` before it
  runs; the answer of an earlier peer's call; or nothing, since there is no such function, or the call is `:over`, or has
  gone on to another peer. It waits while the call of an earlier peer is running.
  """
  @spec fetch(source(), String.t(), Functions.digest()) ::
          {:run, function(), Functions.call(), Functions.run()}
          | {:claimed, Functions.call()}
          | {:answered, Answer.t(), Functions.run()}
          | {:unknown, [String.t()], Functions.run()}
          | :over
  def fetch({holder, proxy, peer}, name, digest),
    do: ask(holder, &{:fetch, {self(), &1}, {proxy, peer}, name, digest}, :over)

  @doc "Begins a claimed call: from then on the holder lets no other proxy attend."
  @spec begin(source(), String.t(), Functions.call()) ::
          {:run, function(), Functions.call(), Functions.run()} | :over
  def begin({holder, proxy, peer}, name, call),
    do: ask(holder, &{:begin, {self(), &1}, {proxy, peer}, name, call}, :over)

  @doc "Takes the answer of the call that the calling process has made."
  @spec answered(pid(), Functions.call(), Answer.t()) :: :ok
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
  def close(holder), do: ask(holder, &{:close, &1}, :ok)

  defp ask(holder, message, otherwise) do
    case Ask.ask(holder, :infinity, message) do
      {:ok, answer} -> answer
      :down -> otherwise
    end
  end

  ## The process

  defp init({tools, about, retry?}, caller) do
    # The functions have the caller's contents.
    Process.flag(:sensitive, true)
    Process.monitor(caller)
    {tools, _erases_when_this_ends} = LargeFunction.hold(tools, self())
    loop(%__MODULE__{functions: Functions.new(tools, about, retry?), caller: caller})
  end

  @spec loop(t()) :: :ok
  defp loop(%__MODULE__{functions: functions, caller: caller, proxy: proxy, watch: watch} = state) do
    receive do
      {:fetch, {user, ref} = from, peer, name, digest} when is_pid(user) and is_reference(ref) ->
        serve(state, from, peer, &Functions.fetch(&1, from, name, digest))

      {:begin, {user, ref} = from, peer, name, call} when is_pid(user) and is_reference(ref) ->
        serve(state, from, peer, &Functions.begin(&1, from, name, call))

      {:answered, user, call, answer} when is_pid(user) ->
        loop(%{state | functions: Functions.answer(functions, call, user, answer)})

      {:attend, ref, next} when is_reference(ref) and is_pid(next) ->
        if watch, do: Process.demonitor(watch, [:flush])

        # Before it has the answer: a proxy that has ended in order must not look like one that was killed.
        watch = Process.monitor(next)
        send(ref, {ref, bound(functions)})
        functions = Functions.next_proxy(functions)
        loop(%{state | functions: functions, proxy: next, watch: watch})

      :forget ->
        loop(%{state | functions: Functions.forget(functions)})

      {:close, ref} when is_reference(ref) ->
        close(functions, ref)

      {:DOWN, monitor, :process, _user, reason} when is_map_key(functions.users, monitor) ->
        loop(%{state | functions: Functions.ended(functions, monitor, reason)})

      # It has given its caller a reply after which a pool may try another peer.
      {:DOWN, ^watch, :process, ^proxy, :normal} ->
        loop(%{state | proxy: nil, watch: nil})

      {:DOWN, _monitor, :process, pid, _reason} when pid in [proxy, caller] ->
        Functions.end_all(functions)

      _stray ->
        loop(state)
    end
  end

  # For a tool call of the present peer, of the next one, or of an earlier one. There should be no next one once a function
  # has begun after which there must be none.
  defp serve(%__MODULE__{proxy: proxy, functions: functions} = state, _from, {proxy, peer}, fun)
       when proxy != nil and
              (peer == functions.peer or (peer > functions.peer and not functions.bound?)) do
    loop(%{state | functions: functions |> Functions.go_on_to(peer) |> fun.()})
  end

  defp serve(state, {_user, ref}, _earlier_peer, _fun) do
    send(ref, {ref, :over})
    loop(state)
  end

  defp close(functions, ref) do
    Functions.end_all(functions)
    send(ref, {ref, bound(functions)})
    :ok
  end

  defp bound(%Functions{bound?: bound?}), do: if(bound?, do: :bound, else: :ok)
end
