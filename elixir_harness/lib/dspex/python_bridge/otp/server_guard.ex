defmodule DSPex.PythonBridge.OTP.ServerGuard do
  @moduledoc false
  # What each process here does about a crash, and about a message that is not for it.
  #
  # When a function raises, the runtime puts the arguments that no clause matched, the value that did not match, or the
  # exception's message into the exit reason. From there they get into the log, the supervisor's reports and to all who
  # monitor the process. Here they are requests, replies and keys. `use DSPex.PythonBridge.OTP.ServerGuard` in a
  # `GenServer` turns what its callbacks raise into an exit reason that has only the kind of error and the place in the
  # code; `run/1` does so in a process without callbacks. A `GenServer` that has no calls, or no casts, gets them in
  # its `handle_info/2`, whose last clause drops them.

  require Logger

  @callbacks [handle_call: 3, handle_cast: 2, handle_info: 2, handle_continue: 2]

  @typedoc "In the runtime's form, so that it is logged as usual."
  @type reason :: {kind :: term(), Exception.stacktrace()}

  defmacro __using__(_opts) do
    quote do
      @before_compile unquote(__MODULE__)

      @impl GenServer
      def handle_call(question, from, state),
        do: handle_info({:"$gen_call", from, question}, state)

      @impl GenServer
      def handle_cast(message, state), do: handle_info({:"$gen_cast", message}, state)

      defoverridable handle_call: 3, handle_cast: 2
    end
  end

  defmacro __before_compile__(env) do
    callbacks = for {name, arity} <- @callbacks, defined?(env, name, arity), do: {name, arity}
    [Enum.map(callbacks, &stopping/1), if(defined?(env, :terminate, 2), do: ending())]
  end

  # By the module itself, not by `use GenServer`.
  defp defined?(env, name, arity) do
    case Module.get_definition(env.module, {name, arity}) do
      {:v1, :def, meta, _clauses} -> meta[:context] != GenServer
      nil -> false
    end
  end

  defp stopping({name, arity}) do
    args = Macro.generate_arguments(arity, __MODULE__)

    quote do
      defoverridable [{unquote(name), unquote(arity)}]

      @impl GenServer
      def unquote(name)(unquote_splicing(args)) do
        super(unquote_splicing(args))
      catch
        _kind, reason ->
          {:stop, unquote(__MODULE__).strip(reason, __STACKTRACE__), unquote(List.last(args))}
      end
    end
  end

  defp ending do
    quote do
      defoverridable terminate: 2

      @impl GenServer
      def terminate(reason, state) do
        super(reason, state)
      catch
        _kind, reason -> exit(unquote(__MODULE__).strip(reason, __STACKTRACE__))
      end
    end
  end

  @doc "Calls a function; if it raises, exits or throws, the calling process ends with one line in the log."
  @spec run((-> result)) :: result when result: term()
  def run(function) do
    function.()
  catch
    _kind, reason ->
      reason = strip(reason, __STACKTRACE__)
      Logger.error("a process of a Python bridge ended: #{Exception.format_exit(reason)}")
      exit(reason)
  end

  @doc """
  The reason of an exception, throw or exit, without contents.

      iex> DSPex.PythonBridge.OTP.ServerGuard.strip({:badmatch, "secret"}, [{Mod, :fun, ["secret"], [line: 7]}])
      {{:badmatch, :redacted}, [{Mod, :fun, 1, [line: 7]}]}
      iex> DSPex.PythonBridge.OTP.ServerGuard.strip(%RuntimeError{message: "secret"}, [])
      {RuntimeError, []}
  """
  @spec strip(term(), Exception.stacktrace()) :: reason()
  def strip(reason, stacktrace), do: {kind(reason), stacktrace(stacktrace)}

  @doc "A stack trace without the arguments of calls."
  @spec stacktrace(Exception.stacktrace()) :: Exception.stacktrace()
  def stacktrace(stacktrace), do: Enum.map(stacktrace, &entry/1)

  defp kind(reason) when is_atom(reason), do: reason
  defp kind(%module{}), do: module
  defp kind({tag, _contents}) when is_atom(tag), do: {tag, :redacted}
  defp kind(_contents), do: :redacted

  defp entry({module, function, args, where}), do: {module, function, arity(args), place(where)}
  defp entry({function, args, where}), do: {function, arity(args), place(where)}

  defp arity(args) when is_list(args), do: length(args)
  defp arity(arity), do: arity

  # Other entries explain the error, with the arguments in them.
  defp place(where), do: Keyword.take(where, [:file, :line])

  @doc """
  Drops a message that is not for the calling process. The first one is logged, without its contents. A caller that
  waits for an answer gets one: the message may be meant for a process of another kind.
  """
  @spec drop(term(), module()) :: :ok
  def drop(message, module) do
    if Process.put({__MODULE__, :dropped?}, true) == nil do
      text = "dropped a message that is not for it; later ones are not logged"
      Logger.warning("#{inspect(module)} #{inspect(self())}: #{text}")
    end

    refuse(message)
    :ok
  end

  # DSPex.PythonBridge.Client.Caller waits for it.
  defp refuse({:request, %{ref: ref}}) when is_reference(ref),
    do: send(ref, {ref, {:error, :bridge_not_running}})

  # The same from another node: see DSPex.PythonBridge.Calls.NodeMessage.
  defp refuse(request)
       when elem(request, 0) == :request and tuple_size(request) in 6..7 and
              is_reference(elem(request, 1)),
       do: send(elem(request, 1), {elem(request, 1), {:error, :bridge_not_running}})

  defp refuse({:"$gen_call", {pid, _tag} = from, _question}) when is_pid(pid),
    do: GenServer.reply(from, {:error, :unknown_call})

  defp refuse(_message), do: :ok
end
