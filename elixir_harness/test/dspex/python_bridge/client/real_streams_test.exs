defmodule DSPex.PythonBridge.Client.RealStreamsTest do
  @moduledoc "Streams, tools and lists of inputs with the real peer."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error}

  @agent %{
    id: "agent",
    signature: "question -> answer",
    program_type: "react",
    options: %{max_iters: 3},
    tools: [
      %{name: "search", description: "finds", args: %{query: %{type: "string"}, n: "int"}}
    ]
  }

  setup_all do
    bridge = start_supervised!({Bridge, real_opts(name: __MODULE__.Bridge)})
    {:ok, _} = Bridge.call(bridge, :create_program, @agent, 30_000)
    %{bridge: bridge}
  end

  describe "a stream" do
    test "of a list of inputs has, at the deadline, the results that are there", %{bridge: bridge} do
      inputs = for question <- ["quick", "slow", "quick"], do: %{question: question}
      args = %{program_id: "agent", inputs: inputs}

      search = fn %{"query" => query} ->
        if query == "slow", do: Process.sleep(:infinity), else: 1
      end

      elements =
        bridge |> Bridge.stream(args, tools: %{search: search}, timeout: 6_000) |> Enum.to_list()

      assert {:ok, %{"results" => [one, slow, two]}, _meta} = List.last(elements)
      assert %{"success" => true, "result" => %{"answer" => _}} = one
      assert %{"success" => true} = two
      assert slow["error_type"] == "timeout"
      items = for {:item, index, result} <- elements, into: %{}, do: {index, result}
      assert %{0 => {:ok, _}, 1 => {:error, %Error{type: :timeout}}, 2 => {:ok, _}} = items
    end
  end

  describe "tools" do
    test "that run at the deadline end with the run", %{bridge: bridge} do
      test = self()

      tool = fn _ ->
        send(test, {:tool, self()})
        Process.sleep(:infinity)
      end

      assert {:error, %Error{type: :timeout}} =
               Bridge.request(
                 bridge,
                 :execute_program,
                 %{program_id: "agent", inputs: %{question: "Why?"}},
                 tools: %{search: tool},
                 timeout: 1_000
               )

      assert_received {:tool, pid}
      refute Process.alive?(pid)
      assert {:ok, %{"status" => "ok"}} = Bridge.call(bridge, :ping)
    end
  end
end
