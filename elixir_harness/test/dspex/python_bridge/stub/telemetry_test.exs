defmodule DSPex.PythonBridge.Stub.TelemetryTest do
  # The stand-in of :telemetry is the whole system's.
  use ExUnit.Case, async: false

  alias DSPex.PythonBridge.{Bridge, Pool, Stub}
  alias DSPex.Test.Telemetry

  setup do
    Telemetry.install()
    on_exit(&Telemetry.remove/0)
    Telemetry.attach()
  end

  test "the calls of a stub emit the events of a bridge's and a pool's" do
    start_supervised!({Stub, name: __MODULE__.Stub, answers: fn _, _ -> {:error, :timeout} end})
    args = %{program_id: "qa", inputs: %{}}
    Bridge.call(__MODULE__.Stub, :execute_program, args)
    assert_receive {[:bridge, :call, :start], _, %{bridge: __MODULE__.Stub, program_id: "qa"}}
    assert_receive {[:bridge, :call, :stop], %{duration: _}, %{result: :timeout, pool: nil}}
    Pool.call(__MODULE__.Stub, :execute_program, args)
    assert_receive {[:pool, :call, :start], _, %{pool: __MODULE__.Stub}}
    assert_receive {[:pool, :call, :stop], %{duration: _}, %{result: :timeout}}
  end
end
