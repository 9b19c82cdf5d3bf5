defmodule DSPex.Test.DurableWork do
  @moduledoc "Durable runs of an agent, on a node that a test ends: test/dspex/python_bridge/durable/crash_test.exs."

  alias DSPex.PythonBridge.{Durable, Pool}
  alias DSPex.PythonBridge.Durable.FileStore
  alias DSPex.Test.{AgentLM, Helpers}

  @at_once 8

  @doc "Makes the runs of `questions`, by their ids, until all are over: the results."
  def run_all(pool, lm, dir, questions) do
    {:ok, _} = Pool.call(pool, :create_program, AgentLM.agent("agent", lm), 60_000)
    opts = [max_concurrency: @at_once, timeout: :infinity]

    questions
    |> Task.async_stream(&run(pool, dir, &1), opts)
    |> Map.new(fn {:ok, {id, result}} -> {id, result} end)
  end

  defp run(pool, dir, {id, question}) do
    args = %{program_id: "agent", inputs: %{question: question}}
    tools = %{do: &note(dir, &1, &2)}
    opts = [id: id, store: {FileStore, runs(dir)}, lease: 1_000, tools: tools, timeout: 60_000]

    # Until the claim of the node before is over.
    {id, Helpers.eventually(fn -> unclaimed(Durable.run(pool, args, opts)) end, 60_000)}
  end

  defp unclaimed({:error, :claimed}), do: nil
  defp unclaimed({:ok, result, _meta}), do: result

  # What is in the file survives the end of the BEAM.
  defp note(dir, %{"what" => what}, key) do
    File.write!(Path.join(dir, "calls"), "#{key}\n", [:append])
    "done: #{what}"
  end

  @doc "The keys of the tool calls, in the order in which the functions were called."
  def calls(dir) do
    case File.read(Path.join(dir, "calls")) do
      {:ok, text} -> String.split(text, "\n", trim: true)
      {:error, :enoent} -> []
    end
  end

  @doc "The records of a run."
  def records(dir, id) do
    {:ok, records} = FileStore.read(runs(dir), id)
    Enum.map(records, &JSON.decode!/1)
  end

  defp runs(dir), do: Path.join(dir, "runs")
end
