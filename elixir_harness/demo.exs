# A tour of the bridge: what goes to Python, what comes back. Run by `mix run --no-start demo.exs`.
#
# DSPY_BRIDGE_PYTHON names the interpreter. Without DSPY_BRIDGE_LM the answers come from
# offline/echo, which needs no network; with, say, DSPY_BRIDGE_LM=openai/gpt-4o-mini and
# OPENAI_API_KEY they are a real LM's. Exit status 1 if anything is not as it should be.

defmodule Demo do
  alias DSPex.PythonBridge.Bridge

  @concurrent 20

  def run do
    Logger.configure(level: :warning)

    # The application would start a bridge by its configuration; the demo wants one of its own.
    Application.put_env(:dspex, :autostart, false)
    {:ok, _started} = Application.ensure_all_started(:dspex)

    lm = System.get_env("DSPY_BRIDGE_LM", "offline/echo")
    python = System.get_env("DSPY_BRIDGE_PYTHON")
    {:ok, _bridge} = Bridge.start_link(lm: lm, python_executable: python, default_timeout: 60_000)

    title("The first ping, which waits for the interpreter to start")

    {ms, _} =
      timed(fn -> show(:ping, %{}, &match?(%{"timestamp" => t} when is_number(t), &1)) end)

    %{os_pid: os_pid} = Bridge.get_status()
    say("answered after #{ms} ms by Python process #{os_pid}; the LM is #{lm}")

    title("Predict")
    create("qa", "question -> answer")
    execute("qa", "What is the capital of France?", &is_binary(&1["answer"]))

    title("Chain of thought")
    create("think", "question -> answer", "chain_of_thought")
    wanted = &(is_binary(&1["answer"]) and is_binary(&1["reasoning"]))
    execute("think", "Is 97 a prime number?", wanted)

    title("A typed field: the answer is an integer")
    create("count", "question -> answer: int")
    execute("count", "How many legs has a spider?", &is_integer(&1["answer"]))

    title("A ReAct with a tool that is an Elixir function")
    agent()

    title("An answer as it is written")
    stream()

    title("An error")
    args = %{program_id: "nobody", inputs: %{question: "?"}}
    show_error(:execute_program, args, "Program not found: nobody")

    title("#{@concurrent} runs at once, and a ping meanwhile")
    concurrently()

    title("What the peer counted")
    show(:get_stats, %{}, &(&1["programs_count"] == 4 and &1["in_flight"] == 0))

    :ok = Bridge.stop()
    say("\nAll as it should be.")
  end

  defp create(id, signature, type \\ "predict") do
    args = %{id: id, signature: signature, program_type: type}
    show(:create_program, args, &(&1 == %{"program_id" => id, "status" => "created"}))
  end

  defp execute(id, question, right?),
    do: show(:execute_program, %{program_id: id, inputs: %{question: question}}, right?)

  defp agent do
    args = %{
      id: "agent",
      signature: "question -> answer",
      program_type: "react",
      options: %{max_iters: 5},
      tools: [
        %{
          name: "shop",
          description: "How many of an article there are.",
          args: %{article: %{type: "string"}}
        }
      ]
    }

    show(:create_program, args, &(&1["status"] == "created"))
    demo = self()

    shop = fn %{"article" => article} ->
      send(demo, {:asked, article})
      %{article: article, in_stock: 3}
    end

    args = %{program_id: "agent", inputs: %{question: "Are there any red shirts?"}}
    say("→ execute_program #{JSON.encode!(args)} tools: %{shop: …}")

    case Bridge.request(Bridge, :execute_program, args, tools: %{shop: shop}) do
      {:ok, %{"answer" => answer, "trajectory" => steps}, meta} ->
        say("  step 1: #{steps["tool_name_0"]} #{JSON.encode!(steps["tool_args_0"])}")
        say("          gave #{JSON.encode!(steps["observation_0"])}")
        say("← #{JSON.encode!(answer)} after #{meta["lm_calls"]} calls of the LM")
        check(is_binary(answer), "that is not what was to come")

      {:error, error} ->
        fail("the agent failed: #{error.message}")
    end

    receive do
      {:asked, article} -> say("  (shop/1 ran here, in Elixir, with #{inspect(article)})")
    after
      0 -> fail("the tool was not called")
    end
  end

  defp stream do
    args = %{program_id: "qa", inputs: %{question: "Tell me of owls, and take your time."}}
    say("→ Bridge.stream(#{JSON.encode!(args)})")

    {chunks, last} =
      Enum.reduce(Bridge.stream(args), {[], nil}, fn
        {:chunk, "answer", text}, {chunks, _last} ->
          IO.write([if(chunks == [], do: "← ", else: "·"), text])
          {[text | chunks], nil}

        other, {chunks, _last} ->
          {chunks, other}
      end)

    say("")
    check(match?({:ok, %{"answer" => _}, _meta}, last), "the stream ended in #{inspect(last)}")
    {:ok, %{"answer" => answer}, _meta} = last
    whole = chunks |> Enum.reverse() |> Enum.join()
    check(whole == answer, "the chunks make another answer: #{inspect(whole)}")
    say("#{length(chunks)} chunks")
  end

  defp concurrently do
    tasks =
      for n <- 1..@concurrent do
        Task.async(fn ->
          args = %{program_id: "qa", inputs: %{question: "Question number #{n}?"}}
          Bridge.call(:execute_program, args)
        end)
      end

    {ping_ms, ping} = timed(fn -> Bridge.call(:ping) end)
    waiting = Bridge.get_status().pending
    {rest_ms, results} = timed(fn -> Task.await_many(tasks, 60_000) end)
    good = Enum.count(results, &match?({:ok, %{"answer" => _}}, &1))

    say("ping answered in #{ping_ms} ms, with #{waiting} runs still in progress")
    say("#{good} of #{@concurrent} answers after #{Float.round(ping_ms + rest_ms, 1)} ms")
    check(match?({:ok, %{"status" => "ok"}}, ping), "the ping was not answered: #{inspect(ping)}")
    check(good == @concurrent, "not every execute was answered: #{inspect(results)}")
  end

  defp show(command, args, right?) do
    say("→ #{command} #{JSON.encode!(args)}")

    case Bridge.call(command, args) do
      {:ok, result} ->
        say("← #{JSON.encode!(result)}")
        check(right?.(result), "that is not what was to come")

      {:error, reason} ->
        fail("the call failed: #{inspect(reason)}")
    end
  end

  defp show_error(command, args, wanted) do
    say("→ #{command} #{JSON.encode!(args)}")
    result = Bridge.call(command, args)
    say("← #{inspect(result)}")
    check(result == {:error, wanted}, "an error was to come: #{wanted}")
  end

  defp timed(fun) do
    {us, result} = :timer.tc(fun)
    {Float.round(us / 1000, 1), result}
  end

  defp title(text), do: say("\n#{text}")
  defp say(text), do: IO.puts(text)
  defp check(right?, text), do: if(right?, do: :ok, else: fail(text))

  defp fail(text) do
    IO.puts(:stderr, "demo: #{text}")
    Bridge.stop()
    exit({:shutdown, 1})
  end
end

Demo.run()
