defmodule DSPex.PythonBridge.Client.TracingTest do
  @moduledoc "`:traceparent`, from a call's options to the HTTP requests of the peer's LM calls and to Logger."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Error}
  alias DSPex.Test.Loopback

  @first "00-" <> String.duplicate("a", 32) <> "-" <> String.duplicate("1", 16) <> "-01"
  @second "00-" <> String.duplicate("b", 32) <> "-" <> String.duplicate("2", 16) <> "-00"
  @create %{id: "qa", signature: "question -> answer"}

  # An LM that sends its owner each request, {:asked, lm, question, traceparents}, and answers it when
  # it is sent :answer: send(lm, :answer).
  defp start_lm do
    port = Loopback.start(&serve(&1, &2, ""))

    [
      lm: "openai/stub",
      lm_options: %{api_base: "http://127.0.0.1:#{port}/v1", api_key: "not-a-key", cache: false}
    ]
  end

  defp serve(socket, owner, read) do
    with {:ok, data} <- :gen_tcp.recv(socket, 0) do
      read = read <> data

      with [head, body] <- String.split(read, "\r\n\r\n", parts: 2),
           [_, length] <- Regex.run(~r/content-length: (\d+)/i, head),
           true <- byte_size(body) >= String.to_integer(length) do
        traces = for [_, value] <- Regex.scan(~r/^traceparent: (.*?)\r?$/im, head), do: value
        [_, question] = Regex.run(~r/\[\[ ## question ## \]\]\\n(\w+)/, body)
        send(owner, {:asked, self(), question, traces})
        stream? = JSON.decode!(body)["stream"] == true

        receive do
          :answer -> :gen_tcp.send(socket, answer(stream?))
        end

        serve(socket, owner, "")
      else
        _part -> serve(socket, owner, read)
      end
    end
  end

  defp answer(stream?) do
    {key, type} =
      if stream?,
        do: {:delta, "text/event-stream"},
        else: {:message, "application/json"}

    said = %{role: "assistant", content: "[[ ## answer ## ]]\nParis"}
    choice = %{:index => 0, :finish_reason => "stop", key => said}
    reply = JSON.encode!(%{id: "c", object: "chat", created: 0, model: "stub", choices: [choice]})
    body = if stream?, do: "data: #{reply}\n\ndata: [DONE]\n\n", else: reply

    "HTTP/1.1 200 OK\r\ncontent-type: #{type}\r\ncontent-length: #{byte_size(body)}\r\n\r\n#{body}"
  end

  defp start(opts) do
    bridge = start_supervised!({Bridge, real_opts(opts)})
    {:ok, _} = Bridge.call(bridge, :create_program, @create, 30_000)
    bridge
  end

  defp args(question), do: %{program_id: "qa", inputs: %{question: question}}

  defp ask(bridge, question, opts),
    do: Task.async(fn -> Bridge.request(bridge, :execute_program, args(question), opts) end)

  test "each call's is a header of its LM's request, of calls at the same time, and of none without" do
    bridge = start(start_lm())

    calls = [
      ask(bridge, "one", traceparent: @first),
      ask(bridge, "two", traceparent: @second),
      ask(bridge, "none", []),
      ask(bridge, "nil", traceparent: nil)
    ]

    for {question, traces} <- [
          {"one", [@first]},
          {"two", [@second]},
          {"none", []},
          {"nil", []}
        ] do
      assert_receive {:asked, lm, ^question, ^traces}, 30_000
      send(self(), {:held, lm})
    end

    for _ <- calls do
      assert_received {:held, lm}
      send(lm, :answer)
    end

    for call <- calls, do: assert({:ok, %{"answer" => "Paris"}, _meta} = Task.await(call, 30_000))
  end

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
  test "records that Python logs for the call have it as metadata, and no others",
       %{tmp_dir: dir, test: name} do
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

    assert {:ok, _, _} = Task.await(ask(bridge, "one", traceparent: @first))
    assert_receive {:logged, %{traceparent: @first, python_logger: "my.app"}}, 5_000
    assert {:ok, _, _} = Task.await(ask(bridge, "two", []))
    assert_receive {:logged, %{python_logger: "my.app"} = meta}, 5_000
    refute Map.has_key?(meta, :traceparent)
  end
end
