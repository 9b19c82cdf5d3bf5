defmodule DSPex.PythonBridge.Evaluate.Requests do
  @moduledoc false
  # The requests of an evaluation: a few examples each, so that a pool spreads them over its peers, that one slow example
  # holds up few others, and that little is done again when a peer dies.
  #
  # A process starts them and collects their replies, since the caller may have a long mailbox. It ends with the caller,
  # and the requests end with it. The caller takes the examples, and keeps them until their results are there.

  alias DSPex.PythonBridge.{Bridge, Error, Pool, Program}
  alias DSPex.PythonBridge.Evaluate.{Examples, Options, Result}
  alias DSPex.PythonBridge.OTP.{Ask, Deadline}
  alias DSPex.PythonBridge.Tools.LargeFunction

  # So many requests at once, as far as `max_concurrency` allows, and so many examples in one.
  @requests 16
  @most_examples 8
  # A peer answers a list so long before the deadline, with a timeout for what is not done.
  @earlier_ms 250

  @doc """
  What was measured. `progress` is called with what is known after each request, in the calling process.
  """
  @spec run(term(), {String.t(), Program.Spec.t() | nil}, term(), Options.t(), progress) ::
          {:ok, Result.tally()} | {:error, Error.t()}
        when progress: (Result.tally() -> term())
  def run(server, {id, spec}, examples, %Options{} = options, progress) do
    size = options.max_concurrency |> div(@requests) |> max(1) |> min(@most_examples)
    deadline = Deadline.new(options.timeout)
    {tools, large} = LargeFunction.hold(Keyword.get(options.passed, :tools, %{}), self())
    passed = Keyword.put(options.passed, :tools, tools)
    request = request(server, Map.put(options.args, :program_id, id), passed, deadline)
    collector = collector(request)

    state = %{
      collector: collector,
      spec: spec,
      size: size,
      most: max(div(options.max_concurrency, size), 1),
      count: 0,
      waiting: %{},
      tally: Result.tally()
    }

    taken = fn tally, items ->
      progress.(tally)
      Enum.each(items, options.on_result)
      in_time(items, options.timeout, deadline)
    end

    try do
      step(state, Examples.reader(examples), taken)
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

  # Sends the next examples, or waits for the results of earlier ones.
  defp step(%{waiting: waiting, tally: tally}, nil, _taken) when waiting == %{}, do: {:ok, tally}

  defp step(%{waiting: waiting} = state, reader, taken)
       when reader != nil and map_size(waiting) < state.most do
    with {:ok, examples, reader} <- Examples.take(reader, state.size),
         {:ok, state} <- send_next(state, examples, reader) do
      step(state, reader, taken)
    else
      {:error, text} -> {:error, Error.new(:invalid_request, "examples: #{text}")}
      {:refused, error} -> {:error, error}
    end
  end

  defp step(state, reader, taken) do
    with {:ok, {number, reply}} <- Ask.ask(state.collector, :infinity, &{:next, &1}),
         {examples, waiting} = Map.pop!(state.waiting, number),
         {:ok, results, meta} <- located(reply, number),
         {:ok, items} <- Result.items(examples, results, number),
         tally = Result.add(state.tally, items, meta),
         :ok <- taken.(tally, items) do
      step(%{state | waiting: waiting, tally: tally}, reader, taken)
    else
      failed ->
        Examples.close(reader)
        with :down <- failed, do: {:error, Error.new(:cancelled, "its requests were killed")}
    end
  end

  defp send_next(state, [], _none_left), do: {:ok, state}

  defp send_next(%{count: count} = state, examples, reader) do
    case Examples.columns(examples, state.spec) do
      {:ok, inputs, expected} ->
        args = if expected, do: %{inputs: inputs, expected: expected}, else: %{inputs: inputs}
        send(state.collector, {:send, count, args})
        waiting = Map.put(state.waiting, count, examples)
        {:ok, %{state | waiting: waiting, count: count + length(examples)}}

      {:error, index} ->
        Examples.close(reader)
        text = Examples.refusal("examples", count + index)
        {:refused, Error.new(:invalid_args, text)}
    end
  end

  # The peer counts the examples of its request.
  defp located({:error, %Error{type: :invalid_args, message: text} = error}, before) do
    text =
      Regex.replace(~r/\b(inputs|expected)\[(\d+)\]/, text, fn _all, name, index ->
        "#{name}[#{before + String.to_integer(index)}]"
      end)

    {:error, %{error | message: text}}
  end

  defp located(reply, _before), do: reply

  defp in_time(items, timeout, deadline) do
    timed_out? = Enum.any?(items, &match?(%{error: %Error{type: :timeout}}, &1))

    if timed_out? and Deadline.left(deadline) <= @earlier_ms,
      do: {:error, Error.new(:timeout, "the evaluation was not finished within #{timeout} ms")},
      else: :ok
  end

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
