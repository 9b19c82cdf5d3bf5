defmodule DSPex.PythonBridge.Tools.LargeFunction do
  @moduledoc false
  # Each call of a tool runs in a process of its own (`DSPex.PythonBridge.Tools.Invocation`), which gets a copy of all that
  # the function has captured. For most functions that costs nothing. A metric that has captured a data set of 18 MB takes
  # 50 ms to copy: it is put into a persistent term once, which processes read without a copy.
  #
  # To erase a persistent term makes the BEAM scan all processes, so this is for large functions only, once for each call
  # or evaluation.

  alias DSPex.PythonBridge.Tools.Runner

  # In words: copying less than this (64 KB) takes no longer than starting the process that runs it.
  @small 8_192
  # Persistent terms share 1 GB of address space with the code of all modules, and the BEAM ends if that is full. A function
  # of more words than this (128 MB) is copied for each call.
  @largest 16_777_216

  @doc """
  The tools of a call, with small functions in the place of the large ones; and the process that erases these when it is
  closed or the owner ends, nil without any.
  """
  @spec hold(tools, owner :: pid()) :: {tools, pid() | nil}
        when tools: %{optional(term()) => function() | Runner.tool() | {function(), keyword()}}
  def hold(tools, owner) do
    {tools, keys} = Enum.map_reduce(tools, [], &hold_large/2)
    {Map.new(tools), if(keys != [], do: spawn(fn -> erase(keys, owner) end))}
  end

  defp hold_large({name, tool}, keys) do
    function = with {function, _options} <- tool, do: function

    if :erts_debug.flat_size(function) in @small..@largest do
      key = {__MODULE__, make_ref()}
      :persistent_term.put(key, function)
      small = small(key, function)
      {{name, if(is_tuple(tool), do: put_elem(tool, 0, small), else: small)}, [key | keys]}
    else
      {{name, tool}, keys}
    end
  end

  defp small(key, function) when is_function(function, 1),
    do: fn args -> :persistent_term.get(key).(args) end

  defp small(key, _function), do: fn args, id -> :persistent_term.get(key).(args, id) end

  @doc "Erases large functions. Calls of them that still run go on."
  @spec close(pid() | nil) :: term()
  def close(eraser), do: eraser && send(eraser, :close)

  defp erase(keys, owner) do
    monitor = Process.monitor(owner)

    receive do
      :close -> :ok
      {:DOWN, ^monitor, :process, _owner, _reason} -> :ok
    end

    Enum.each(keys, &:persistent_term.erase/1)
  end
end
