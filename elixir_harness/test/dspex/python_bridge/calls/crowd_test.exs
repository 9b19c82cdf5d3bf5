defmodule DSPex.PythonBridge.Calls.CrowdTest do
  @moduledoc """
  Tens of thousands of calls at once, and what happens to their peer meanwhile. The work for each of them
  must not depend on how many there are: where it does, these tests take minutes instead of a second.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Calls, Options, Programs}
  alias DSPex.PythonBridge.Calls.{Dispatcher, Handover, InFlight, Request}

  @moduletag timeout: 30_000

  describe "played through" do
    @count 30_000

    # A peer that reads everything and answers nothing by itself.
    defp attach(in_flight) do
      args = ["-c", "cat > /dev/null 2> /dev/null; :"]
      port = Port.open({:spawn_executable, "/bin/sh"}, [{:packet, 4}, args: args])
      {port, Handover.attach(in_flight, port)}
    end

    # A peer that has all the calls, and the next one.
    defp crowd(max_retries) do
      {:ok, options} = Options.new(max_retries: max_retries)
      {port, in_flight} = attach(InFlight.new(options, Programs.Store.new()))

      in_flight =
        each(Handover.serve(in_flight, port), fn _, in_flight ->
          request = %Request{ref: make_ref(), pid: self(), body: "body"}
          Calls.accept(in_flight, request)
        end)

      {next, in_flight} = attach(written(in_flight))
      {port, next, in_flight}
    end

    # A call that still waits to be written would be taken back.
    defp written(in_flight) do
      if Dispatcher.all_written?(in_flight) do
        in_flight
      else
        assert_receive {:DOWN, monitor, :process, _pid, _reason}, 10_000
        written(Dispatcher.written(in_flight, monitor))
      end
    end

    defp each(in_flight, fun), do: Enum.reduce(1..@count, in_flight, fun)

    # A failed assertion would show all of it.
    defp busy?(in_flight, port, wanted), do: true = Dispatcher.busy?(in_flight, port) == wanted

    test "after each reply it is known whether an old peer has more to answer" do
      {old, next, in_flight} = crowd(3)

      in_flight =
        in_flight
        |> Handover.serve(next)
        |> each(fn id, in_flight ->
          busy?(in_flight, old, true)
          {:ok, in_flight} = Calls.deliver(in_flight, old, id, "reply")
          in_flight
        end)

      busy?(in_flight, old, false)
    end

    test "so it is after each call that is given up" do
      {old, next, in_flight} = crowd(3)

      in_flight =
        in_flight
        |> Handover.serve(next)
        |> each(fn id, in_flight ->
          busy?(in_flight, old, true)
          Calls.abandon(in_flight, id)
        end)

      busy?(in_flight, old, false)
    end

    test "after a death suspects are sent to the next peer alone, and all are answered" do
      {dead, next, in_flight} = crowd(1)

      in_flight =
        in_flight
        |> Handover.lost(dead, :died)
        |> Handover.serve(next)
        |> each(fn n, in_flight ->
          # The youngest first.
          {:ok, in_flight} = Calls.deliver(in_flight, next, @count + 1 - n, "reply")
          in_flight
        end)

      assert InFlight.pending(in_flight) == 0
    end
  end

  describe "in a bridge" do
    @describetag :tmp_dir
    @count 20_000

    # Its peer has that many calls, which it answers when `let_go` is called.
    defp crowded(dir, drain_ms \\ 60_000) do
      file = Path.join(dir, "go")
      env = %{"FAKE_FILE" => file, "DSPY_BRIDGE_DRAIN_MS" => "#{drain_ms}"}
      bridge = start_supervised!({Bridge, fake_opts("holds", env: env)})
      {:ok, _} = Bridge.call(bridge, :ping, %{}, 20_000)
      %{os_pid: old} = Bridge.get_status(bridge)
      test = self()

      callers =
        for _ <- 1..@count do
          spawn(fn -> send(test, {:answer, Bridge.call(bridge, :hold, %{}, :infinity)}) end)
        end

      eventually(fn -> Bridge.get_status(bridge).pending == @count end, 20_000)
      # It has read them all: frames are written in their order.
      {:ok, _} = Bridge.call(bridge, :ping, %{}, 20_000)
      %{bridge: bridge, callers: callers, old: old, let_go: fn -> File.write!(file, "") end}
    end

    defp answers(count), do: for(_ <- 1..count, uniq: true, do: answer())

    defp answer do
      assert_receive {:answer, answer}, 20_000
      answer
    end

    test "an old peer finishes all its calls, also while half of the callers die, and in a stop",
         %{
           tmp_dir: dir
         } do
      %{bridge: bridge} = context = crowded(dir)
      assert Bridge.restart(bridge) == :ok
      {dying, living} = Enum.split(context.callers, div(@count, 2))
      for pid <- dying, do: Process.exit(pid, :kill)
      eventually(fn -> Bridge.get_status(bridge).pending == length(living) end, 20_000)
      stop = Task.async(fn -> Bridge.stop(bridge) end)
      eventually(fn -> Bridge.call(bridge, :ping) == {:error, :bridge_not_running} end)
      context.let_go.()
      assert [{:ok, _}] = answers(length(living))
      assert Task.await(stop, 20_000) == :ok
    end

    test "after the death of their peer all are sent again; after a stop all get an error", %{
      tmp_dir: dir
    } do
      %{bridge: bridge} = context = crowded(dir, 0)
      kill(context.old)
      eventually(fn -> match?(%{restarts: 1, state: :running}, Bridge.get_status(bridge)) end)
      assert %{pending: @count} = Bridge.get_status(bridge)
      :ok = Bridge.stop(bridge)
      assert answers(@count) == [{:error, :bridge_not_running}]
    end
  end
end
