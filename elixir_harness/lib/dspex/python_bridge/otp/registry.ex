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
