defmodule DSPex.PythonBridge.Pool.RecoveryTest do
  @moduledoc "Real peers of a pool die, one after another or all the time; callers do not notice."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Pool}
  alias DSPex.PythonBridge.Pool.LoadCounters
  alias DSPex.PythonBridge.Pool.Handle

  @moduletag :tmp_dir
  @moduletag :slow
  @pool __MODULE__.Pool

  defp start(dir, opts), do: start_supervised!({Pool, host_opts(dir, [name: @pool] ++ opts)})

  defp create(id, type \\ "predict") do
    args = %{id: id, signature: "question -> answer", program_type: type}
    {:ok, %{"status" => "created"}} = Pool.call(@pool, :create_program, args, 60_000)
  end

  defp execute(id, question),
    do:
      Pool.call(@pool, :execute_program, %{program_id: id, inputs: %{question: question}}, 60_000)

  defp all_up, do: eventually(fn -> Enum.all?(peers(), &(&1.state == :running)) end, 30_000)

  # A creation is answered when those that were up have the program: at the start, the first.
  defp all_have(id) do
    all_up()

    for %{bridge: bridge} <- peers() do
      eventually(
        fn -> match?({:ok, %{"programs" => [^id]}}, Bridge.call(bridge, :list_programs)) end,
        30_000
      )
    end
  end

  defp peers, do: Pool.status(@pool).peers
  defp running, do: for(%{state: :running, os_pid: os_pid} <- peers(), do: os_pid)
  defp two_or_more([_, _ | _] = some), do: some
  defp two_or_more(_fewer), do: nil

  test "a pool of 3 under 50 callers, one peer killed whenever two serve: none sees an error", %{
    tmp_dir: dir
  } do
    # A call may be hit each time.
    start(dir, pool_size: 3, max_retries: 8)
    create("qa")
    all_have("qa")
    stop = :atomics.new(1, [])

    callers =
      for n <- 1..50 do
        Task.async(fn ->
          Stream.iterate(1, &(&1 + 1))
          |> Enum.reduce_while(0, fn m, count ->
            text = "#{n} #{m}"
            assert execute("qa", text) == {:ok, %{"answer" => "echo: " <> text}}
            if :atomics.get(stop, 1) == 1, do: {:halt, count + 1}, else: {:cont, count + 1}
          end)
        end)
      end

    rounds = String.to_integer(System.get_env("POOL_STORM_ROUNDS", "8"))

    for n <- 1..rounds do
      running = eventually(fn -> two_or_more(running()) end, 30_000)
      os_pid = Enum.at(running, rem(n, length(running)))
      kill(os_pid)
      eventually(fn -> os_pid not in running() end)
    end

    :atomics.put(stop, 1, 1)
    answered = callers |> Task.await_many(60_000) |> Enum.sum()
    assert answered >= 50

    # Nothing is left of it: every call was counted out.
    all_up()
    %{counters: counters} = Handle.fetch(@pool)
    assert for(index <- 1..3, do: LoadCounters.busy(counters, index)) == [0, 0, 0]
    # A ping of the pool's monitor may be under way.
    assert eventually(fn -> for(%{pending: pending} <- peers(), do: pending) == [0, 0, 0] end)
  end

  test "a request that kills each time fails, those next to it are answered", %{
    tmp_dir: dir
  } do
    start(dir, pool_size: 3)
    create("nap", "host:Nap")
    create("deadly", "host:Deadly")

    tasks =
      for n <- 1..21 do
        Task.async(fn -> if n == 11, do: execute("deadly", "0"), else: execute("nap", "#{n}") end)
      end

    {deadly, good} = tasks |> Task.await_many(60_000) |> List.pop_at(10)
    assert deadly == {:error, :python_process_died}
    assert good == for(n <- 1..21, n != 11, do: {:ok, %{"answer" => "#{n}"}})
    log = File.read!(Path.join(dir, "log"))
    # Four deaths count; of others the next to it may be blamed.
    assert length(String.split(log, "\n", trim: true)) in 4..12
  end
end
