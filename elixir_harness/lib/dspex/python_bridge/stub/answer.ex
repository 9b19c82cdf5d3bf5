defmodule DSPex.PythonBridge.Stub.Answer do
  @moduledoc false
  # One call of an answer's function, and what becomes of its value. A mistake of the test's (the function raises, gives
  # something else than an answer, or there is none) is an error of the call, and is logged: the code under test
  # may take it for an error of the LM's.

  require Logger

  alias DSPex.PythonBridge.Error
  alias DSPex.PythonBridge.Program.Dump
  alias DSPex.PythonBridge.Protocol.Payload
  alias DSPex.PythonBridge.Stub.{Answers, Context, Definition, Ledger, Reply}

  # With texts of their own. (A bridge that does not run is a stub that is stopped.)
  @types [:timeout, :overloaded, :python_process_died]
  @expected "{:ok, outputs}, {:ok, outputs, meta} or {:error, error}: maps, and an error that is " <>
              "a DSPex.PythonBridge.Error, a text, #{Enum.map_join(@types, " or ", &inspect/1)}"

  @doc "Calls the function with the inputs, in the calling process."
  @spec call(Context.t(), map(), Answers.answer()) :: Reply.result()
  def call(run, _inputs, %{fun: nil} = answer), do: unknown(run, answer)

  def call(run, inputs, %{fun: fun} = answer) do
    case apply_to(fun, run.program, inputs) do
      {:ok, outputs} ->
        ok(run, answer, outputs, %{})

      {:ok, outputs, meta} ->
        ok(run, answer, outputs, meta)

      {:error, %Error{type: type} = error} when type != :bridge_not_running ->
        error(run, answer, error)

      {:error, text} when is_binary(text) ->
        {:error, Error.new(:internal, text)}

      {:error, type} when type in @types ->
        {:error, Error.new(type)}

      other ->
        wrong(run, answer, "expected #{@expected}, got #{inspect(other, limit: 10)}")
    end
  catch
    kind, reason -> raised(run, answer, kind, reason, __STACKTRACE__)
  end

  defp apply_to(fun, _program, inputs) when is_function(fun, 1), do: fun.(inputs)
  defp apply_to(fun, program, inputs), do: fun.(program, inputs)

  ## Outputs

  defp ok(run, answer, outputs, meta) do
    with {:ok, outputs} <- object(outputs, "outputs"),
         {:ok, meta} <- object(meta, "meta"),
         nil <- Definition.misfit(run.fields, outputs) do
      {:ok, outputs, meta}
    else
      {:error, text} -> wrong(run, answer, text)
      text -> wrong(run, answer, text)
    end
  end

  defp error(run, answer, %Error{} = error) do
    case object(error.meta || %{}, "error.meta") do
      {:ok, meta} -> {:error, %{error | meta: meta}}
      {:error, text} -> wrong(run, answer, text)
    end
  end

  # As they come from the wire.
  defp object(map, what) when is_map(map) do
    with {:ok, json} <- Payload.encode(Dump.any(map), what),
         {:ok, %{} = object} <- Payload.decode(IO.iodata_to_binary(json)) do
      {:ok, object}
    else
      {:error, %Error{message: text}} -> {:error, text}
      _no_object -> {:error, "#{what}: expected a map"}
    end
  end

  defp object(_other, what), do: {:error, "#{what}: expected a map"}

  ## Mistakes

  # The stub's function for all programs has no clause for this one.
  defp raised(run, %{fun: fun} = answer, kind, reason, stacktrace) do
    error = if kind == :error, do: Exception.normalize(:error, reason, stacktrace)

    if is_function(fun, 2) and of?(error, fun) do
      unknown(run, answer)
    else
      banner = Exception.format_banner(kind, reason, stacktrace)
      stack = Exception.format_stacktrace(stacktrace)
      mistake(run, answer, internal(run, "the answer's function: #{banner}"), "\n" <> stack)
    end
  end

  defp of?(%FunctionClauseError{module: module, function: function, arity: 2}, fun),
    do: {module, function} == {info(fun, :module), info(fun, :name)}

  defp of?(_other, _fun), do: false

  defp info(fun, item), do: fun |> Function.info(item) |> elem(1)

  defp wrong(run, answer, text), do: mistake(run, answer, internal(run, text))

  defp internal(run, text),
    do: Error.new(:internal, "stub #{inspect(run.stub)}, program #{run.program}: #{text}")

  defp unknown(run, answer) do
    text =
      "Program not found: #{run.program}: the stub #{inspect(run.stub)} has no answer for it" <>
        why(answer)

    mistake(run, answer, Error.new(:program_not_found, text))
  end

  defp why(%{made: made, elsewhere?: elsewhere?, fun: fun}) do
    cond do
      made > 0 ->
        " any longer: it was expected #{times(made)}, and this is one more"

      elsewhere? ->
        " by this process. Another has: if a test expects this run, it needs Stub.allow/3"

      fun != nil ->
        ": its function answers: has no clause for this program and these inputs"

      true ->
        ". Give it one with Stub.expect/3, Stub.stub/3 or the option :answers of the stub"
    end
  end

  defp times(1), do: "once"
  defp times(n), do: "#{n} times"

  defp mistake(run, answer, error, stack \\ "") do
    Logger.error(error.message <> stack)
    Ledger.failed(answer.ledger, run.stub, error.message)
    {:error, error}
  end
end
