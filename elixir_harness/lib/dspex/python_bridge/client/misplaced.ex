defmodule DSPex.PythonBridge.Client.Misplaced do
  @moduledoc false
  # The refusal of arguments that `call/2`, `request/3` and so on cannot place: each of these functions leaves out some of
  # four, and knows by their kinds which were given.

  alias DSPex.PythonBridge.Error

  @places %{
    {:call, 2} => "(command, args) or (server, command)",
    {:call, 3} => "(command, args, timeout) or (server, command, args)",
    {:request, 2} => "(command, args) or (server, command)",
    {:request, 3} => "(command, args, opts) or (server, command, args)",
    {:stream, 2} => "(args, opts) or (server, args)"
  }
  @all %{
    call: "call(server, command, args, timeout)",
    request: "request(server, command, args, opts)",
    stream: "stream(server, args, opts)"
  }

  @doc """
  The error that says which arguments are expected, and what kinds of terms were given: their contents may be secret.

      iex> DSPex.PythonBridge.Client.Misplaced.error(:call, [MyBridge, :ping, []]).message
      "call/3 takes (command, args, timeout) or (server, command, args), where args is a map, and was given " <>
        "(MyBridge, :ping, a list). All arguments: call(server, command, args, timeout)"
  """
  @spec error(:call | :request | :stream, [term()]) :: Error.t()
  def error(function, given) do
    arity = length(given)

    text =
      "#{function}/#{arity} takes #{Map.fetch!(@places, {function, arity})}, where args is a map, " <>
        "and was given (#{Enum.map_join(given, ", ", &kind/1)}). " <>
        "All arguments: #{Map.fetch!(@all, function)}"

    Error.new(:invalid_request, text)
  end

  defp kind(term) when is_atom(term) or is_integer(term) or is_pid(term), do: inspect(term)
  defp kind(term) when is_binary(term), do: "a string"
  defp kind(term) when is_list(term), do: "a list"
  defp kind(term) when is_map(term), do: "a map"
  defp kind(term) when is_tuple(term), do: "a tuple"
  defp kind(term) when is_function(term), do: "a function"
  defp kind(_term), do: "another term"
end
