defmodule DSPex.PythonBridge.Stub.RunArguments do
  @moduledoc false
  # The arguments of `execute_program`, checked by the peer's rules.

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Stub.{Arguments, Evaluation}

  @execute ~w(program_id inputs config lm attempts max_concurrency item_timeout_ms) ++
             ~w(expected metric optimize options)
  @most_attempts 10

  @type t :: %{
          program: String.t(),
          inputs: map() | [term()],
          max_concurrency: pos_integer() | :infinity,
          item_timeout: number() | :infinity,
          evaluation: Evaluation.given() | nil
        }

  @doc "The arguments of an `execute_program`."
  @spec read(map()) :: {:ok, t()} | {:error, Error.t()}
  def read(args) do
    with :ok <- no_optimizer(args),
         :ok <- Arguments.known(args, @execute, ""),
         :ok <- Arguments.text(args, "program_id"),
         :ok <- inputs(args["inputs"]),
         :ok <- Arguments.object(args, "config", "an object"),
         :ok <- count(args, "attempts", @most_attempts),
         :ok <- count(args, "max_concurrency", :infinity),
         :ok <- milliseconds(args, "item_timeout_ms"),
         :ok <- of_list(args, "max_concurrency"),
         :ok <- of_list(args, "item_timeout_ms"),
         {:ok, evaluation} <- Evaluation.read(args) do
      {:ok,
       %{
         program: args["program_id"],
         inputs: args["inputs"],
         max_concurrency: args["max_concurrency"] || :infinity,
         item_timeout: args["item_timeout_ms"] || :infinity,
         evaluation: evaluation
       }}
    end
  end

  defp inputs(inputs) when is_map(inputs) or is_list(inputs), do: :ok

  defp inputs(_other) do
    refuse(
      "inputs: expected an object of the signature's input fields, or a list of such objects"
    )
  end

  defp count(args, name, most) do
    case args[name] do
      nil -> :ok
      n when is_integer(n) and n >= 1 and n <= most -> :ok
      _other when most == :infinity -> refuse("#{name}: expected a whole number of at least 1")
      _other -> refuse("#{name}: expected a whole number from 1 to #{most}")
    end
  end

  defp milliseconds(args, name) do
    if args[name] == nil or (is_number(args[name]) and args[name] > 0),
      do: :ok,
      else: refuse("#{name}: expected a number of milliseconds greater than 0")
  end

  defp of_list(%{"inputs" => inputs} = args, name) do
    if args[name] != nil and is_map(inputs),
      do: refuse("#{name}: only for a list of inputs"),
      else: :ok
  end

  defp no_optimizer(%{"optimize" => optimize}) when optimize != nil,
    do: refuse("optimize: a stub cannot optimize; test with a bridge and offline/script")

  defp no_optimizer(_args), do: :ok

  defp refuse(text), do: Arguments.refuse(text)
end
