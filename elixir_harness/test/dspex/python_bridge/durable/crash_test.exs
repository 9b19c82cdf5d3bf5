defmodule DSPex.PythonBridge.Durable.CrashTest do
  @moduledoc """
  The BEAM is killed again and again while it makes durable runs of agents, and started anew, with the real peer.
  """

  # It makes this a distributed node.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Pool
  alias DSPex.Test.{AgentLM, DurableWork, Nodes}

  @runs 200
  @at_once 8
  @moduletag :tmp_dir
  @moduletag :slow
  @moduletag timeout: 600_000

  # The LM's last requests of a run: it finishes, and the answer.
  @end_of_run 2

  test "no tool with a stored result runs again, no stored answer of an LM is asked for again, and results are the same",
       %{tmp_dir: dir} do
    Nodes.distribute()
    {lm, asked} = AgentLM.start()

    questions =
      Map.new(1..@runs, fn n -> {"run #{n}", words(n, :rand.uniform(4))} end)

    {results, kills} = make(lm, asked, dir, questions, 0)
    assert kills > 5

    recorded = for {id, question} <- questions, do: check(id, question, results[id], dir)
    lost = :atomics.get(asked, 1) - Enum.sum(recorded)
    assert lost <= kills * @at_once

    undisturbed = Path.join(dir, "undisturbed")
    start_supervised!({Pool, real_opts(name: __MODULE__)})
    expected = DurableWork.run_all(__MODULE__, lm, undisturbed, questions)
    assert without_numbers(results) == without_numbers(expected)
  end

  defp words(n, count), do: Enum.map_join(1..count, " ", &"#{n}-#{&1}")

  # Starts nodes, and kills each after a few more requests of the LM, until one has made all runs.
  defp make(lm, asked, dir, questions, kills) do
    node = Nodes.start()
    pool = Nodes.start_pool(node, real_opts(name: __MODULE__, pool_size: 2))
    work = [pool, lm, dir, questions]
    task = Task.async(fn -> on(node, work) end)
    enough = :atomics.get(asked, 1) + 20 + :rand.uniform(60)

    result =
      eventually(fn -> Task.yield(task, 0) || :atomics.get(asked, 1) >= enough end, 120_000)

    case result do
      {:ok, {:ok, results}} ->
        Nodes.stop(node)
        {results, kills}

      true ->
        Nodes.stop(node)
        assert {:error, {:erpc, :noconnection}} = Task.await(task)
        make(lm, asked, dir, questions, kills + 1)
    end
  end

  defp on(node, work) do
    {:ok, :erpc.call(node, DurableWork, :run_all, work)}
  rescue
    error in ErlangError -> {:error, error.original}
  end

  # The number of LM answers that are stored.
  defp check(id, question, result, dir) do
    records = DurableWork.records(dir, id)
    answers = for %{"lm" => entry} <- records, do: entry
    steps = length(String.split(question))
    assert length(answers) == steps + @end_of_run
    assert AgentLM.numbers(result) == AgentLM.numbers(answers)

    called = Enum.frequencies(DurableWork.calls(dir))
    keys = for %{"answer" => key} <- records, do: key
    assert length(Enum.uniq(keys)) == steps

    for key <- keys do
      of_key = for record <- records, how = how(record, key), do: how
      assert {began, [:answer]} = Enum.split_while(of_key, &(&1 == :began))
      assert called[key] in 1..length(began)
    end

    length(answers)
  end

  defp how(%{"began" => key}, key), do: :began
  defp how(%{"answer" => key}, key), do: :answer
  defp how(_record, _key), do: nil

  defp without_numbers(results),
    do:
      Map.new(results, fn {id, result} ->
        {id,
         Regex.replace(
           ~r/no\. \d+/,
           inspect(result, limit: :infinity, printable_limit: :infinity),
           ""
         )}
      end)
end
