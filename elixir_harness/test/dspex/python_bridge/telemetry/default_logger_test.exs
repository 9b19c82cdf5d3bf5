defmodule DSPex.PythonBridge.Telemetry.DefaultLoggerTest do
  @moduledoc "What the default logger writes, and what it does not."

  # Whether the application has `:telemetry` is global to the BEAM.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers
  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.{Bridge, Pool, Telemetry}
  alias DSPex.Test.FakePeer
  alias DSPex.Test.Telemetry, as: Host

  setup do
    Host.install()
    on_exit(&Host.remove/0)
  end

  defp start(kind) do
    start_supervised!({Bridge, kind |> FakePeer.opts() |> Keyword.put(:name, :observed)})
    :observed
  end

  defp run(bridge, steps, id \\ "qa", timeout \\ 5_000),
    do: Bridge.call(bridge, :execute_program, %{program_id: id, play: steps}, timeout)

  # Logger's formatters are other tests' business.
  defp lines(fun),
    do: capture_log([format: "$level|$message|$metadata\n", metadata: [:bridge, :pool]], fun)

  test "logs a failed call with its program, outcome and tokens, and no contents" do
    bridge = start(:plays)
    assert Telemetry.attach_default_logger() == :ok
    usage = %{"openai/x" => %{"prompt_tokens" => 11, "completion_tokens" => 7}}
    meta = %{"lm_calls" => 2, "lm_usage" => usage, "cache_hits" => 0}

    logged = lines(fn -> run(bridge, [["fail", "output_invalid", meta]]) end)
    assert [_, ms] = Regex.run(~r/output_invalid after (\d+) ms/, logged)

    assert logged ==
             "warning|bridge :observed: execute_program of qa: output_invalid after #{ms} ms, " <>
               "LM calls: 2, tokens: 11 + 7|bridge=observed \n"

    # Names of callers are on one line, and short.
    long = "a\nb" <> String.duplicate("x", 1_000)
    assert [logged] = String.split(lines(fn -> run(bridge, [], long, 5) end), "\n", trim: true)
    assert logged =~ ~S(execute_program of a\nbxxx) and logged =~ "timeout after"
    assert String.length(logged) < 200
    logged = lines(fn -> Pool.call(:no_pool, :ping) end)

    assert logged =~
             ~r/^warning\|pool :no_pool: ping: bridge_not_running after \d+ ms\|pool=no_pool/
  end

  test "logs a slow call; how slow and the level are options" do
    bridge = start(:plays)
    assert Telemetry.attach_default_logger(min_duration: 0, level: :error) == :ok
    assert Telemetry.attach_default_logger(:info) == {:error, :already_exists}
    logged = lines(fn -> run(bridge, [["reply"]]) end)
    assert logged =~ ~r/^error\|bridge :observed: execute_program of qa: ok after \d+ ms\|/

    assert Telemetry.detach_default_logger() == :ok
    assert Telemetry.detach_default_logger() == {:error, :not_found}
    assert lines(fn -> run(bridge, [["fail", "lm_error"]]) end) == ""

    # A level alone, as of Oban's.
    assert Telemetry.attach_default_logger(:critical) == :ok
    assert lines(fn -> run(bridge, [["fail", "lm_error"]]) end) =~ "critical|bridge :observed"
  end

  test "logs calls that are sent again" do
    bridge = start(:silent)
    eventually(fn -> Bridge.get_status(bridge).state == :running end)
    assert Telemetry.attach_default_logger() == :ok

    logged =
      lines(fn ->
        calls = for _ <- 1..2, do: Task.async(fn -> Bridge.call(bridge, :ping, %{}, 2_000) end)
        eventually(fn -> Bridge.get_status(bridge).pending == 2 end)
        FakePeer.kill(bridge)
        Task.await_many(calls)
      end)

    assert logged =~ "warning|bridge :observed: calls sent again: 2 (died)|bridge=observed"
  end

  test "wrong options are refused by name" do
    for {opts, text} <- [
          {:loud, ":level: expected a level of Logger"},
          {[min_duration: -1], ":min_duration: expected a number of ms"}
        ] do
      error = assert_raise ArgumentError, fn -> Telemetry.attach_default_logger(opts) end
      assert error.message =~ text
    end
  end

  test "an application without :telemetry is told what to add" do
    Host.remove()
    error = assert_raise RuntimeError, fn -> Telemetry.attach_default_logger() end
    assert error.message =~ "attach_default_logger/1 needs :telemetry: add {:telemetry"
    assert Telemetry.detach_default_logger() == {:error, :not_found}
  end
end
