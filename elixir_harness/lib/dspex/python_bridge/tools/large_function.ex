defmodule DSPex.PythonBridge.Tools.LargeFunction do
  @moduledoc false
  # A function runs in a process that has a copy of all that it has captured. For most functions that costs nothing, so
  # each call has a process of its own (`DSPex.PythonBridge.Tools.Invocation`). A metric that has captured a data set of
  # 18 MB takes 50 ms to copy: here one process holds it, and its workers, which have a copy each, make one call after the
  # other.
  #
  # There are no more workers than pay off: a call that finds none idle waits for one as long as a copy takes, and then
  # gets a new one. So copying takes at most half of the time, and slow functions still run side by side.

  alias DSPex.PythonBridge.OTP.{Ask, ServerGuard}
  alias DSPex.PythonBridge.Tools.Functions

  # In words: to copy 64 KB takes as long as to start a process and send it a call.
  @small 8_192

  @enforce_keys [:function, :owner]
  defstruct [:function, :owner, copy_ms: 0, idle: [], checked_out: %{}, waiting: []]

  # idle: workers. checked_out: those at work, by the monitors of the processes that have them. waiting: processes that
  # need one, the first one first: there are as many as calls of the function at a time.
  @typep t :: %__MODULE__{
           function: function(),
           owner: pid(),
           copy_ms: non_neg_integer(),
           idle: [pid()],
           checked_out: %{reference() => pid()},
           waiting: [{pid(), reference()}]
         }

  @doc """
  The tools of a call, with small functions in the place of the large ones, which processes hold until they are closed or
  the owner ends.
  """
  @spec hold(tools, owner :: pid()) :: {tools, [pid()]}
        when tools: %{optional(term()) => function() | Functions.tool() | {function(), keyword()}}
  def hold(tools, owner) do
    {tools, pids} =
      Enum.map_reduce(tools, [], fn {name, tool}, pids ->
        function = with {function, _options} <- tool, do: function

        if :erts_debug.flat_size(function) > @small do
          pid = spawn(fn -> ServerGuard.run(fn -> init(function, owner) end) end)
          small = small(pid, function)
          {{name, if(is_tuple(tool), do: put_elem(tool, 0, small), else: small)}, [pid | pids]}
        else
          {{name, tool}, pids}
        end
      end)

    {Map.new(tools), pids}
  end

  defp small(pid, function) when is_function(function, 1), do: fn args -> call(pid, [args]) end
  defp small(pid, _function), do: fn args, key -> call(pid, [args, key]) end

  @doc "Ends the processes of functions, and all calls of these."
  @spec close([pid()]) :: :ok
  def close(pids), do: Enum.each(pids, &send(&1, :close))

  # The worker's end is the calling process's, as if that had run the function.
  defp call(pid, args) do
    with {:ok, {worker, checked_out}} <- Ask.ask(pid, :infinity, &{:checkout, self(), &1}),
         {:ok, outcome} <- run(worker, checked_out, args) do
      case outcome do
        {:returned, value} -> value
        {kind, reason, stacktrace} -> :erlang.raise(kind, reason, stacktrace)
      end
    else
      {:down, reason} -> exit(reason)
      :down -> exit(:noproc)
    end
  end

  defp run(worker, checked_out, args) do
    ref = Process.monitor(worker, alias: :reply_demonitor)
    send(worker, {:run, ref, checked_out, args, Process.get(:"$callers")})

    receive do
      {^ref, outcome} -> {:ok, outcome}
      {:DOWN, ^ref, :process, _worker, reason} -> {:down, reason}
    end
  end

  ## The process that holds the function

  defp init(function, owner) do
    # The function has the caller's contents.
    Process.flag(:sensitive, true)
    Process.monitor(owner)
    loop(%__MODULE__{function: function, owner: owner})
  end

  @spec loop(t()) :: :ok
  defp loop(%__MODULE__{owner: owner, waiting: waiting, checked_out: checked_out} = state) do
    receive do
      {:checkout, user, ref} when is_pid(user) and is_reference(ref) ->
        loop(serve(%{state | waiting: waiting ++ [{user, ref}]}))

      {:back, monitor, worker} when is_map_key(checked_out, monitor) ->
        Process.demonitor(monitor, [:flush])

        state = %{
          state
          | checked_out: Map.delete(checked_out, monitor),
            idle: [worker | state.idle]
        }

        loop(serve(state))

      # Its call is over.
      {:DOWN, monitor, :process, _user, _reason} when is_map_key(checked_out, monitor) ->
        {worker, checked_out} = Map.pop!(checked_out, monitor)
        Process.exit(worker, :kill)
        loop(%{state | checked_out: checked_out})

      {:DOWN, _monitor, :process, ^owner, _reason} ->
        end_all(state)

      :close ->
        end_all(state)

      # It was killed at that moment.
      {:back, _monitor, _worker} ->
        loop(state)

      other ->
        ServerGuard.drop(other, __MODULE__)
        loop(state)
    after
      if(waiting == [], do: :infinity, else: state.copy_ms) -> loop(serve(copy(state)))
    end
  end

  defp serve(%__MODULE__{idle: [worker | idle], waiting: [{user, ref} | waiting]} = state) do
    state = %{state | waiting: waiting}

    if Process.alive?(user),
      do: check_out(%{state | idle: idle}, worker, user, ref),
      else: serve(state)
  end

  defp serve(state), do: state

  defp check_out(state, worker, user, ref) do
    monitor = Process.monitor(user)
    send(ref, {ref, {worker, monitor}})
    %{state | checked_out: Map.put(state.checked_out, monitor, worker)}
  end

  defp copy(%__MODULE__{function: function} = state) do
    holder = self()
    {us, worker} = :timer.tc(fn -> spawn(fn -> work(function, holder) end) end)
    %{state | idle: [worker], copy_ms: div(us, 1_000)}
  end

  defp end_all(%__MODULE__{idle: idle, checked_out: checked_out}),
    do: Enum.each(idle ++ Map.values(checked_out), &Process.exit(&1, :kill))

  ## A worker

  defp work(function, holder) do
    Process.flag(:sensitive, true)
    run_next(function, holder)
  end

  defp run_next(function, holder) do
    receive do
      {:run, ref, checked_out, args, callers} ->
        if callers, do: Process.put(:"$callers", callers)
        send(ref, {ref, outcome(function, args)})

        if clean?() do
          send(holder, {:back, checked_out, self()})
          run_next(function, holder)
        end
    end
  end

  defp outcome(function, args) do
    {:returned, apply(function, args)}
  catch
    kind, reason -> {kind, reason, __STACKTRACE__}
  end

  # The next call must find nothing that this one has left. One that has left links ends here, as if it had had the
  # process for itself.
  defp clean? do
    :erlang.erase()
    Process.flag(:trap_exit, false)
    drop_messages()
    Process.info(self(), :links) == {:links, []}
  end

  defp drop_messages do
    receive do
      _message -> drop_messages()
    after
      0 -> :ok
    end
  end
end
