defmodule DSPex.PythonBridge.OTP.Registry do
  @moduledoc false
  # The bridges and pools that run on this node, by pid or name, each with what a caller needs to know of it.
  #
  # The entries are persistent terms: a lookup takes 0.05 µs and asks no process. The entry of a process that was
  # killed may outlast it.

  @type kind :: :bridge | :pool

  @doc "Registers a process under a key."
  @spec put(kind(), key :: term(), value :: term()) :: :ok
  def put(kind, key, value), do: :persistent_term.put({__MODULE__, kind, key}, value)

  @doc "The value of a key, or nil."
  @spec get(kind(), key :: term()) :: term() | nil
  def get(kind, key), do: :persistent_term.get({__MODULE__, kind, key}, nil)

  @doc "Notes the module whose processes register themselves as this kind, before the first one starts."
  @spec declare(kind(), module()) :: :ok
  def declare(kind, module), do: :persistent_term.put({__MODULE__, kind}, module)

  @doc """
  Whether a process of this node is of a declared kind. It has its name before it runs and registers itself: until
  then its initial call shows what it is.
  """
  @spec member?(kind(), pid()) :: boolean()
  def member?(kind, pid), do: get(kind, pid) != nil or begins?(kind, pid)

  # A registered process may hide its initial call (`:sensitive`). If it has just done so, the last look finds it.
  defp begins?(kind, pid) do
    begin = {:persistent_term.get({__MODULE__, kind}, nil), :init, 1}
    :proc_lib.translate_initial_call(pid) == begin or get(kind, pid) != nil
  end

  @doc "Removes a key."
  @spec delete(kind(), key :: term()) :: :ok
  def delete(kind, key) do
    :persistent_term.erase({__MODULE__, kind, key})
    :ok
  end

  @doc "All entries of a kind. It reads every persistent term of the node: not for a hot path."
  @spec list(kind()) :: [{key :: term(), value :: term()}]
  def list(kind),
    do: for({{__MODULE__, ^kind, key}, value} <- :persistent_term.get(), do: {key, value})
end
