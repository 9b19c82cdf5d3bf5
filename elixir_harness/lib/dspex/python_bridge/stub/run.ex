defmodule DSPex.PythonBridge.Stub.Run do
  @moduledoc false
  # One `execute_program` of a stub, in a process of its own, which ends with the stub and is killed when the caller gives
  # up. It sends the stub `{:answered, id, reply}`, and before it what its context sends.

  alias DSPex.PythonBridge.Stub.{Answer, Answers, Batch, Context, Evaluation}

  @typedoc "What is run: one input, or a list."
  @type work ::
          {map(), Answers.answer()}
          | {:list, [Batch.item()], Batch.limits(), Evaluation.t() | nil}

  @doc "Starts the process of a run."
  @spec start_link(Context.t(), work()) :: pid()
  def start_link(%Context{} = run, work) do
    spawn_link(fn ->
      Context.enter(run)
      send(run.server, {:answered, run.id, Context.reply(run, result(run, work))})
    end)
  end

  defp result(run, {:list, items, limits, evaluation}) do
    with {:ok, results, meta} <- Batch.run(run, items, limits, evaluation) do
      result = if evaluation, do: Evaluation.result(results), else: %{"results" => results}
      {:ok, result, meta}
    end
  end

  defp result(run, {inputs, answer}) do
    with {:ok, outputs, meta} <- Answer.call(run, inputs, answer) do
      if run.stream? and not Context.chunks?(), do: whole(run, outputs)
      {:ok, outputs, meta}
    end
  end

  # An answer that was not sent in chunks is one for each field, as it is with a cache.
  defp whole(run, outputs) do
    order = (run.fields && run.fields.outputs) || []

    for field <- (Map.keys(outputs) -- order) ++ order,
        is_binary(outputs[field]),
        do: Context.stream(run, %{"field" => field, "chunk" => outputs[field]})
  end
end
