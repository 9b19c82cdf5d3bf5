defmodule DSPex.PythonBridge.OTP.Parallel do
  @moduledoc false
  # Questions to many servers at once, for a caller that may have a long mailbox and may be killed meanwhile: a process
  # collects the answers. It ends with the caller, and is linked to the processes that ask: if one of these ends, the
  # server that it has asked cancels the call.

  alias DSPex.PythonBridge.OTP.{Ask, Deadline, ServerGuard}

  # The collector always ends by `exit/1`, which ends those that it is linked to.
  @dialyzer {:no_return, map: 4}

  @doc """
  Calls `ask` with each item, each in a process of its own, and returns the answers by item. `ask` ends by itself. From
  `soon` on, answers of which one is `enough?` are not completed.
  """
  @spec map([item], (item -> answer), Deadline.t(), (answer -> boolean())) :: %{item => answer}
        when item: term(), answer: term()
  def map(items, ask, soon \\ :infinity, enough? \\ fn _answer -> false end) do
    caller = self()
    collector = spawn(fn -> init(caller, items, ask, soon, enough?) end)

    case Ask.ask(collector, :infinity, &{:collect, &1}) do
      {:ok, answers} -> answers
      :down -> %{}
    end
  end

  defp init(caller, items, ask, soon, enough?) do
    # The answers have the caller's contents.
    Process.flag(:sensitive, true)
    watch = Process.monitor(caller)
    collector = self()

    for item <- items do
      spawn_link(fn ->
        Process.flag(:sensitive, true)
        ServerGuard.run(fn -> send(collector, {:answer, item, ask.(item)}) end)
      end)
    end

    receive do
      {:collect, ref} -> send(ref, {ref, collect(length(items), %{}, soon, enough?, watch)})
      {:DOWN, ^watch, :process, _caller, _reason} -> :ok
    end

    # By their links it ends those that still ask.
    exit(:shutdown)
  end

  defp collect(left, answers, soon, enough?, watch) do
    receive do
      {:answer, item, answer} ->
        answers = Map.put(answers, item, answer)

        if left == 1 or (soon == :passed and enough?.(answer)),
          do: answers,
          else: collect(left - 1, answers, soon, enough?, watch)

      {:DOWN, ^watch, :process, _caller, _reason} ->
        answers
    after
      wait(soon) ->
        if Enum.any?(answers, fn {_item, answer} -> enough?.(answer) end),
          do: answers,
          else: collect(left, answers, :passed, enough?, watch)
    end
  end

  defp wait(:passed), do: :infinity
  defp wait(soon), do: Deadline.left(soon)
end
