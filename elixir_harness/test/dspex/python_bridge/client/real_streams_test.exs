defmodule DSPex.PythonBridge.Client.RealStreamsTest do
  @moduledoc "Streams, tools and lists of inputs with the real peer."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.Test.{SilentLM, StreamingLM}

  @qa %{id: "qa", signature: "question -> answer"}
  @ask %{program_id: "qa", inputs: %{question: "Why?"}}
  @agent %{
    id: "agent",
    signature: "question -> answer",
    program_type: "react",
    options: %{max_iters: 3},
    tools: [
      %{name: "search", description: "finds", args: %{query: %{type: "string"}, n: "int"}}
    ]
  }
  @ask_agent %{program_id: "agent", inputs: %{question: "Why?"}}

  @shared __MODULE__.Bridge

  @pool __MODULE__.Pool

  setup_all do
    start_supervised!({Bridge, real_opts(name: @shared, default_timeout: 20_000)})
    start_supervised!({Pool, real_opts(name: @pool, pool_size: 1, default_timeout: 20_000)})
    :ok
  end

  # The bridge that the tests share, with these programs alone.
  defp start(programs) do
    {:ok, _} = Bridge.call(@shared, :cleanup)
    create(@shared, programs)
  end

  defp create(bridge, programs) do
    for program <- programs, do: {:ok, _} = Bridge.call(bridge, :create_program, program)
    bridge
  end

  defp start_streaming do
    [lm: model, lm_options: options] = SilentLM.lm_opts(StreamingLM.start())
    start([Map.put(@qa, :lm, Map.put(options, :model, model))])
  end

  describe "a stream" do
    test "that outlives its timeout ends with it" do
      bridge = start_streaming()

      reader =
        Task.async(fn -> bridge |> Bridge.stream(@ask, timeout: 1500) |> Enum.to_list() end)

      assert_receive {:lm_request, lm}, 10_000
      StreamingLM.say(lm, "[[ ## answer ## ]]\nBecause ")
      assert {:error, %Error{type: :timeout}} = reader |> Task.await(10_000) |> List.last()
      assert_receive {:lm_closed, ^lm}, 10_000
    end

    test "of a list of inputs has, at the deadline, the results that are there" do
      bridge = start([@agent])
      inputs = for question <- ["quick", "slow", "quick"], do: %{question: question}
      args = %{program_id: "agent", inputs: inputs}

      search = fn %{"query" => query} ->
        if query == "slow", do: Process.sleep(:infinity), else: 1
      end

      elements =
        bridge |> Bridge.stream(args, tools: %{search: search}, timeout: 3_000) |> Enum.to_list()

      assert {:ok, %{"results" => [one, slow, two]}, _meta} = List.last(elements)
      assert %{"success" => true, "result" => %{"answer" => _}} = one
      assert %{"success" => true} = two
      assert slow["error_type"] == "timeout"
      items = for {:item, index, result} <- elements, into: %{}, do: {index, result}
      assert %{0 => {:ok, _}, 1 => {:error, %Error{type: :timeout}}, 2 => {:ok, _}} = items
    end
  end

  describe "tools" do
    test "that run at the deadline end with the run" do
      bridge = start([@agent])
      test = self()

      tool = fn _ ->
        send(test, {:tool, self()})
        Process.sleep(:infinity)
      end

      assert {:error, %Error{type: :timeout}} =
               Bridge.request(bridge, :execute_program, @ask_agent,
                 tools: %{search: tool},
                 timeout: 1_000
               )

      assert_received {:tool, pid}
      refute Process.alive?(pid)
      assert {:ok, %{"status" => "ok"}} = Bridge.call(bridge, :ping)
    end
  end
end
