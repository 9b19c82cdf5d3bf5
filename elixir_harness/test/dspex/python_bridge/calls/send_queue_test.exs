defmodule DSPex.PythonBridge.Calls.SendQueueTest do
  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Calls.SendQueue

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

  defp in_ms(ms), do: System.monotonic_time(:millisecond) + ms

  test "a request is sent with what is left of its time" do
    port = open()
    send_queue = SendQueue.push_request(SendQueue.new(port), 1, in_ms(5_000) - 20, @body)
    assert timeout_of_next_frame(port) in 1..4_980
    SendQueue.push_request(send_queue, 2, in_ms(-1), @body)
    assert timeout_of_next_frame(port) == 1
    SendQueue.push_request(send_queue, 3, :infinity, @body)
    assert timeout_of_next_frame(port) == nil
  end

  test "requests whose port has just died were not written: they can be taken back, in their order" do
    send_queue =
      SendQueue.new(dead_port())
      |> SendQueue.push_request(2, in_ms(900), @body)
      |> SendQueue.push_control(3, "{}")
      |> SendQueue.push_request(1, :infinity, @body)

    assert Enum.all?([1, 2, 3], &SendQueue.drop(send_queue, &1))
    assert {[1, 2], rest} = SendQueue.take_back(send_queue)
    assert SendQueue.drop(rest, 3) != nil and SendQueue.drop(rest, 1) == nil
    assert SendQueue.close(SendQueue.drop(send_queue, 1)) == [2]
  end
end
