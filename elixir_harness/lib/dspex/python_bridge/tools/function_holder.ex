defmodule DSPex.PythonBridge.Tools.FunctionHolder do
  @moduledoc false
  # The process that holds the caller's functions during a call with tools: one for each such call, opened by the
  # caller. Each `DSPex.PythonBridge.Client.StreamProxy` that makes the call attends it in turn: a pool starts another one
  # for each peer that it tries.
  #
  # It sends each process of a tool (`DSPex.PythonBridge.Tools.Invocation`) the one function that it runs. That copies
  # all that the function has captured, which may take long: the proxy, which keeps the time of the call, must not do it.
  #
  # It ends, and the tools with it, when it is closed at the end of the call, with the caller, and with a proxy that was
  # killed. It uses no links, which a function may remove, or survive by trapping exits.

  alias DSPex.PythonBridge.Tools
  alias DSPex.PythonBridge.OTP.{Ask, ServerGuard}

  @enforce_keys [:functions, :caller]
  defstruct [:functions, :caller, :proxy, :watch, users: %{}]

  # proxy, watch: the present proxy, nil between two of them, and its monitor. users: the processes that have a
  # function, by their monitors.
  @typep t :: %__MODULE__{
           functions: Tools.Runner.functions(),
           caller: pid(),
           proxy: pid() | nil,
           watch: reference() | nil,
           users: %{reference() => pid()}
         }

  @doc "Starts it for the calling process, the caller; nil without functions."
  @spec open(Tools.Runner.functions()) :: pid() | nil
  def open(functions) when functions == %{}, do: nil

  def open(functions) do
    caller = self()
    spawn(fn -> ServerGuard.run(fn -> init(functions, caller) end) end)
  end

  @doc "Makes the calling process its proxy, in the place of an earlier one: it sends functions to its tools only."
  @spec attend(pid()) :: :ok
  def attend(holder) do
    send(holder, {:proxy, self()})
    :ok
  end

  @doc """
  The function of a name, for the calling process to run for a proxy; or the names that there are; or `:over` if the
  call is, or has gone on to another proxy.
  """
  @spec fetch(pid(), pid(), String.t()) ::
          {:ok, (map() -> term())} | {:error, [String.t()]} | :over
  def fetch(holder, proxy, name) do
    user = self()

    case Ask.ask(holder, :infinity, &{:fetch, user, &1, proxy, name}) do
      {:ok, answer} -> answer
      :down -> :over
    end
  end

  @doc "Ends it, and the tools before this returns. It may have ended already."
  @spec close(pid() | nil) :: :ok
  def close(nil), do: :ok

  def close(holder) do
    Ask.ask(holder, :infinity, &{:close, &1})
    :ok
  end

  ## The process

  defp init(functions, caller) do
    # The functions have the caller's contents.
    Process.flag(:sensitive, true)
    Process.monitor(caller)
    loop(%__MODULE__{functions: functions, caller: caller})
  end

  @spec loop(t()) :: :ok
  defp loop(%__MODULE__{caller: caller, proxy: proxy, watch: watch, users: users} = state) do
    receive do
      {:fetch, user, ref, for_proxy, name} when is_pid(user) and is_reference(ref) ->
        fetch_came(state, user, ref, for_proxy, name)

      {:proxy, next} when is_pid(next) ->
        if watch, do: Process.demonitor(watch, [:flush])
        # The run starts from the beginning.
        end_all(users)
        loop(%{state | proxy: next, watch: Process.monitor(next), users: %{}})

      {:close, ref} when is_reference(ref) ->
        end_all(users)
        send(ref, {ref, :closed})
        :ok

      {:DOWN, monitor, :process, _user, _reason} when is_map_key(users, monitor) ->
        loop(%{state | users: Map.delete(users, monitor)})

      # It has given its caller a reply after which a pool may try another peer.
      {:DOWN, ^watch, :process, ^proxy, :normal} ->
        loop(%{state | proxy: nil, watch: nil})

      {:DOWN, _monitor, :process, pid, _reason} when pid in [proxy, caller] ->
        end_all(users)

      # Of a user of an earlier proxy.
      {:DOWN, _monitor, :process, _pid, _reason} ->
        loop(state)

      other ->
        ServerGuard.drop(other, __MODULE__)
        loop(state)
    end
  end

  defp fetch_came(%__MODULE__{proxy: proxy} = state, user, ref, proxy, name) when proxy != nil do
    # Their end may be in the mailbox behind many such messages.
    if Process.alive?(proxy) and Process.alive?(state.caller),
      do: loop(give(state, user, ref, name)),
      else: end_all(state.users)
  end

  defp fetch_came(state, _user, ref, _earlier_proxy, _name) do
    send(ref, {ref, :over})
    loop(state)
  end

  defp give(%__MODULE__{functions: functions} = state, user, ref, name) do
    # Before it has the function: it may end at once.
    users = Map.put(state.users, Process.monitor(user), user)

    case functions do
      %{^name => function} -> send(ref, {ref, {:ok, function}})
      _others -> send(ref, {ref, {:error, functions |> Map.keys() |> Enum.sort()}})
    end

    %{state | users: users}
  end

  # A function may trap exits.
  defp end_all(users) do
    for {_monitor, pid} <- users, do: Process.exit(pid, :kill)
    :ok
  end
end
