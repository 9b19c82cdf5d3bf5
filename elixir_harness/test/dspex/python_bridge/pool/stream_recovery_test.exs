defmodule DSPex.PythonBridge.Pool.StreamRecoveryTest do
  @moduledoc "Real peers of a pool are killed while it streams and calls tools; and what a caller's end stops."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Pool
  alias DSPex.Test.PoolProbe

  @pool __MODULE__.Pool
  @qa %{id: "qa", signature: "question -> answer"}
  @agent %{
    id: "agent",
    signature: "question -> answer",
    program_type: "react",
    options: %{max_iters: 3},
    tools: [%{name: "search", description: "finds", args: %{query: "str"}}]
  }

  defp start(opts) do
    start_supervised!({Pool, real_opts([name: @pool, default_timeout: 60_000] ++ opts)})
    for program <- [@qa, @agent], do: {:ok, _} = Pool.call(@pool, :create_program, program)
    all_up()
  end

  defp peers, do: Pool.status(@pool).peers
  defp running, do: for(%{state: :running, os_pid: os_pid} <- peers(), do: os_pid)
  defp all_up, do: eventually(fn -> Enum.all?(peers(), &(&1.state == :running)) end, 30_000)

  defp idle do
    eventually(fn -> Enum.uniq(PoolProbe.busy(@pool)) == [0] end)
    # A ping of a monitor may be under way.
    eventually(fn -> Enum.all?(peers(), &(&1.pending == 0)) end)
  end

  defp ask(program, question), do: %{program_id: program, inputs: %{question: question}}

  # Each chunk once and in order: joined, they are the answer.
  defp stream(question) do
    elements = @pool |> Pool.stream(ask("qa", question)) |> Enum.to_list()
    text = for {:chunk, "answer", text} <- elements, into: "", do: text
    assert Enum.count(elements, &(elem(&1, 0) in [:ok, :error])) == 1

    assert {:ok, %{"answer" => answer}, _meta} = List.last(elements)
    assert answer == "echo: " <> question
    assert text == answer
    :ok
  end

  # The answer of a tool that has run is kept for the next peer.
  defp call_agent(question) do
    count = :counters.new(1, [])

    search = fn %{"query" => _} ->
      :counters.add(count, 1, 1)
      "found"
    end

    assert {:ok, %{"trajectory" => %{"observation_0" => "found"}}, _meta} =
             Pool.request(@pool, :execute_program, ask("agent", question),
               tools: %{search: search}
             )

    assert :counters.get(count, 1) == 1
    :ok
  end

  defp two_or_more([_, _ | _] = some), do: some
  defp two_or_more(_fewer), do: nil

  @tag :slow
  @tag timeout: 180_000
  test "a pool of 3 that streams and calls tools, one peer killed whenever two serve: each call has one result" do
    # No call is given up.
    start(pool_size: 3, max_retries: 50)
    stop = :atomics.new(1, [])

    callers =
      for n <- 1..30 do
        Task.async(fn ->
          Stream.iterate(1, &(&1 + 1))
          |> Enum.reduce_while([], fn m, results ->
            # Enough chunks to be killed between two of them.
            question = Enum.map_join(1..60, " ", &"#{n}.#{m}.#{&1}")
            result = if rem(n, 3) == 0, do: call_agent(question), else: stream(question)
            on? = if :atomics.get(stop, 1) == 1, do: :halt, else: :cont
            {on?, [result | results]}
          end)
        end)
      end

    for n <- 1..String.to_integer(System.get_env("POOL_STORM_ROUNDS", "8")) do
      serving = eventually(fn -> two_or_more(running()) end, 30_000)
      os_pid = Enum.at(serving, rem(n, length(serving)))
      kill(os_pid)
      eventually(fn -> os_pid not in running() end)
      # A new peer serves at once, but imports DSPy with its first call.
      Process.sleep(700)
    end

    :atomics.put(stop, 1, 1)
    results = callers |> Task.await_many(120_000) |> List.flatten()
    assert Enum.count(results, &(&1 == :ok)) > 60
    if System.get_env("POOL_TIMES"), do: IO.inspect(Enum.frequencies(results))
    all_up()
    idle()
  end
end
