defmodule DSPex.PythonBridge.Pool.NotStartedTest do
  @moduledoc "A pool without a Python that starts: calls fail at once, with the reason."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Error, Pool}

  @moduletag :tmp_dir
  @pool __MODULE__.Pool

  test "runs and creates, those that wait already as well, until one starts", %{tmp_dir: dir} do
    file = Path.join(dir, "there")
    opts = fake_opts("needs_a_file", env: %{"FAKE_FILE" => file}, max_retries: 1, pool_size: 2)
    start_supervised!({Pool, Keyword.put(opts, :name, @pool)})
    run = fn -> Pool.request(@pool, :execute_program, %{program_id: "p"}, timeout: :infinity) end
    create = fn -> Pool.call(@pool, :create_program, %{id: "p", signature: "q -> a"}, 60_000) end
    tasks = for _ <- 1..5, do: Task.async(run)
    creates = for _ <- 1..2, do: Task.async(create)

    for task <- tasks do
      assert {:error, %Error{type: :python_process_died, message: text}} =
               Task.await(task, 30_000)

      assert text =~ "the Python process does not start: exit status 4"
    end

    for task <- creates do
      assert {:error, "the Python process does not start: exit status 4" <> _} =
               Task.await(task, 30_000)
    end

    assert {:error, %Error{}} = run.()
    File.write!(file, "")
    eventually(fn -> match?({:ok, _, _}, run.()) end, 20_000)
  end
end
