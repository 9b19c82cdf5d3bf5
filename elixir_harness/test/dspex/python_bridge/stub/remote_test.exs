defmodule DSPex.PythonBridge.Stub.RemoteTest do
  # It makes this a distributed node.
  use ExUnit.Case, async: false

  alias DSPex.PythonBridge.{Bridge, Error, Stub}
  alias DSPex.Test.{Helpers, Nodes}

  test "a stub answers another node, with the answers that are anyone's" do
    Nodes.distribute()
    node = Nodes.start()

    answers = fn
      "slow", _inputs ->
        Process.sleep(:infinity)

      "qa", %{"n" => n} ->
        {:ok, count} = Stub.call_tool("count", %{a: 1, b: 2})
        Stub.chunk("answer", "here")
        {:ok, %{"answer" => "here", "sum" => n + count}}
    end

    start_supervised!({Stub, name: __MODULE__.Stub, answers: answers})
    far = {__MODULE__.Stub, node()}
    args = &%{program_id: &1, inputs: %{n: 1}}
    opts = [tools: %{count: &:erlang.map_size/1}, on_chunk: &:erlang.is_map/1]

    assert {:ok, %{"answer" => "here", "sum" => 3}, %{"lm_calls" => 0}} =
             Nodes.on(node, Bridge, :request, [far, :execute_program, args.("qa"), opts])

    assert {:error, %Error{type: :timeout}} =
             Nodes.on(node, Bridge, :request, [
               far,
               :execute_program,
               args.("slow"),
               [timeout: 100]
             ])

    Helpers.eventually(fn -> Nodes.on(node, Bridge, :get_status, [far]).pending == 0 end)
  end
end
