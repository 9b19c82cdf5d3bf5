defmodule DSPex.PythonBridge.Telemetry.RunSpanTest do
  @moduledoc "The events of evaluations, and their state while they are under way."

  # Whether the application has `:telemetry` is global to the BEAM.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import DSPex.Test.Telemetry, only: [events: 0]

  alias DSPex.PythonBridge.{Bridge, Error, Evaluate}
  alias DSPex.PythonBridge.Telemetry.RunSpan
  alias DSPex.Test.Telemetry, as: Host

  @start [:evaluate, :start]
  @progress [:evaluate, :progress]
  @stop [:evaluate, :stop]
  @exception [:evaluate, :exception]
  @events [@start, @progress, @stop, @exception]
  @secret "the contents"
  @examples for n <- 1..6, do: {%{question: "q#{n} #{@secret}"}, %{answer: "a", note: @secret}}
  @by_number {__MODULE__, :by_number}

  def by_number(%{"question" => "q" <> question}, _prediction),
    do: String.to_integer(hd(String.split(question))) / 4

  setup do
    Host.install()
    on_exit(&Host.remove/0)
    Host.attach(@events)
  end

  defp start_bridge(name) do
    script = %{model: "offline/script", answers: %{"*" => %{answer: @secret}}}
    start_supervised!({Bridge, Keyword.put(real_opts(lm: script), :name, name)})
    qa = %{id: "qa", signature: "question -> answer"}
    {:ok, _} = Bridge.call(name, :create_program, qa, 60_000)
    name
  end

  defp evaluate(server, examples, opts \\ []) do
    {module, function} = @by_number
    opts = Keyword.merge([metric: Function.capture(module, function, 2)], opts)
    Evaluate.run(server, "qa", examples, opts)
  end

  describe "the events of an evaluation" do
    test "are a span with its progress, its last figures at the end, and no contents" do
      bridge = start_bridge(:observed)
      examples = @examples ++ [{%{wrong: @secret}, nil}]
      before = System.monotonic_time()

      opts = [max_concurrency: 1, telemetry_metadata: %{tenant: "acme"}]
      assert {:ok, result} = evaluate(bridge, examples, opts)

      assert [{@start, began, start} | rest] = all = events()
      assert %{total: 7, monotonic_time: monotonic, system_time: _} = began
      assert monotonic >= before and map_size(began) == 3

      assert %{bridge: :observed, pool: nil, program_id: "qa", telemetry_span_context: ref} =
               start

      assert start.telemetry_metadata == %{tenant: "acme"} and is_reference(ref)
      assert map_size(start) == 5

      assert {progress, [{@stop, ended, stop}]} = Enum.split(rest, -1)

      assert for({@progress, measured, ^start} <- progress, do: measured.done) ==
               Enum.to_list(1..7)

      {_, second, _} = Enum.at(progress, 1)
      assert {second.total, second.failed, second.score, second.lm_calls} == {7, 0, 0.375, 2}
      assert stop == Map.put(start, :result, :ok)
      assert ended.duration == ended.monotonic_time - monotonic and ended.duration > 0
      assert {ended.done, ended.total, ended.failed} == {7, 7, 1}
      assert_in_delta ended.score, result.score, 1.0e-12
      assert {ended.lm_calls, ended.cache_hits} == {6, 0}
      assert ended.input_tokens > 0
      refute inspect(all) =~ @secret
    end

    test "end with :stop and the type of an error, and what was measured before" do
      bridge = start_bridge(:observed)

      fails = fn
        %{"question" => "q4" <> _}, _ -> raise @secret
        _, _ -> 1
      end

      assert {:error, %Error{type: :tool_error}} =
               evaluate(bridge, @examples, metric: fails, max_concurrency: 1)

      assert [{@start, _, _} | rest] = all = events()
      assert {@stop, %{done: 3, failed: 0, score: 1.0, lm_calls: 3}, stop} = List.last(rest)
      assert stop.result == :tool_error
      refute inspect(all) =~ @secret
      assert {:error, %Error{type: :bridge_not_running}} = evaluate(:nobody, @examples)
      assert [{@start, _, %{bridge: :nobody}}, {@stop, _, stop}] = events()
      assert stop.result == :bridge_not_running
    end

    test "end with :exception if the caller's code raises" do
      bridge = start_bridge(:observed)
      raises = fn _ -> raise ArgumentError, @secret end
      assert_raise ArgumentError, fn -> evaluate(bridge, @examples, on_result: raises) end
      assert [{@start, _, start}, {@progress, %{done: done}, _}, last] = all = events()
      assert {@exception, %{duration: _, done: ^done, lm_calls: _}, exception} = last
      assert %{kind: :error, reason: ArgumentError, stacktrace: [_ | _]} = exception
      assert Map.drop(exception, [:kind, :reason, :stacktrace]) == start
      refute inspect(all) =~ @secret
    end
  end

  test "the state of a run is known from its beginning, changes with its figures, and goes with its end" do
    test = self()
    about = %{program_id: "qa", telemetry_metadata: %{}}
    mine = fn -> Enum.filter(RunSpan.list(), &(&1.caller == test)) end
    figures = %{done: 0, total: 20, score: nil}

    {:ok, :result} =
      RunSpan.run(:optimize, :nobody, about, figures, fn run ->
        assert [%{kind: :optimize, figures: ^figures} = found] = mine.()
        assert %{bridge: :nobody, program_id: "qa"} = found.metadata
        assert found.elapsed_ms >= 0
        RunSpan.progress(run, %{done: 7, score: 0.5})
        assert [%{figures: %{done: 7, score: 0.5}}] = mine.()
        RunSpan.update(run, %{done: 9})
        assert [%{figures: %{done: 9}}] = mine.()
        {:ok, :result}
      end)

    assert mine.() == []
  end
end
