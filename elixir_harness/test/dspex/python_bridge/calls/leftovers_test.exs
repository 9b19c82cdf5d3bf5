defmodule DSPex.PythonBridge.Calls.LeftoversTest do
  @moduledoc "What is over leaves nothing behind in a bridge's process: no entry, no monitor, no timer."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Calls, Options, Programs}
  alias DSPex.PythonBridge.Calls.{Handover, InFlight, Request}

  describe "a call leaves nothing of itself" do
    setup do
      {:ok, options} = Options.new(max_retries: 0)
      args = ["-c", "cat > /dev/null 2> /dev/null; :"]
      port = Port.open({:spawn_executable, "/bin/sh"}, [{:packet, 4}, args: args])
      in_flight = InFlight.new(options, Programs.Store.new()) |> Handover.attach(port)
      %{in_flight: Handover.serve(in_flight, port), held: in_flight, port: port}
    end

    @create {:create, "p", nil}

    # One whose caller lives for as long as the test, and a cast.
    defp accept(in_flight, change \\ nil) do
      caller = spawn_link(fn -> Process.sleep(:infinity) end)
      call = make_ref()
      cast = %Request{timeout: 600_000, body: "body", change: change}

      in_flight =
        in_flight
        |> Calls.accept(%{cast | ref: call, pid: caller, timeout: :infinity})
        |> Calls.accept(cast)

      assert monitors() == [process: caller]
      {call, timers(in_flight), in_flight}
    end

    defp timers(in_flight),
      do: for({_id, %{watch: {:timer, timer}}} <- in_flight.calls.by_id, do: timer)

    defp monitors, do: Process.info(self(), :monitors) |> elem(1)

    defp nothing_left({_call, timers, _before}, in_flight) do
      assert in_flight.calls == Calls.Table.new()
      assert :gb_sets.is_empty(in_flight.held)
      assert :gb_sets.is_empty(in_flight.suspects.waiting)
      assert monitors() == []
      # Cancelled without waiting for it.
      for timer <- timers, do: eventually(fn -> Process.read_timer(timer) == false end)
    end

    test "when it is answered", %{in_flight: in_flight, port: port} do
      accepted = {_call, _timers, in_flight} = accept(in_flight, @create)
      {:ok, in_flight} = Calls.deliver(in_flight, port, 1, "reply")
      {:ok, in_flight} = Calls.deliver(in_flight, port, 2, "reply")
      nothing_left(accepted, in_flight)
    end

    test "when its caller's time is over and the caller lives on", %{in_flight: in_flight} do
      accepted = {call, _timers, in_flight} = accept(in_flight)
      nothing_left(accepted, in_flight |> Calls.abandon(call) |> Calls.abandon(2))
    end

    test "nor when the peer acknowledges its change later", %{in_flight: in_flight, port: port} do
      accepted = {call, _timers, in_flight} = accept(in_flight, @create)
      in_flight = in_flight |> Calls.abandon(call) |> Calls.abandon(2)
      {:ok, in_flight} = Calls.deliver(in_flight, port, 1, "reply")
      {:ok, in_flight} = Calls.deliver(in_flight, port, 2, "reply")
      nothing_left(accepted, in_flight)
    end

    test "nor when that peer dies first", %{in_flight: in_flight, port: port} do
      accepted = {call, _timers, in_flight} = accept(in_flight, @create)
      in_flight = in_flight |> Calls.abandon(call) |> Calls.abandon(2)
      nothing_left(accepted, Handover.lost(in_flight, port, :died))
    end

    test "when it is given up before it was sent", %{held: in_flight} do
      accepted = {call, _timers, in_flight} = accept(in_flight)
      nothing_left(accepted, in_flight |> Calls.abandon(call) |> Calls.abandon(2))
    end

    test "when it fails with its peer", %{in_flight: in_flight, port: port} do
      accepted = {_call, _timers, in_flight} = accept(in_flight, @create)
      nothing_left(accepted, Handover.lost(in_flight, port, :died))
    end

    test "when the bridge ends", %{held: in_flight} do
      accepted = {_call, _timers, in_flight} = accept(in_flight)
      nothing_left(accepted, InFlight.fail_all(in_flight, :bridge_not_running, :all))
    end
  end

  describe "in a bridge" do
    @describetag :tmp_dir

    # These are internal; a caller would see them only much later, as a crash or as memory.
    defp state(bridge), do: :sys.get_state(bridge)

    test "a caller that lives on is not monitored any longer after a timeout" do
      bridge = start_supervised!({Bridge, fake_opts("silent")})
      eventually(fn -> Bridge.get_status(bridge).state == :running end, 20_000)
      for _ <- 1..3, do: assert(Bridge.call(bridge, :echo, %{}, 1) == {:error, :timeout})
      # Its answer comes after all that was sent before.
      assert %{pending: 0} = Bridge.get_status(bridge)
      {:monitored_by, watchers} = Process.info(self(), :monitored_by)
      refute bridge in watchers
      assert state(bridge).in_flight.calls == Calls.Table.new()
    end

    test "a peer that serves has no timer: after its start, a restart, a restart that failed",
         %{tmp_dir: dir} do
      file = Path.join(dir, "there")
      File.write!(file, "")
      opts = fake_opts("needs_a_file", env: %{"FAKE_FILE" => file}, start_timeout: 60_000)
      bridge = start_supervised!({Bridge, opts})
      args = %{id: "p", signature: "q -> a"}
      assert {:ok, _} = Bridge.call(bridge, :create_program, args, 20_000)
      assert %{timer: nil, next: nil} = state(bridge)
      # Given its programs.
      assert Bridge.restart(bridge) == :ok
      assert %{timer: nil, next: nil} = state(bridge)
      File.rm!(file)
      assert {:error, _text} = Bridge.restart(bridge)
      assert %{timer: nil, next: nil} = state(bridge)
    end
  end
end
