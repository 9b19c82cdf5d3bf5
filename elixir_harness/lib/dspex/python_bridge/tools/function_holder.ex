defmodule DSPex.PythonBridge.Tools.FunctionHolder do
  @moduledoc """
  The process that holds the caller's functions while a call with tools is under way: one beside each such
  `DSPex.PythonBridge.Client.StreamProxy`.

  It hands each process of a tool (`DSPex.PythonBridge.Tools.Invocation`) the one function that it is to run. That
  is a copy, of all that the function has taken along, and may take long: the proxy, which keeps the time
  of the call and ends its tools, must not be at it.

  Who has been given a function is ended here if the proxy, or the caller, comes to an end that leaves the
  proxy no time to do so. Nothing depends on links, which a function may cut or survive.
  """

  alias DSPex.PythonBridge.Tools
  alias DSPex.PythonBridge.OTP.ServerGuard

  @enforce_keys [:functions, :caller, :proxy]
  defstruct [:functions, :caller, :proxy, users: %{}]

  # users: the processes that have been given a function, by their monitors.
  @typep t :: %__MODULE__{
           functions: Tools.Runner.functions(),
           caller: pid(),
           proxy: pid(),
           users: %{reference() => pid()}
         }

  @doc "Starts it for the calling process, whose functions they are."
  @spec open(Tools.Runner.functions()) :: pid()
  def open(functions) do
    caller = self()
    spawn(fn -> ServerGuard.run(fn -> init(functions, caller) end) end)
  end

  @doc "The calling process is the proxy. Without one, it gives nothing to anybody."
  @spec attend(pid()) :: :ok
  def attend(holder) do
    send(holder, {:proxy, self()})
    :ok
  end

  @doc """
  The function of this name, for the calling process to run; or the names that there are; or `:over`, when
  the call is.
  """
  @spec fetch(pid(), String.t()) :: {:ok, (map() -> term())} | {:error, [String.t()]} | :over
  def fetch(holder, name) do
    ref = :erlang.monitor(:process, holder, alias: :reply_demonitor)
    send(holder, {:fetch, self(), ref, name})

    receive do
      {^ref, answer} -> answer
      {:DOWN, ^ref, :process, _holder, _reason} -> :over
    end
  end

  @doc "It is needed no more; the users are the proxy's to end."
  @spec close(pid()) :: :ok
  def close(holder) do
    Process.exit(holder, :kill)
    :ok
  end

  ## The process

  defp init(functions, caller) do
    # What they hold is the caller's contents.
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
        # Their end may be in the queue behind many such requests.
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
    # Before it has the function: it may be gone at once.
    users = Map.put(state.users, Process.monitor(user), user)

    case functions do
      %{^name => function} -> send(ref, {ref, {:ok, function}})
      _others -> send(ref, {ref, {:error, functions |> Map.keys() |> Enum.sort()}})
    end

    %{state | users: users}
  end

  # Nothing less would end a function that traps exits.
  defp end_all(users) do
    for {_monitor, pid} <- users, do: Process.exit(pid, :kill)
    :ok
  end
end
