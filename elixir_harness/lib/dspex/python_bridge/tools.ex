defmodule DSPex.PythonBridge.Tools do
  @moduledoc """
  The caller's functions that a peer may call while it executes a program, and the processes that run
  them (`DSPex.PythonBridge.ToolCall`): part of the call's `DSPex.PythonBridge.Relay`, to whose process
  they are linked.
  """

  alias DSPex.PythonBridge.{Caller, ToolCall}

  @enforce_keys [:functions, :bridge, :callers]
  defstruct [:functions, :bridge, :callers, :port, running: %{}]

  @type functions :: %{String.t() => ToolCall.tool()}
  @typedoc "`port`: of the peer that has called last. `running`: what each process is to answer."
  @type t :: %__MODULE__{
          functions: functions(),
          bridge: Caller.dest(),
          callers: [pid()],
          port: port() | nil,
          running: %{pid() => ToolCall.t()}
        }

  @doc """
  Functions by the names that the peer knows, or the text that says what is wrong with them.

      iex> {:ok, functions} = DSPex.PythonBridge.Tools.functions(%{search: fn %{"q" => q} -> q end})
      iex> Map.keys(functions)
      ["search"]
      iex> DSPex.PythonBridge.Tools.functions(%{search: 1})
      {:error, "search: expected a function of one argument"}
  """
  @spec functions(term()) :: {:ok, functions()} | {:error, String.t()}
  def functions(tools) when is_map(tools) and not is_struct(tools) do
    Enum.reduce_while(tools, {:ok, %{}}, fn {name, function}, {:ok, named} ->
      text = name(name)

      cond do
        text == nil -> {:halt, {:error, "expected names that are atoms or texts"}}
        not is_function(function, 1) -> {:halt, {:error, not_a_function(text)}}
        is_map_key(named, text) -> {:halt, {:error, "#{text}: there twice, as atom and as text"}}
        true -> {:cont, {:ok, Map.put(named, text, function)}}
      end
    end)
  end

  def functions(_other), do: {:error, "expected a map of names to functions of one argument"}

  defp name(name) when is_atom(name) and name not in [nil, true, false], do: Atom.to_string(name)
  defp name(name) when is_binary(name), do: if(String.valid?(name), do: name)
  defp name(_other), do: nil

  defp not_a_function(name), do: "#{name}: expected a function of one argument"

  @doc "The tools of a call to a bridge; `callers` as `Task` has them, the caller first."
  @spec new(functions(), Caller.dest(), [pid()]) :: t()
  def new(functions, bridge, callers),
    do: %__MODULE__{functions: functions, bridge: bridge, callers: callers}

  @doc "Whether there are any."
  @spec none?(t()) :: boolean()
  def none?(%__MODULE__{functions: functions}), do: functions == %{}

  @doc """
  A peer calls a tool: it runs in a process of its own. `{:answered, pid}` comes to the calling process
  when it has answered.
  """
  @spec run(t(), ToolCall.t()) :: t()
  # What a peer that is gone has asked for interests nobody: the next one starts from the beginning.
  def run(%__MODULE__{port: before} = tools, %ToolCall{port: port} = call) when port != before do
    run(%{stop(tools) | port: port}, call)
  end

  # The link is for an end of this process that is not foreseen here.
  def run(%__MODULE__{} = tools, call) do
    args = [call, tools.functions, tools.bridge, {self(), tools.callers}]
    pid = spawn_link(ToolCall, :run, args)
    %{tools | running: Map.put(tools.running, pid, call)}
  end

  @doc "A process has answered its call."
  @spec answered(t(), pid()) :: t()
  def answered(%__MODULE__{} = tools, pid),
    do: %{tools | running: Map.delete(tools.running, pid)}

  @doc "A process has ended. If it has not answered, by something that it was linked to, say, it is done here."
  @spec exited(t(), pid(), term()) :: t()
  def exited(%__MODULE__{} = tools, pid, reason) do
    {call, running} = Map.pop(tools.running, pid)
    if call, do: ToolCall.fail(call, tools.bridge, reason)
    %{tools | running: running}
  end

  @doc "Ends what runs. Nothing less would end a function that traps exits."
  @spec stop(t()) :: t()
  def stop(%__MODULE__{running: running} = tools) do
    for {pid, _call} <- running, do: Process.exit(pid, :kill)
    %{tools | running: %{}}
  end
end
