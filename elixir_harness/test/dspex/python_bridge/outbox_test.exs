defmodule DSPex.PythonBridge.OutboxTest do
  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Outbox

  @body ~s(,"command":"ping"})

  # Sends back what it gets.
  defp open do
    Port.open({:spawn_executable, System.find_executable("cat")}, [{:packet, 4}, :binary])
  end

  defp dead_port do
    port = open()
    Port.close(port)
    port
  end

  defp timeout_of_next_frame(port) do
    assert_receive {^port, {:data, frame}}, 5_000
    JSON.decode!(frame)["timeout_ms"]
  end

  test "what had to queue is sent with what is left of its time" do
    queued = Outbox.push_request(Outbox.new(), 1, 5_000, @body)
    since = System.monotonic_time(:millisecond)
    eventually(fn -> System.monotonic_time(:millisecond) - since > 20 end)
    port = open()
    outbox = queued |> Outbox.attach(port) |> Outbox.release()
    assert Outbox.empty?(outbox)
    assert timeout_of_next_frame(port) in 1..4_980
  end

  test "a request whose port has just died keeps its time for the next, and its place" do
    outbox = Outbox.new() |> Outbox.attach(dead_port()) |> Outbox.release()
    outbox = outbox |> Outbox.push_request(1, 5_000, @body) |> Outbox.push_request(2, 900, @body)
    assert Outbox.member?(outbox, 1) and Outbox.member?(outbox, 2)

    port = open()
    outbox |> Outbox.detach() |> Outbox.attach(port) |> Outbox.release()
    assert timeout_of_next_frame(port) in 1..5_000
    assert timeout_of_next_frame(port) in 1..900
  end

  test "what had queued for a port that has died stays queued" do
    outbox = Outbox.push_request(Outbox.new(), 1, :infinity, @body)
    outbox = outbox |> Outbox.attach(dead_port()) |> Outbox.release()
    assert Outbox.member?(outbox, 1)
  end
end
