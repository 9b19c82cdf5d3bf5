defmodule DSPex.PythonBridge.Programs.Tools do
  @moduledoc false
  # Whether the functions that a call is given are the tools of its program: a tool with another name would never be
  # called, and a program that is called without its tools answers worse, without an error.
  #
  # The names are in the definition that the bridge keeps. A program that is not known here (it is on another node, or
  # does not exist) is not checked.

  require Logger

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Programs.{Body, Change, Declared, Store}

  @typedoc "What the program is called through, for the log."
  @type whose :: {:bridge | :pool, term()}

  @doc """
  Refuses functions that the program of an `execute_program` has no tools for. The first call of a program with tools
  that is given none is logged. `opts`: of the call; `:tools` are the functions by their names.
  """
  @spec check(Store.table() | nil, whose(), term(), term(), keyword()) ::
          :ok | {:error, Error.t()}
  def check(table, whose, command, args, opts)
      when command in [:execute_program, "execute_program"] and table != nil do
    id = Change.program_id(command, args)
    names = id && Body.tools(table, id)
    given = opts[:tools]

    cond do
      names == nil -> :ok
      given != nil -> compare(id, names, Map.keys(given) -- metric(args))
      names != [] and Store.first_without_tools?(table, id) -> warn(whose, id, names)
      true -> :ok
    end
  end

  def check(_table, _whose, _command, _args, _opts), do: :ok

  # An evaluation has one more function, which is not a tool of the program.
  defp metric(args) do
    case Map.get(args, :metric) || Map.get(args, "metric") do
      %{tool: name} -> [name]
      %{"tool" => name} -> [name]
      _none -> []
    end
  end

  defp compare(id, names, given) do
    case Enum.sort(given -- names) do
      [] ->
        :ok

      unknown ->
        has = if names == [], do: "it has none", else: "it has #{Enum.join(names, ", ")}"

        text =
          ":tools: program #{Declared.shown(id)} has no tool #{Enum.join(unknown, ", ")}; #{has}"

        {:error, Error.new(:invalid_args, text)}
    end
  end

  defp warn({kind, server}, id, names) do
    text =
      "#{kind} #{inspect(server)}: program #{Declared.shown(id)} is called without its tools " <>
        "(#{Enum.join(names, ", ")}): pass them as tools: to #{module(kind)}.request or " <>
        "#{module(kind)}.stream. Further calls without them are not logged"

    Logger.warning(text, [{kind, server}])
  end

  defp module(:bridge), do: "Bridge"
  defp module(:pool), do: "Pool"
end
