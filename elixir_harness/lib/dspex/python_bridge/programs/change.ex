defmodule DSPex.PythonBridge.Programs.Change do
  @moduledoc false
  # What a command does to the programs, read from its arguments. Arguments that the peer will refuse do nothing.

  alias DSPex.PythonBridge.Programs.Store
  alias DSPex.PythonBridge.Protocol.Payload

  @doc """
  The change that a command makes if the peer carries it out; nil for most commands.

      iex> alias DSPex.PythonBridge.Programs.Change
      iex> Change.new(:create_program, %{id: :qa, signature: "q -> a"})
      {:create, "qa", nil}
      iex> Change.new("cleanup", %{"program_ids" => ["qa"]})
      {:cleanup, ["qa"], nil}
      iex> Change.new(:ping, %{})
      nil
  """
  @spec new(atom() | String.t(), map()) :: Store.change() | nil
  def new(command, args) when command in [:create_program, "create_program"] do
    with id when id != nil <- Payload.string(argument(args, :id)),
         do: {:create, :binary.copy(id), nil}
  end

  def new(command, args) when command in [:cleanup, "cleanup"] do
    case {argument(args, :program_ids), Map.drop(args, [:program_ids, "program_ids"])} do
      {nil, none} when none == %{} -> {:cleanup, :all, nil}
      {ids, none} when is_list(ids) and none == %{} -> cleanup(Enum.map(ids, &Payload.string/1))
      _refused -> nil
    end
  end

  def new(_command, _args), do: nil

  # Ids are kept as long as their programs: copied, so that they keep no larger binary alive.
  defp cleanup(ids),
    do: unless(nil in ids, do: {:cleanup, Enum.map(ids, &:binary.copy/1), nil})

  @doc "The id of the program that a command runs or creates; nil for other commands."
  @spec program_id(term(), term()) :: Store.id() | nil
  def program_id(command, args) when is_map(args) do
    cond do
      command in [:execute_program, "execute_program"] ->
        Payload.string(argument(args, :program_id))

      command in [:create_program, "create_program"] ->
        Payload.string(argument(args, :id))

      true ->
        nil
    end
  end

  def program_id(_command, _args), do: nil

  defp argument(args, name), do: Map.get(args, name, Map.get(args, Atom.to_string(name)))
end
