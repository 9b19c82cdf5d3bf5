defmodule DSPex.PythonBridge.Tools.FunctionHolder do
  @moduledoc false
  # The process that holds the caller's functions during a call with tools: one for each
  # `DSPex.PythonBridge.Client.StreamProxy` with tools.
  #
  # It sends each process of a tool (`DSPex.PythonBridge.Tools.Invocation`) the one function that it runs. That copies
  # all that the function has captured, which may take long: the proxy, which keeps the time of the call and ends its
  # tools, must not do it.
  #
  # If the proxy, or the caller, is killed and cannot end the tools, they are ended here. It uses no links, which a
  # function may remove, or survive by trapping exits.

  alias DSPex.PythonBridge.Tools
  alias DSPex.PythonBridge.OTP.{Ask, ServerGuard}

  @enforce_keys [:functions, :caller, :proxy]
  defstruct [:functions, :caller, :proxy, users: %{}]

  # users: the processes that have a function, by their monitors.
  @typep t :: %__MODULE__{
           functions: Tools.Runner.functions(),
           caller: pid(),
           proxy: pid(),
           users: %{reference() => pid()}
         }

  @doc "Starts it for the calling process, the caller."
  @spec open(Tools.Runner.functions()) :: pid()
  def open(functions) do
    caller = self()
    spawn(fn -> ServerGuard.run(fn -> init(functions, caller) end) end)
  end

  @doc "Makes the calling process its proxy, without which it sends no function."
  @spec attend(pid()) :: :ok
  def attend(holder) do
    send(holder, {:proxy, self()})
    :ok
  end

  @doc """
  The function of a name, for the calling process to run; or the names that there are; or `:over` if the call is.
  """
  @spec fetch(pid(), String.t()) :: {:ok, (map() -> term())} | {:error, [String.t()]} | :over
  def fetch(holder, name) do
    user = self()

    case Ask.ask(holder, :infinity, &{:fetch, user, &1, name}) do
      {:ok, answer} -> answer
      :down -> :over
    end
  end

  @doc "Ends it. The proxy ends the tools."
  @spec close(pid()) :: :ok
  def close(holder) do
    Process.exit(holder, :kill)
    :ok
  end

  ## The process

  defp init(functions, caller) do
    # The functions have the caller's contents.
    Process.flag(:sensitive, true)
    monitor = Process.monitor(caller)

    receive do
      {:proxy, proxy} when is_pid(proxy) ->
        Process.monitor(proxy)
        loop(%__MODULE__{functions: functions, caller: caller, proxy: proxy})

      {:DOWN, ^monitor, :process, _caller, _reason} ->
        :ok
    end
  end

  @spec loop(t()) :: :ok
  defp loop(%__MODULE__{users: users} = state) do
    receive do
      {:fetch, user, ref, name} when is_pid(user) and is_reference(ref) ->
        # Their end may be in the mailbox behind many such messages.
        if Process.alive?(state.proxy) and Process.alive?(state.caller),
          do: loop(give(state, user, ref, name)),
          else: end_all(users)

      {:DOWN, monitor, :process, _user, _reason} when is_map_key(users, monitor) ->
        loop(%{state | users: Map.delete(users, monitor)})

      {:DOWN, _monitor, :process, pid, _reason} when pid in [state.proxy, state.caller] ->
        end_all(users)

      other ->
        ServerGuard.drop(other, __MODULE__)
        loop(state)
    end
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
