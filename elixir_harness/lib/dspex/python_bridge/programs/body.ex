defmodule DSPex.PythonBridge.Programs.Body do
  @moduledoc false
  # What Elixir needs to know of a program, from the body of its `create_program` that the bridge keeps. It is read when
  # it is first needed, in the caller's process, and remembered in the table.

  alias DSPex.PythonBridge.Programs.Store
  alias DSPex.PythonBridge.Protocol.Payload

  @head ~s(,"command":"create_program","args":{)
  @rewarded ["best_of_n", "refine"]
  # What a definition without a type is.
  @default_type "predict"

  @typedoc "`tools`: their names, with that of a reward."
  @type facts :: %{tools: [String.t()], program_type: String.t()}

  @doc "The names of a program's tools; nil if it is not in the table, or cannot be read."
  @spec tools(Store.table(), Store.id()) :: [String.t()] | nil
  def tools(table, id), do: with(%{tools: names} <- Store.facts(table, id, &read/1), do: names)

  @doc "The type of a program; nil if it is not in the table, or cannot be read."
  @spec program_type(Store.table(), Store.id()) :: String.t() | nil
  def program_type(table, id),
    do: with(%{program_type: type} <- Store.facts(table, id, &read/1), do: type)

  @doc """
  The same definition, which the peer loads with the first run that needs it.

      iex> body = ~s(,"command":"create_program","args":{"id":"a"}})
      iex> IO.iodata_to_binary(DSPex.PythonBridge.Programs.Body.lazy(body))
      ~s(,"command":"create_program","args":{"lazy":true,"id":"a"}})
  """
  @spec lazy(binary()) :: iodata()
  def lazy(<<@head, args::binary>>), do: [@head, ~s("lazy":true,), args]

  @doc """
  Reads a definition; nil if it cannot be read.

      iex> {:ok, body} =
      ...>   DSPex.PythonBridge.Protocol.encode_body(:create_program, %{
      ...>     id: "a",
      ...>     program_type: "best_of_n",
      ...>     options: %{reward: %{tool: "brevity"}, module: "react"},
      ...>     tools: [%{name: "search"}]
      ...>   })
      iex> DSPex.PythonBridge.Programs.Body.read(body)
      %{tools: ["brevity", "search"], program_type: "best_of_n"}
  """
  @spec read(binary()) :: facts() | nil
  def read("," <> body) do
    with {:ok, %{"args" => %{} = args}} <- Payload.decode("{" <> body) do
      tools = if is_list(args["tools"]), do: args["tools"], else: []
      names = for %{"name" => name} when is_binary(name) <- tools, do: :binary.copy(name)
      %{tools: Enum.sort(Enum.uniq(reward(args) ++ names)), program_type: type(args)}
    else
      _unreadable -> nil
    end
  end

  def read(_other), do: nil

  defp reward(%{"program_type" => type, "options" => %{"reward" => %{"tool" => name}}})
       when type in @rewarded and is_binary(name),
       do: [:binary.copy(name)]

  defp reward(_args), do: []

  defp type(%{"program_type" => type}) when is_binary(type), do: :binary.copy(type)
  defp type(_args), do: @default_type
end
