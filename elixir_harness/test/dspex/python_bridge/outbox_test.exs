defmodule DSPex.PythonBridge.OutboxTest do
  use ExUnit.Case, async: true

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

  defp in_ms(ms), do: System.monotonic_time(:millisecond) + ms

  test "a request is sent with what is left of its time" do
    port = open()
    outbox = Outbox.push_request(Outbox.new(port), 1, in_ms(5_000) - 20, @body)
    assert Outbox.empty?(outbox)
    assert timeout_of_next_frame(port) in 1..4_980
    Outbox.push_request(outbox, 2, in_ms(-1), @body)
    assert timeout_of_next_frame(port) == 1
    Outbox.push_request(outbox, 3, :infinity, @body)
    assert timeout_of_next_frame(port) == nil
  end

  test "requests whose port has just died were not written: they can be taken back, in their order" do
    outbox =
      Outbox.new(dead_port())
      |> Outbox.push_request(2, in_ms(900), @body)
      |> Outbox.push_control(3, "{}")
      |> Outbox.push_request(1, :infinity, @body)

    assert Enum.all?([1, 2, 3], &Outbox.member?(outbox, &1))
    assert {[1, 2], rest} = Outbox.take_back(outbox)
    assert Outbox.member?(rest, 3) and not Outbox.member?(rest, 1)
    assert Outbox.close(Outbox.drop(outbox, 1)) == [2]
  end

  test "control frames that belong to a call can be taken back with it, if they wait" do
    port = open()
    outbox = Outbox.push_control(Outbox.new(port), 1, ~s({"id":0}), 7)
    assert_receive {^port, {:data, _frame}}, 5_000
    assert Outbox.drop_about(outbox, 7) == {0, outbox}

    outbox =
      Outbox.new(dead_port())
      |> Outbox.push_control(2, ["fo", "ur"], 7)
      |> Outbox.push_control(3, "{}", 8)
      |> Outbox.push_control(4, "four", 7)
      |> Outbox.push_control(5, "{}")

    assert {8, outbox} = Outbox.drop_about(outbox, 7)
    assert Enum.map(2..5, &Outbox.member?(outbox, &1)) == [false, true, false, true]
    assert Outbox.drop_about(outbox, 7) == {0, outbox}
  end
end
