defmodule DSPex.PythonBridge.Durable.Store do
  @moduledoc """
  Where `DSPex.PythonBridge.Durable` keeps its runs: a behaviour, with `DSPex.PythonBridge.Durable.FileStore` and, for tests,
  `DSPex.PythonBridge.Durable.MemoryStore`. docs/guide/durable.md has one for a table of PostgreSQL.

  A store is `{module, term}`, or a module; its functions get the term, nil for a module alone. A run is a list of records, which
  are binaries, under an id that your application has chosen. Records have inputs, answers of LMs and results of tools in
  clear.

  Functions that raise, exit or throw count as `{:error, reason}`. One that has not returned within the lease ends the run.
  """

  alias DSPex.PythonBridge.Telemetry.Metadata
  alias DSPex.PythonBridge.Tools.Answer

  @type t :: module() | {module(), term()}
  @type id :: String.t()
  @typedoc "A string that no other claim has."
  @type owner :: String.t()

  @doc """
  Gives the run to an owner for `lease` ms, or extends that of the same owner. Of several at once one succeeds; the others get
  `{:error, :claimed}`, and so do all until the lease is over. A new owner has no summary from the one before.
  """
  @callback claim(term(), id(), owner(), lease :: pos_integer()) ::
              :ok | {:error, :claimed | term()}

  @doc """
  Adds a record, for the owner alone (`{:error, :claimed}`). It must survive the end of the machine once this returns `:ok`.
  """
  @callback append(term(), id(), owner(), record :: binary()) :: :ok | {:error, term()}

  @doc "The records, the oldest first; none for a run that is not there."
  @callback read(term(), id()) :: {:ok, [binary()]} | {:error, term()}

  @doc "Keeps a summary of the run, and ends the owner's claim."
  @callback finish(term(), id(), owner(), summary :: binary()) :: :ok | {:error, term()}

  @doc "All runs, whether one is claimed now, and its summary, if its last owner has left one."
  @callback list(term()) ::
              {:ok, [{id(), claimed? :: boolean(), summary :: binary() | nil}]} | {:error, term()}

  @doc "Erases a run."
  @callback delete(term(), id()) :: :ok | {:error, term()}

  @doc false
  # Calls one of these functions in a process of its own, so that the caller goes on whatever it does: its result as specified, or
  # an error with a text.
  @spec call(t(), atom(), [term()], timeout :: pos_integer()) ::
          :ok | {:ok, list()} | {:error, :claimed | String.t()}
  def call(store, function, args, timeout) do
    {module, term} = if is_tuple(store), do: store, else: {store, nil}
    # By these the Ecto sandbox finds the test process.
    callers = [self() | Process.get(:"$callers", [])]

    {pid, monitor} =
      spawn_monitor(fn ->
        Process.put(:"$callers", callers)
        exit({__MODULE__, result(module, function, [term | args])})
      end)

    receive do
      {:DOWN, ^monitor, _, _, {__MODULE__, {:error, reason}}} when reason != :claimed ->
        {:error, "the store's #{function} #{reason}"}

      {:DOWN, ^monitor, _, _, {__MODULE__, result}} ->
        result

      {:DOWN, ^monitor, _, _, _killed} ->
        {:error, "the store's #{function} was killed"}
    after
      timeout ->
        Process.exit(pid, :kill)
        Process.demonitor(monitor, [:flush])
        {:error, "the store's #{function} did not return within #{timeout} ms"}
    end
  end

  defp result(module, function, args) do
    case apply(module, function, args) do
      :ok -> :ok
      {:ok, list} when is_list(list) -> {:ok, list}
      {:error, :claimed} -> {:error, :claimed}
      {:error, reason} -> {:error, "failed: #{shown(reason)}"}
      _other -> {:error, "returned no result that it may have"}
    end
  catch
    kind, reason -> {:error, "ended by #{kind}: #{shown(reason)}"}
  end

  # A reason may have the record in it.
  defp shown(reason) when is_binary(reason), do: Answer.one_line(reason)
  defp shown(reason), do: inspect(Metadata.reason(reason))
end
