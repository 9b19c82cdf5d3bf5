defmodule DSPex.PythonBridge.Evaluate.Requests do
  @moduledoc false
  # The requests of an evaluation, one for each example, so that a pool spreads them over its peers and nothing is done again
  # when a peer dies. A request of eight examples was no faster.
  #
  # A process starts them and collects their replies, since the caller may have a long mailbox. It ends with the caller,
  # and the requests end with it. The caller takes the examples, and keeps them until their results are there.

  alias DSPex.PythonBridge.{Bridge, Error, Pool, Program}
  alias DSPex.PythonBridge.Evaluate.{Examples, Options, Result}
  alias DSPex.PythonBridge.OTP.{Ask, Deadline}
  alias DSPex.PythonBridge.Tools.LargeFunction

  # A peer answers a list so long before the deadline, with a timeout for what is not done.
  @earlier_ms 250

  @doc """
  What was measured. `progress` is called with what is known after each request, in the calling process.
  """
  @spec run(term(), {String.t(), Program.Spec.t() | nil}, term(), Options.t(), progress) ::
          {:ok, Result.tally()} | {:error, Error.t()}
        when progress: (Result.tally() -> term())
  def run(server, {id, spec}, examples, %Options{} = options, progress) do
    deadline = Deadline.new(options.timeout)
    {tools, large} = LargeFunction.hold(Keyword.get(options.passed, :tools, %{}), self())
    passed = Keyword.put(options.passed, :tools, tools)

    collector =
      collector(request(server, Map.put(options.args, :program_id, id), passed, deadline))

    taken = fn tally, item ->
      progress.(tally)
      options.on_result.(item)
      in_time(item, options.timeout, deadline)
    end

    state = %{collector: collector, spec: spec, most: options.max_concurrency, taken: taken}

    try do
      step(state, Examples.reader(examples), 0, %{}, Result.tally())
    after
      Process.exit(collector, :shutdown)
      LargeFunction.close(large)
    end
  end

  defp request(server, args, passed, deadline) do
    call = if Program.Runner.client(server) == Pool, do: &Pool.spread/4, else: &Bridge.request/4
    # At the deadline the request fails at once.
    left = fn -> with(0 <- Deadline.left(deadline), do: 1) end
    &call.(server, :execute_program, Map.merge(args, &1), [timeout: left.()] ++ passed)
  end

  # Sends the next example, or waits for the result of an earlier one.
  defp step(_state, nil, _number, waiting, tally) when waiting == %{}, do: {:ok, tally}

  defp step(state, reader, number, waiting, tally)
       when reader != nil and map_size(waiting) < state.most do
    case Examples.take(reader, 1) do
      {:ok, [example], reader} ->
        with {:ok, inputs, expected} <- Examples.columns([example], state.spec) do
          args = if expected, do: %{inputs: inputs, expected: expected}, else: %{inputs: inputs}
          send(state.collector, {:send, number, args})
          step(state, reader, number + 1, Map.put(waiting, number, example), tally)
        else
          {:error, 0} ->
            Examples.close(reader)
            {:error, Error.new(:invalid_args, Examples.refusal("examples", number))}
        end

      {:ok, [], nil} ->
        step(state, nil, number, waiting, tally)

      {:error, text} ->
        {:error, Error.new(:invalid_request, "examples: #{text}")}
    end
  end

  defp step(state, reader, number, waiting, tally) do
    with {:ok, {answered, reply}} <- Ask.ask(state.collector, :infinity, &{:next, &1}),
         {example, waiting} = Map.pop!(waiting, answered),
         {:ok, reply, meta} <- located(reply, answered),
         {:ok, item} <- Result.item(example, reply, answered),
         tally = Result.add(tally, item, meta),
         :ok <- state.taken.(tally, item) do
      step(state, reader, number, waiting, tally)
    else
      failed ->
        Examples.close(reader)
        with :down <- failed, do: {:error, Error.new(:cancelled, "its requests were killed")}
    end
  end

  # The peer counts the examples of its request.
  defp located({:error, %Error{type: :invalid_args, message: text} = error}, number) do
    text = String.replace(text, ~r/\b(inputs|expected)\[0\]/, "\\1[#{number}]")
    {:error, %{error | message: text}}
  end

  defp located(reply, _number), do: reply

  defp in_time(%{error: %Error{type: :timeout}}, timeout, deadline) do
    text = "the evaluation was not finished within #{timeout} ms"
    if Deadline.left(deadline) <= @earlier_ms, do: {:error, Error.new(:timeout, text)}, else: :ok
  end

  defp in_time(_item, _timeout, _deadline), do: :ok

  ## The process

  defp collector(request) do
    caller = self()
    # As for a Task: by these, Mox and the Ecto sandbox find the test process.
    callers = [caller | Process.get(:"$callers", [])]
    spawn(fn -> collect(request, callers, Process.monitor(caller)) end)
  end

  defp collect(request, callers, watch) do
    receive do
      {:send, number, args} ->
        collector = self()

        spawn_link(fn ->
          Process.put(:"$callers", callers)
          send(collector, {:reply, number, request.(args)})
        end)

      {:next, ref} ->
        receive do
          {:reply, number, reply} -> send(ref, {ref, {number, reply}})
          {:DOWN, ^watch, :process, _caller, _reason} -> exit(:shutdown)
        end

      {:DOWN, ^watch, :process, _caller, _reason} ->
        exit(:shutdown)
    end

    collect(request, callers, watch)
  end
end
