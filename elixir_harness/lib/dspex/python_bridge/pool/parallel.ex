defmodule DSPex.PythonBridge.Pool.Parallel do
  @moduledoc false
  # Questions to many servers at once, for a caller that may have a long mailbox, or trap exits: a process of its own
  # starts the tasks and collects the answers.

  alias DSPex.PythonBridge.OTP.Deadline

  # The collector always ends by `exit/1`.
  @dialyzer {:no_return, map: 4}

  @doc """
  Calls `ask` with each item, each in a process of its own, and returns the answers by item. `ask` ends by itself. From
  `soon` on, answers of which one is `enough?` are not completed.
  """
  @spec map([item], (item -> answer), Deadline.t(), (answer -> boolean())) :: %{item => answer}
        when item: term(), answer: term()
  def map(items, ask, soon \\ :infinity, enough? \\ fn _answer -> false end) do
    caller = self()

    {_pid, ref} =
      spawn_monitor(fn ->
        spawn_link(fn -> end_with(caller) end)
        tasks = for item <- items, do: Task.async(fn -> {item, ask.(item)} end)
        # Its end ends the tasks that still ask.
        exit({:answers, collect(tasks, [], [timeout: Deadline.left(soon)], enough?)})
      end)

    receive do
      {:DOWN, ^ref, :process, _pid, {:answers, answers}} -> Map.new(answers)
      {:DOWN, ^ref, :process, _pid, _crash} -> %{}
    end
  end

  # By links it ends the collector, and the tasks, whose calls are cancelled.
  defp end_with(caller) do
    ref = Process.monitor(caller)
    receive do: ({:DOWN, ^ref, :process, _caller, _reason} -> Process.exit(self(), :shutdown))
  end

  defp collect(tasks, answers, limits, enough?) do
    yielded = Task.yield_many(tasks, limits)
    answers = for({_task, {:ok, answer}} <- yielded, do: answer) ++ answers
    left = for {task, nil} <- yielded, do: task

    if left == [] or Enum.any?(answers, fn {_item, answer} -> enough?.(answer) end),
      do: answers,
      else: collect(left, answers, [timeout: :infinity, limit: 1], enough?)
  end
end
