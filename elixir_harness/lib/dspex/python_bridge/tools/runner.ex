defmodule DSPex.PythonBridge.Tools.Runner do
  @moduledoc false
  # The caller's functions that a peer may call during a run, and the processes that run them
  # (`DSPex.PythonBridge.Tools.Invocation`): part of `DSPex.PythonBridge.Client.StreamProxy`, whose process starts and ends
  # them. `DSPex.PythonBridge.Tools.FunctionHolder` holds the functions.

  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Tools.{FunctionHolder, Invocation}

  @enforce_keys [:holder, :bridge, :callers]
  defstruct [:holder, :bridge, :callers, :port, running: %{}]

  @type functions :: %{String.t() => Invocation.tool()}
  @typedoc """
  `holder`: nil if there are no functions. `port`: of the peer that has called last. `running`: the tool call of each
  process.
  """
  @type t :: %__MODULE__{
          holder: pid() | nil,
          bridge: Invocation.bridge(),
          callers: [pid()],
          port: port() | nil,
          running: %{pid() => Invocation.t()}
        }

  @doc """
  Functions by the names that the peer uses, or the error message that refuses them.

      iex> {:ok, functions} = DSPex.PythonBridge.Tools.Runner.functions(%{search: fn %{"q" => q} -> q end})
      iex> Map.keys(functions)
      ["search"]
      iex> DSPex.PythonBridge.Tools.Runner.functions(%{search: 1})
      {:error, "search: expected a function of one argument"}
  """
  @spec functions(term()) :: {:ok, functions()} | {:error, String.t()}
  def functions(tools) when is_map(tools) and not is_struct(tools) do
    Enum.reduce_while(tools, {:ok, %{}}, fn {name, function}, {:ok, named} ->
      text = Payload.string(name)

      cond do
        text == nil or not String.valid?(text) ->
          {:halt, {:error, "expected names that are atoms or strings"}}

        not is_function(function, 1) ->
          {:halt, {:error, not_a_function(text)}}

        is_map_key(named, text) ->
          {:halt, {:error, "#{text}: there twice, as atom and as string"}}

        true ->
          {:cont, {:ok, Map.put(named, text, function)}}
      end
    end)
  end

  def functions(_other), do: {:error, "expected a map of names to functions of one argument"}

  defp not_a_function(name), do: "#{name}: expected a function of one argument"

  @doc """
  The tools of a call to a bridge. `holder`: of the call's functions, nil without any; `callers` as for `Task`, the
  calling process first.
  """
  @spec new(pid() | nil, Invocation.bridge(), [pid()]) :: t()
  def new(holder, bridge, callers),
    do: %__MODULE__{holder: holder, bridge: bridge, callers: callers}

  @doc "Makes the calling process the one that runs them."
  @spec attend(t()) :: :ok
  def attend(%__MODULE__{holder: nil}), do: :ok
  def attend(%__MODULE__{holder: holder}), do: FunctionHolder.attend(holder)

  @doc "Whether there are any."
  @spec none?(t()) :: boolean()
  def none?(%__MODULE__{holder: holder}), do: holder == nil

  @doc """
  Runs a tool call in a process of its own. The calling process gets `{:answered, pid, answer}`, and `:DOWN` when it has
  ended.
  """
  @spec run(t(), Invocation.t()) :: t()
  # Tool calls of an earlier peer are useless: the next one starts from the beginning.
  def run(%__MODULE__{port: before} = tools, %Invocation{port: port} = call)
      when port != before do
    end_running(tools)
    run(%{tools | running: %{}, port: port}, call)
  end

  def run(%__MODULE__{} = tools, call) do
    args = [call, tools.holder, {self(), tools.callers}]
    {pid, _monitor} = spawn_monitor(Invocation, :run, args)
    %{tools | running: Map.put(tools.running, pid, call)}
  end

  @doc "Sends the answer of a process to the bridge. It is sent from here, so that there is only one."
  @spec answered(t(), pid(), Invocation.answer()) :: t()
  def answered(%__MODULE__{running: running} = tools, pid, answer)
      when is_map_key(running, pid) do
    send(tools.bridge, answer)
    %{tools | running: Map.delete(running, pid)}
  end

  def answered(%__MODULE__{} = tools, _pid, _of_another_peer), do: tools

  @doc "Handles the end of a process: if it was killed, for example, the answer is made here."
  @spec ended(t(), pid(), term()) :: t()
  def ended(%__MODULE__{} = tools, pid, reason) do
    {call, running} = Map.pop(tools.running, pid)
    if call, do: Invocation.fail(call, tools.bridge, reason)
    %{tools | running: running}
  end

  @doc "Ends the running tools and the holder of the functions: the call is over."
  @spec stop(t()) :: :ok
  def stop(%__MODULE__{holder: nil}), do: :ok

  def stop(%__MODULE__{holder: holder} = tools) do
    end_running(tools)
    FunctionHolder.close(holder)
  end

  # A function may trap exits.
  defp end_running(%__MODULE__{running: running}),
    do: for({pid, _call} <- running, do: Process.exit(pid, :kill))
end
