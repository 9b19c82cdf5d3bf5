defmodule DSPex.PythonBridge.Tools.Runner do
  @moduledoc false
  # The caller's functions that a peer may call during a run, and the processes that run them
  # (`DSPex.PythonBridge.Tools.Invocation`): part of `DSPex.PythonBridge.Client.StreamProxy`, whose process starts and ends
  # them. `DSPex.PythonBridge.Tools.FunctionHolder` holds the functions.

  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Tools.{FunctionHolder, Functions, Invocation}

  @enforce_keys [:holder, :bridge, :callers]
  defstruct [:holder, :bridge, :callers, :port, peer: 0, running: %{}]

  @typedoc """
  `holder`: nil if there are no functions. `port`, `peer`: the peer that has called last, and how many were before it,
  with itself. `running`: the tool call of each process, for this peer.
  """
  @type t :: %__MODULE__{
          holder: pid() | nil,
          bridge: Invocation.bridge(),
          callers: [pid()],
          port: Invocation.peer() | nil,
          peer: non_neg_integer(),
          running: %{pid() => Invocation.t()}
        }

  @doc """
  Functions by the names that the peer uses, each with whether a call of it may be made again, or the error message that
  refuses them.

      iex> refund = {&List.wrap/1, repeat: false}
      iex> DSPex.PythonBridge.Tools.Runner.functions(%{:search => &List.wrap/1, "refund" => refund})
      {:ok, %{"search" => {&List.wrap/1, true}, "refund" => {&List.wrap/1, false}}}
      iex> DSPex.PythonBridge.Tools.Runner.functions(%{search: {&List.wrap/1, repeats: false}})
      {:error, "search: unknown option :repeats, did you mean :repeat?"}
  """
  @spec functions(term()) :: {:ok, Functions.tools()} | {:error, String.t()}
  def functions(tools) when is_map(tools) and not is_struct(tools) do
    Enum.reduce_while(tools, {:ok, %{}}, fn {name, tool}, {:ok, named} ->
      with {:ok, text} <- name(name),
           {:ok, tool} <- tool(text, tool),
           false <- is_map_key(named, text) do
        {:cont, {:ok, Map.put(named, text, tool)}}
      else
        true -> {:halt, {:error, "#{name}: there twice, as atom and as string"}}
        {:error, text} -> {:halt, {:error, text}}
      end
    end)
  end

  def functions(_other), do: {:error, "expected a map of names to functions"}

  defp name(name) do
    text = Payload.string(name)

    if text != nil and String.valid?(text),
      do: {:ok, text},
      else: {:error, "expected names that are atoms or strings"}
  end

  defp tool(name, {function, opts}) when is_function(function, 1) or is_function(function, 2) do
    case Table.check(opts, repeat: {:boolean, true}) do
      {:ok, opts} -> {:ok, {function, opts[:repeat]}}
      {:error, text} -> {:error, "#{name}: #{text}"}
    end
  end

  defp tool(_name, function) when is_function(function, 1) or is_function(function, 2),
    do: {:ok, {function, true}}

  defp tool(name, _other) do
    expected = "a function of one argument, or of two, or {function, repeat: false}"
    {:error, "#{name}: expected #{expected}"}
  end

  @doc """
  The tools of a call to a bridge. `holder`: of the call's functions, nil without any; `callers` as for `Task`, the
  calling process first.
  """
  @spec new(pid() | nil, Invocation.bridge(), [pid()]) :: t()
  def new(holder, bridge, callers),
    do: %__MODULE__{holder: holder, bridge: bridge, callers: callers}

  @doc "Makes the calling process the one that runs them; `:bound` if the run must not be sent to another peer."
  @spec attend(t()) :: :ok | :bound
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
  # Those of an earlier peer go on: this one starts the run from the beginning, and may make the same calls.
  def run(%__MODULE__{port: before} = tools, %Invocation{port: port} = call)
      when port != before,
      do: run(%{tools | running: %{}, port: port, peer: tools.peer + 1}, call)

  def run(%__MODULE__{} = tools, call) do
    source = {tools.holder, self(), tools.peer}
    args = [call, source, tools.bridge, tools.callers]
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

  @doc "Notes that the run is not sent again."
  @spec bound(t()) :: :ok
  def bound(%__MODULE__{holder: nil}), do: :ok
  def bound(%__MODULE__{holder: holder}), do: FunctionHolder.forget(holder)

  @doc """
  Ends the running tools and the holder of the functions: the call is over. `:bound` if a tool had begun that must not be
  called again.
  """
  @spec stop(t()) :: :ok | :bound
  def stop(%__MODULE__{holder: nil}), do: :ok

  def stop(%__MODULE__{holder: holder, running: running}) do
    # The holder ends them, too, if nothing has killed it. A function may trap exits.
    for {pid, _call} <- running, do: Process.exit(pid, :kill)
    FunctionHolder.close(holder)
  end
end
