defmodule DSPex.PythonBridge.Client.TracingTest do
  @moduledoc """
  `:traceparent`, from a call's options to the records that the peer logs. The header of the peer's requests to LMs is tested in
  Python.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error}

  @first "00-" <> String.duplicate("a", 32) <> "-" <> String.duplicate("1", 16) <> "-01"
  @create %{id: "qa", signature: "question -> answer"}

  defp args(question), do: %{program_id: "qa", inputs: %{question: question}}

  test "an invalid one is refused before anything is sent, by request and stream" do
    for %{"valid" => false, "value" => value} <- vectors("traceparents.json"),
        value <- [value, <<255>>, :"00-a", ~c"00"] do
      # No bridge could have answered.
      assert {:error, %Error{type: :invalid_request, message: message}} =
               Bridge.request(:nowhere, :ping, %{}, traceparent: value)

      assert message =~
               ":traceparent: expected a W3C trace context, 00-<32 hex>-<16 hex>-<2 hex> in lower case, " <>
                 "no id of zeros alone, or nil"

      assert [error: %Error{type: :invalid_request, message: ^message}] =
               Enum.to_list(Bridge.stream(:nowhere, args("one"), traceparent: value))
    end
  end

  defmodule Handler do
    @moduledoc false
    def log(%{meta: %{bridge: bridge} = meta}, %{config: %{owner: owner, bridge: bridge}}),
      do: send(owner, {:logged, meta})

    def log(_event, _config), do: :ok
  end

  @tag :tmp_dir
  test "records of the call have it as metadata, and no others", %{tmp_dir: dir, test: name} do
    File.write!(Path.join(dir, "logs.py"), """
    import dspy, logging

    class Logs(dspy.Module):
        def forward(self, question):
            logging.getLogger("my.app").warning("working")
            return dspy.Prediction(answer=question)
    """)

    config = %{owner: self(), bridge: name}
    :ok = :logger.add_handler(name, __MODULE__.Handler, %{config: config})
    on_exit(fn -> :logger.remove_handler(name) end)
    env = %{"PYTHONPATH" => dir, "DSPY_BRIDGE_ALLOW_MODULES" => "logs"}
    bridge = start_supervised!({Bridge, real_opts(name: name, env: env)})
    create = Map.put(@create, :program_type, "logs:Logs")
    {:ok, _} = Bridge.call(bridge, :create_program, create, 30_000)

    assert {:ok, _, _} =
             Bridge.request(bridge, :execute_program, args("one"), traceparent: @first)

    assert_receive {:logged, %{traceparent: @first, python_logger: "my.app"}}, 5_000
    assert {:ok, _, _} = Bridge.request(bridge, :execute_program, args("two"))
    assert_receive {:logged, %{python_logger: "my.app"} = meta}, 5_000
    refute Map.has_key?(meta, :traceparent)
  end
end
