defmodule DSPex.PythonBridge.OTP.ServerGuard do
  @moduledoc """
  What each process here does about a crash, and about a message that is not for it.

  When a function raises, the runtime puts the arguments that no clause matched, the value that did not
  match, or the exception's message into the exit reason. From there they get into the log, the
  supervisor's reports and the messages of everyone who monitors the process. Here they are requests,
  replies and keys. `use DSPex.PythonBridge.OTP.ServerGuard` in a `GenServer` turns whatever its callbacks raise
  into an exit reason that names only the kind of error and the place in the code; `run/1` does so in a
  process without callbacks.
  """

  require Logger

  @callbacks [handle_call: 3, handle_cast: 2, handle_info: 2, handle_continue: 2]

  @typedoc "As the runtime has it, so that it is logged and shown as usual."
  @type reason :: {kind :: term(), Exception.stacktrace()}

  defmacro __using__(_opts), do: quote(do: @before_compile(unquote(__MODULE__)))

  defmacro __before_compile__(env) do
    callbacks = for {name, arity} <- @callbacks, defined?(env, name, arity), do: {name, arity}
    [Enum.map(callbacks, &stopping/1), if(defined?(env, :terminate, 2), do: ending())]
  end

  # By the module itself: what `use GenServer` defines is not to be built upon.
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

  @doc "Calls a function; if it raises, exits or throws, the calling process ends, with one line in the log."
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
  What was raised, thrown or exited with, without contents.

      iex> DSPex.PythonBridge.OTP.ServerGuard.strip({:badmatch, "secret"}, [{Mod, :fun, ["secret"], [line: 7]}])
      {{:badmatch, :redacted}, [{Mod, :fun, 1, [line: 7]}]}
      iex> DSPex.PythonBridge.OTP.ServerGuard.strip(%RuntimeError{message: "secret"}, [])
      {RuntimeError, []}
  """
  @spec strip(term(), Exception.stacktrace()) :: reason()
  def strip(reason, stacktrace), do: {kind(reason), Enum.map(stacktrace, &entry/1)}

  defp kind(reason) when is_atom(reason), do: reason
  defp kind(%module{}), do: module
  defp kind({tag, _contents}) when is_atom(tag), do: {tag, :redacted}
  defp kind(_contents), do: :redacted

  defp entry({module, function, args, where}), do: {module, function, arity(args), place(where)}
  defp entry({function, args, where}), do: {function, arity(args), place(where)}

  defp arity(args) when is_list(args), do: length(args)
  defp arity(arity), do: arity

  # More may be there: what explains the error, with the arguments in it.
  defp place(where), do: Keyword.take(where, [:file, :line])

  @doc """
  Drops a message that is not for the calling process. The first that a process gets is logged, without
  its contents. Someone who waits for an answer is given one: it may be meant for a process of another kind.
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

  defp refuse({:"$gen_call", {pid, _tag} = from, _question}) when is_pid(pid),
    do: GenServer.reply(from, {:error, :unknown_call})

  defp refuse(_message), do: :ok
end
