defmodule DSPex.PythonBridge.Evaluate.Requests do
  @moduledoc false
  # The requests of an evaluation: a few examples each, so that a pool spreads them over its peers, that one slow example
  # holds up few others, and that little is done again when a peer dies.
  #
  # They are made by tasks, which end with the caller. The examples stay in the caller's process: what a stream gives is
  # not held twice.

  alias DSPex.PythonBridge.{Bridge, Error, Pool, Program}
  alias DSPex.PythonBridge.Evaluate.{Examples, Options, Result, Tally}
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Tools.LargeFunction

  # So many requests at once, as far as `max_concurrency` allows, and so many examples in one.
  @requests 16
  @most_examples 8
  # A peer answers a list so long before the deadline, with a timeout for what is not done.
  @earlier_ms 250

  @doc """
  The results in the order of the examples, and the sum of what the requests have used. `progress` is called with what is
  measured after each request, in the calling process.
  """
  @spec run(
          term(),
          {String.t(), Program.Spec.t() | nil},
          Enumerable.t(),
          Options.t(),
          (Tally.t() -> term())
        ) ::
          {:ok, [Result.item()], map()} | {:error, Error.t()}
  def run(server, program, examples, %Options{} = options, progress) do
    size = options.max_concurrency |> div(@requests) |> max(1) |> min(@most_examples)
    deadline = Deadline.new(options.timeout)
    {tools, large} = LargeFunction.hold(Keyword.get(options.passed, :tools, %{}), self())
    options = %{options | passed: Keyword.put(options.passed, :tools, tools)}
    request = request(server, program, options, deadline)

    # Its key in the process dictionary, where the examples wait for their results: a task would copy them twice.
    waiting = make_ref()

    try do
      examples
      |> Stream.chunk_every(size)
      |> Stream.with_index()
      |> Stream.map(&keep(&1, waiting))
      |> Task.async_stream(request,
        max_concurrency: max(div(options.max_concurrency, size), 1),
        ordered: false,
        timeout: :infinity
      )
      |> Enum.reduce_while({:ok, %Tally{}}, fn {:ok, {number, reply}}, {:ok, tally} ->
        examples = Process.delete({waiting, number})

        with {:ok, results, meta} <- located(reply, number * size),
             {:ok, items} <- Result.items(examples, results, number * size),
             :ok <- in_time(items, options, deadline) do
          tally = Tally.add(tally, items, meta)
          progress.(tally)
          Enum.each(items, options.on_result)
          {:cont, {:ok, tally}}
        else
          {:error, error} -> {:halt, {:error, error}}
        end
      end)
      |> case do
        {:ok, tally} -> {:ok, Tally.items(tally), tally.usage}
        {:error, error} -> {:error, error}
      end
    catch
      {Examples, text} -> {:error, Error.new(:invalid_request, "examples: #{text}")}
    after
      LargeFunction.close(large)
      for {{^waiting, _number} = key, _examples} <- Process.get(), do: Process.delete(key)
    end
  end

  defp keep({examples, number}, waiting) do
    Process.put({waiting, number}, examples)
    {examples, number}
  end

  defp request(server, {program, spec}, options, deadline) do
    call = if Pool.Handle.fetch(server), do: &Pool.spread/4, else: &Bridge.request/4
    args = Map.merge(options.arguments, %{program_id: program, metric: options.metric})
    # Without the other options: each task gets a copy of what its function needs.
    passed = options.passed

    fn {examples, number} ->
      with {:ok, inputs, expected} <- columns(examples, spec) do
        args = Map.put(args, :inputs, inputs)
        args = if expected, do: Map.put(args, :expected, expected), else: args

        call.(server, :execute_program, args, [timeout: left(deadline)] ++ passed)
      end
      |> then(&{number, &1})
    end
  end

  # At the deadline the request fails at once.
  defp left(deadline), do: with(0 <- Deadline.left(deadline), do: 1)

  # Its index in the request, as the peer's errors have it.
  defp columns(examples, spec) do
    with {:error, index} <- Examples.columns(examples, spec),
         do: {:error, Error.new(:invalid_args, Examples.refusal("examples", index))}
  end

  # The peer counts the examples of its request.
  defp located({:error, %Error{type: :invalid_args, message: text} = error}, before) do
    text =
      Regex.replace(~r/\b(inputs|expected|examples)\[(\d+)\]/, text, fn _all, name, index ->
        "#{name}[#{before + String.to_integer(index)}]"
      end)

    {:error, %{error | message: text}}
  end

  defp located({:error, error}, _before), do: {:error, error}
  defp located({:ok, result, meta}, _before), do: {:ok, result, meta}

  defp in_time(items, %Options{passed: passed, timeout: timeout}, deadline) do
    over? =
      timeout != :infinity and
        (passed[:item_timeout_ms] == nil or Deadline.left(deadline) <= @earlier_ms)

    if over? and Enum.any?(items, &match?(%{error: %Error{type: :timeout}}, &1)),
      do: {:error, Error.new(:timeout, "the evaluation was not finished within #{timeout} ms")},
      else: :ok
  end
end
