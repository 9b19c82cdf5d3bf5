defmodule DSPex.PythonBridge.Telemetry.RunsTest do
  @moduledoc "What the events of a run have of its LM calls, and what is asked of the peer for that."

  # Whether the application has `:telemetry` is global to the BEAM.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import DSPex.Test.Telemetry, only: [events: 0]

  alias DSPex.PythonBridge.{Bridge, Telemetry}
  alias DSPex.Test.FakePeer
  alias DSPex.Test.Telemetry, as: Host

  @compile {:no_warn_undefined, :telemetry}

  doctest Telemetry.Usage

  @start [:bridge, :call, :start]
  @stop [:bridge, :call, :stop]
  @exception [:bridge, :call, :exception]
  @lm [:lm, :stop]
  @ask %{program_id: "qa", inputs: %{question: "the contents"}}

  setup do
    Host.install()
    on_exit(&Host.remove/0)
  end

  defp start_fake do
    opts = :plays |> FakePeer.opts() |> Keyword.put(:name, :observed)
    start_supervised!({Bridge, opts})
    :observed
  end

  defp play(steps), do: %{program_id: "p", play: steps}

  defp create(id, more \\ %{}),
    do: Map.merge(%{id: id, signature: "question -> answer"}, more)

  defp of(event), do: for({^event, measured, metadata} <- events(), do: {measured, metadata})

  describe "the end of a run" do
    test "has its tokens, LM calls and cache hits, its models and the type of its program" do
      Host.attach([@stop])
      start_supervised!({Bridge, Keyword.put(real_opts(), :name, :observed)})
      cot = create("cot", %{program_type: :chain_of_thought})

      for create <- [create("qa"), cot],
          do: {:ok, _} = Bridge.call(:observed, :create_program, create)

      for {measured, metadata} <- of(@stop) do
        assert %{command: "create_program", result: :ok} = metadata
        refute Map.has_key?(metadata, :models)
        assert Enum.sort(Map.keys(measured)) == [:duration, :monotonic_time]
      end

      assert {:ok, _, meta} = Bridge.request(:observed, :execute_program, @ask)
      assert %{"offline/echo" => usage} = meta["lm_usage"]
      assert [{measured, metadata}] = of(@stop)
      assert measured.input_tokens == usage["prompt_tokens"] and measured.input_tokens > 0
      assert measured.output_tokens == usage["completion_tokens"] and measured.output_tokens > 0
      assert %{lm_calls: 1, cache_hits: 0} = measured

      assert %{program_id: "qa", program_type: "predict", models: ["offline/echo"], result: :ok} =
               metadata

      # `call` does not get the metadata of its reply; the event does. A list of inputs is one run.
      batch = %{program_id: "cot", inputs: List.duplicate(@ask.inputs, 3)}
      assert {:ok, %{"results" => [_, _, _]}} = Bridge.call(:observed, "execute_program", batch)
      assert [{%{lm_calls: 3}, %{program_type: "chain_of_thought"}}] = of(@stop)

      assert {:ok, _, _} = :observed |> Bridge.stream(@ask) |> Enum.at(-1)

      assert [{%{lm_calls: 1, input_tokens: _}, %{program_type: "predict"} = metadata}] =
               of(@stop)

      refute inspect(metadata) =~ "the contents"
    end

    test "sums over the models, also of an error; without a reply nothing is known" do
      Host.attach([@stop])
      bridge = start_fake()

      meta = %{
        "lm_calls" => 4,
        "cache_hits" => 1,
        "lm_usage" => %{
          "openai/b" => %{"prompt_tokens" => 10, "completion_tokens" => 5},
          "openai/a" => %{"prompt_tokens" => 1, "completion_tokens" => nil},
          "mine" => "not counted"
        }
      }

      wanted = %{input_tokens: 11, output_tokens: 5, lm_calls: 4, cache_hits: 1, wait_ms: 0}
      failed = play([["fail", "output_invalid", meta]])
      assert {:error, "no"} = Bridge.call(bridge, :execute_program, failed)
      assert [{measured, metadata}] = of(@stop)
      assert Map.take(measured, Map.keys(wanted)) == wanted
      assert %{result: :output_invalid, models: ["mine", "openai/a", "openai/b"]} = metadata
      # This bridge has not created it.
      assert metadata.program_type == nil

      assert {:error, :timeout} = Bridge.call(bridge, :execute_program, play([]), 20)
      assert [{measured, %{result: :timeout, models: [], program_type: nil}}] = of(@stop)
      assert Enum.sort(Map.keys(measured)) == [:duration, :monotonic_time]

      assert [_] = Enum.take(Bridge.stream(bridge, play([["count", 2], ["reply"]])), 1)
      assert [{_, %{result: :cancelled, models: []}}] = of(@stop)

      assert {:error, :bridge_not_running} = Bridge.call({1, 2}, :execute_program, @ask)
      assert [{_, %{result: :bridge_not_running, program_type: nil}}] = of(@stop)
    end

    test "is asked of the peer only if there is a handler, and only of runs" do
      bridge = start_fake()
      asked = fn -> Bridge.call(bridge, :execute_program, play([["asked"]])) end
      assert asked.() == {:ok, []}
      streamed = fn -> Enum.at(Bridge.stream(bridge, play([["asked"]])), -1) end
      assert {:ok, ["stream", "meta"], _} = streamed.()

      # Of other events.
      Host.attach([@start, @exception, [:pool, :checkout]])
      assert asked.() == {:ok, []}
      :telemetry.detach(self())

      Host.attach([@stop])
      assert asked.() == {:ok, ["meta"]}
      assert {:ok, %{"heard" => _} = heard} = Bridge.call(bridge, :heard)
      refute Map.has_key?(heard, "meta")
      :telemetry.detach(self())

      Host.attach([@lm])
      assert asked.() == {:ok, ["meta", "lm_events"]}
      assert {:ok, ["stream", "meta", "lm_events"], _} = streamed.()
      chunks = [on_chunk: fn _chunk -> :ok end]

      assert {:ok, ["stream", "meta", "lm_events"], _} =
               Bridge.request(bridge, :execute_program, play([["asked"]]), chunks)
    end
  end

  describe "[:lm, :stop]" do
    test "has the model, tokens and times of each LM call, before the end of its run" do
      Host.attach([@start, @stop, @lm])
      start_supervised!({Bridge, Keyword.put(real_opts(), :name, :observed)})
      {:ok, _} = Bridge.call(:observed, :create_program, create("qa"))
      events()
      opts = [telemetry_metadata: %{tenant: "acme"}]
      before = System.monotonic_time()
      assert {:ok, _, meta} = Bridge.request(:observed, :execute_program, @ask, opts)
      # It is not the caller's who has not asked for it.
      refute Map.has_key?(meta, "lm_events")

      assert [{@start, _, start}, {@lm, measured, metadata}, {@stop, whole, _}] = events()
      assert %{"offline/echo" => usage} = meta["lm_usage"]
      assert measured.input_tokens == usage["prompt_tokens"]
      assert measured.output_tokens == usage["completion_tokens"]
      assert measured.duration in 1..whole.duration
      # It ended within its run.
      assert (measured.monotonic_time - measured.duration) in before..whole.monotonic_time
      assert measured.monotonic_time <= whole.monotonic_time

      of_call = %{
        model: "offline/echo",
        cached: false,
        result: :ok,
        error_type: nil,
        finish_reason: "stop"
      }

      assert metadata == Map.merge(start, of_call)
      assert metadata.telemetry_metadata == %{tenant: "acme"}
      refute inspect({measured, metadata}) =~ "the contents"

      # One for each input of a list, and in a stream.
      batch = %{program_id: "qa", inputs: List.duplicate(@ask.inputs, 3)}
      assert {:ok, _} = Bridge.call(:observed, :execute_program, batch)
      assert [_, _, _] = of(@lm)
      assert {:ok, _, meta} = :observed |> Bridge.stream(@ask) |> Enum.at(-1)
      refute Map.has_key?(meta, "lm_events")
      assert [{_, %{program_id: "qa"}}] = of(@lm)
      assert {:ok, _, _} = Bridge.request(:observed, :ping)
      assert of(@lm) == []
    end
  end

  describe "telemetry_metadata" do
    test "is in the events of the call, under its own name, and is not sent" do
      Host.attach([@start, @stop, @exception])
      bridge = start_fake()
      mine = %{tenant: "acme", command: "mine"}
      opts = [telemetry_metadata: mine]

      assert {:ok, ["meta"], _} =
               Bridge.request(bridge, :execute_program, play([["asked"]]), opts)

      assert {:ok, _, _} = Bridge.request(bridge, :heard, %{}, opts)
      assert {:ok, _, _} = bridge |> Bridge.stream(play([["reply"]]), opts) |> Enum.at(-1)

      assert [{@start, _, _}, {@stop, _, _} | _] = events = events()
      assert length(events) == 6

      for {_event, _measured, metadata} <- events do
        assert metadata.telemetry_metadata == mine
        assert metadata.command in ["execute_program", "heard"]
      end

      # The same keys without it.
      assert {:ok, _} = Bridge.call(bridge, :heard)
      assert [{_, _, %{telemetry_metadata: none}}, {_, _, %{telemetry_metadata: none}}] = events()
      assert none == %{}
    end
  end
end
