defmodule DSPex.PythonBridge.Telemetry.PageTest do
  @moduledoc "The code of docs/telemetry.md, and its table of metrics."

  # The application of the page has `:telemetry` and others, which is global to the BEAM.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Telemetry}
  alias DSPex.Test.Telemetry, as: Host

  @support Path.expand("../../../support", __DIR__)
  @page Path.expand("../../../../../docs/telemetry.md", __DIR__)
  @external_resource @page
  @ask %{program_id: "qa", inputs: %{question: "Why?"}}

  setup do
    Host.install()
    on_exit(&Host.remove/0)
  end

  # The one block of Elixir that has a text.
  defp block(text) do
    blocks = Regex.scan(~r/^```elixir\n(.*?)^```/ms, File.read!(@page), capture: :all_but_first)
    assert [code] = for([code] <- blocks, code =~ text, do: code)
    code
  end

  defp compile(code) do
    {modules, _warnings} = Code.with_diagnostics(fn -> Code.compile_string(code, @page) end)
    on_exit(fn -> for {module, _code} <- modules, do: unload(module) end)
    for {module, _code} <- modules, do: module
  end

  defp unload(module) do
    :code.delete(module)
    :code.purge(module)
  end

  defp install(file), do: compile(File.read!(Path.join(@support, file)))

  test "attaches the default logger" do
    {:ok, _binding} = Code.eval_string(block("attach_default_logger"), [], file: @page)
    assert Telemetry.detach_default_logger() == :ok
  end

  test "has a row for each metric" do
    install("telemetry_metrics.exs")
    [_, table] = Regex.run(~r/<!-- metrics -->(.*)<!-- \/metrics -->/s, File.read!(@page))
    rows = Regex.scan(~r/^\| `([a-z_.]+)` \| (\w+) \| (.*) \|$/m, table, capture: :all_but_first)

    of_code =
      for metric <- Telemetry.metrics() do
        [
          Enum.join(metric.name, "."),
          "#{metric.kind}",
          Enum.map_join(metric.tags, ", ", &"`#{&1}`")
        ]
      end

    assert rows == of_code
  end

  test "changes the tags of metrics, and adds one of the caller's metadata" do
    install("telemetry_metrics.exs")
    [module] = compile(block("defmodule MyApp.Telemetry do"))
    assert length(module.metrics()) == length(Telemetry.metrics()) + 1
    refute Enum.any?(module.metrics(), &(:program_id in &1.tags))
    tenant = List.last(module.metrics())
    assert tenant.tag_values.(%{telemetry_metadata: %{tenant: "acme"}}) == %{tenant: "acme"}
    assert tenant.tag_values.(%{telemetry_metadata: %{}}) == %{tenant: nil}
  end

  describe "as spans of OpenTelemetry" do
    setup do
      install("opentelemetry.exs")
      [module] = compile(block("defmodule MyApp.GenAISpans do"))
      :ok = module.attach()
      %{module: module}
    end

    test "a run has its LM calls in it, with the conventions' attributes" do
      bridge = start_supervised!({Bridge, real_opts()})
      create = %{id: "qa", signature: "question -> answer"}
      {:ok, _} = Bridge.call(bridge, :create_program, create)
      {:ok, _, meta} = Bridge.request(bridge, :execute_program, @ask)
      assert_received {:span, %{name: "chat offline/echo"} = chat}
      assert_received {:span, %{name: "invoke_agent qa"} = run}
      refute_received {:span, _of_another_command}
      assert chat.parent == run.id and run.parent == nil
      assert {chat.kind, run.kind} == {:client, :internal}
      assert run.start_time <= chat.start_time and chat.start_time <= chat.end_time
      assert chat.end_time <= run.end_time

      %{"prompt_tokens" => input, "completion_tokens" => output} =
        meta["lm_usage"]["offline/echo"]

      usage = %{"gen_ai.usage.input_tokens" => input, "gen_ai.usage.output_tokens" => output}

      assert chat.attributes ==
               Map.merge(usage, %{
                 "gen_ai.operation.name" => "chat",
                 "gen_ai.provider.name" => "offline",
                 "gen_ai.request.model" => "echo",
                 "gen_ai.response.finish_reasons" => ["stop"]
               })

      assert run.attributes ==
               Map.merge(usage, %{
                 "gen_ai.operation.name" => "invoke_agent",
                 "gen_ai.agent.name" => "qa"
               })
    end

    test "what fails has its error, and what is known", %{module: module} do
      assert {:error, _} = Bridge.call(:nobody, :execute_program, @ask)
      assert_received {:span, %{error: "bridge_not_running", attributes: attributes}}

      assert attributes == %{
               "gen_ai.operation.name" => "invoke_agent",
               "gen_ai.agent.name" => "qa",
               "error.type" => "bridge_not_running"
             }

      measured = %{input_tokens: 0, output_tokens: 0}
      call = %{model: "own", finish_reason: nil, error_type: "LMTimeoutError"}
      attributes = module.attributes([:dspex, :lm, :stop], measured, call)
      assert %{"gen_ai.request.model" => "own", "error.type" => "LMTimeoutError"} = attributes
      refute Map.has_key?(attributes, "gen_ai.provider.name")
      refute Map.has_key?(attributes, "gen_ai.response.finish_reasons")
      exception = [:dspex, :pool, :call, :exception]

      assert %{"error.type" => "exception"} =
               module.attributes(exception, %{}, %{program_id: "qa"})
    end
  end
end
