defmodule DSPex.PythonBridge.Pool.Cluster.Message do
  @moduledoc false
  # The messages between the coordinators of a cluster, whose nodes run different versions of this code during a
  # rolling upgrade.
  #
  #   * `{:hello, coordinator, name, serves?, programs}` when two meet: the whole table of programs
  #   * `{:serves, coordinator, name, serves?}`: whether calls may be sent there, at each change
  #   * `{:change, coordinator, id, change, body}` and back `{:changed, id, coordinator}`: one change of the programs
  #
  # Since version 2 a message is sent as `{:dspex_cluster, version, message}`. Version 1 sends the same messages bare, and
  # drops what it does not know: it is understood, and sent version 1 as soon as it has sent something. Later
  # versions have to do the same.

  alias DSPex.PythonBridge.Programs

  @tag :dspex_cluster
  @version 2

  @type version :: 1..2
  @type t ::
          {:hello, pid(), atom(), boolean(), Programs.Store.exported()}
          | {:serves, pid(), atom(), boolean()}
          | {:change, pid(), integer(), Programs.Store.change(), binary()}
          | {:changed, integer(), pid()}

  @doc "Whether a term looks like such a message, of any version."
  defguard is_message(term)
           when is_tuple(term) and tuple_size(term) > 0 and
                  elem(term, 0) in [@tag, :hello, :serves, :change, :changed]

  @doc "The newest version that is understood here."
  @spec version() :: version()
  def version, do: @version

  @doc "The message in the form of a version."
  @spec pack(t(), version()) :: term()
  def pack(message, 1), do: message
  def pack(message, @version), do: {@tag, @version, message}

  @doc "The message, its version and its sender; `:unknown` if this version does not understand it."
  @spec read(term()) :: {:ok, t(), version(), coordinator :: pid()} | :unknown
  def read({@tag, @version, message}), do: checked(message, @version)
  def read(message), do: checked(message, 1)

  defp checked(message, version) do
    if valid?(message), do: {:ok, message, version, coordinator(message)}, else: :unknown
  end

  defp valid?({:hello, coordinator, name, serves?, programs}),
    do: valid?({:serves, coordinator, name, serves?}) and Programs.Store.exported?(programs)

  defp valid?({:serves, coordinator, name, serves?}),
    do: is_pid(coordinator) and is_atom(name) and is_boolean(serves?)

  defp valid?({:change, coordinator, id, {_kind, _ids, stamp} = change, body}) when stamp != nil,
    do:
      is_pid(coordinator) and is_integer(id) and Programs.Store.change?(change) and
        is_binary(body)

  defp valid?({:changed, id, coordinator}), do: is_integer(id) and is_pid(coordinator)
  defp valid?(_other), do: false

  defp coordinator({:changed, _id, coordinator}), do: coordinator
  defp coordinator(message), do: elem(message, 1)
end
