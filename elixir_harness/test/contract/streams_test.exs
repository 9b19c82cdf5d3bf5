defmodule DSPex.Contract.StreamsTest do
  @moduledoc "The contract: streams, and agents whose tools are functions of the caller."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error}
  alias DSPex.Test.{SilentLM, StreamingLM}

  setup_all do
    %{bridge: start_supervised!({Bridge, real_opts(default_timeout: 20_000)})}
  end

  defp create(bridge, args) do
    id = "p#{System.unique_integer([:positive])}"
    args = Map.merge(%{id: id, signature: "question -> answer"}, args)
    {:ok, _} = Bridge.call(bridge, :create_program, args)
    %{program_id: id, inputs: %{question: "Why?"}}
  end

  defp streaming_program(bridge) do
    [lm: model, lm_options: options] = SilentLM.lm_opts(StreamingLM.start())
    create(bridge, %{lm: Map.put(options, :model, model)})
  end

  # A ReAct that calls its tool, and then answers.
  defp agent(bridge, tool_args) do
    step = fn thought, name, args ->
      %{next_thought: thought, next_tool_name: name, next_tool_args: args}
    end

    steps = [step.("look", "stock", tool_args), step.("done", "finish", %{})]
    answers = steps ++ [%{reasoning: "as told", answer: "3 left"}]
    tool = %{name: "stock", description: "How many are left.", args: %{sku: %{type: "string"}}}
    lm = %{model: "offline/script", answers: answers}
    create(bridge, %{program_type: "react", tools: [tool], lm: lm})
  end

  test "a stream has its first chunk while the LM still writes", %{bridge: bridge} do
    ask = streaming_program(bridge)
    test = self()
    read = fn -> for e <- Bridge.stream(bridge, ask), do: send(test, {:element, e}) end
    reader = Task.async(read)
    assert_receive {:lm_request, lm}, 10_000
    for text <- ["[[ ## answer ## ]]\n", "Because ", "of "], do: StreamingLM.say(lm, text)
    assert_receive {:element, {:chunk, "answer", "Because"}}, 10_000
    for text <- ["physics.", "\n\n[[ ## completed ## ]]"], do: StreamingLM.say(lm, text)
    StreamingLM.finish(lm)
    Task.await(reader, 10_000)
    assert_received {:element, {:ok, %{"answer" => "Because of physics."}, %{"lm_calls" => 1}}}
  end

  test "a stream that is halted closes the LM's connection", %{bridge: bridge} do
    ask = streaming_program(bridge)
    reader = Task.async(fn -> Enum.take(Bridge.stream(bridge, ask), 1) end)
    assert_receive {:lm_request, lm}, 10_000
    for text <- ["[[ ## answer ## ]]\n", "Because ", "of "], do: StreamingLM.say(lm, text)
    assert [{:chunk, "answer", _}] = Task.await(reader, 10_000)
    assert_receive {:lm_closed, ^lm}, 5_000
  end

  test "a stream of an unknown program ends with the error", %{bridge: bridge} do
    stream = Bridge.stream(bridge, %{program_id: "none", inputs: %{}})
    assert [{:error, %Error{type: :program_not_found}}] = Enum.to_list(stream)
  end

  test "a list of inputs streams each result as it comes", %{bridge: bridge} do
    ask = create(bridge, %{})
    inputs = for n <- 1..3, do: %{question: "#{n}"}
    {items, [last]} = Enum.split(Enum.to_list(Bridge.stream(bridge, %{ask | inputs: inputs})), 3)
    assert Enum.sort(for {:item, index, {:ok, %{"answer" => _}}} <- items, do: index) == [0, 1, 2]
    assert {:ok, %{"results" => [_, _, _]}, _meta} = last
  end

  test "an agent's tools are functions of the caller", %{bridge: bridge} do
    test = self()

    stock = fn %{"sku" => sku} ->
      send(test, {:asked, sku, self()})
      %{sku: sku, left: 3}
    end

    ask = agent(bridge, %{sku: "red"})

    assert {:ok, result, _} =
             Bridge.request(bridge, :execute_program, ask, tools: %{"stock" => stock})

    assert_received {:asked, "red", tool} when tool != test
    assert result["answer"] == "3 left"
    assert inspect(result["trajectory"]) =~ "left"
  end

  test "an agent's stream has its steps", %{bridge: bridge} do
    ask = agent(bridge, %{sku: "red"})
    elements = Enum.to_list(Bridge.stream(bridge, ask, tools: %{"stock" => fn _ -> 3 end}))
    assert Enum.any?(elements, &match?({:status, "calling tool stock"}, &1))
    assert {:ok, %{"answer" => "3 left"}, _meta} = List.last(elements)
  end

  test "a tool that raises is an observation for the LM, and no error of the call", %{
    bridge: bridge
  } do
    ask = agent(bridge, %{sku: "red"})
    opts = [tools: %{"stock" => fn _ -> raise "out of order" end}]
    assert {:ok, result, _meta} = Bridge.request(bridge, :execute_program, ask, opts)
    assert inspect(result["trajectory"]) =~ "out of order"
  end

  test "an agent without its functions is told so, and the log has a line", %{bridge: bridge} do
    ask = agent(bridge, %{sku: "red"})
    request = fn -> Bridge.request(bridge, :execute_program, ask, []) end
    {{:ok, result, _meta}, log} = ExUnit.CaptureLog.with_log(request)
    assert inspect(result["trajectory"]) =~ ":tools was not given for this call"
    assert log =~ "is called without its tools (stock)"
  end
end
