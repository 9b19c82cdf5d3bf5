defmodule DSPex.PythonBridge.Calls.CrowdTest do
  @moduledoc """
  Tens of thousands of calls at once, and what happens to their peer meanwhile. The work for each of them
  must not depend on how many there are: where it does, these tests take minutes instead of a second.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Options, Programs}
  alias DSPex.PythonBridge.Calls.{Dispatcher, InFlight}

  @moduletag timeout: 30_000

  describe "played through" do
    @count 30_000

    # A peer that reads everything and answers nothing by itself.
    defp attach(traffic) do
      args = ["-c", "cat > /dev/null 2> /dev/null; :"]
      port = Port.open({:spawn_executable, "/bin/sh"}, [{:packet, 4}, args: args])
      {port, Dispatcher.attach(traffic, port)}
    end

    # A peer that has all the calls, and the next one.
    defp crowd(max_retries, change) do
      {:ok, options} = Options.new(max_retries: max_retries)
      {port, traffic} = attach(InFlight.new(options, Programs.Store.new()))

      traffic =
        each(Dispatcher.serve(traffic, port), fn _, traffic ->
          terms = {:here, 0, change}
          nothing = InFlight.nothing_beside()
          InFlight.accept(traffic, make_ref(), self(), :infinity, "body", terms, nothing)
        end)

      {next, traffic} = attach(written(traffic))
      {port, next, traffic}
    end

    # A call that still waits to be written would be taken back.
    defp written(traffic) do
      if Dispatcher.all_written?(traffic) do
        traffic
      else
        assert_receive {:DOWN, monitor, :process, _pid, _reason}, 10_000
        written(Dispatcher.written(traffic, monitor))
      end
    end

    defp each(traffic, fun), do: Enum.reduce(1..@count, traffic, fun)

    # A failed assertion would show all of it.
    defp busy?(traffic, port, wanted), do: true = Dispatcher.busy?(traffic, port) == wanted

    defp changing?(traffic, port, wanted),
      do: true = Dispatcher.changing?(traffic, port) == wanted

    test "after each reply it is known whether an old peer has more to answer" do
      {old, next, traffic} = crowd(3, nil)

      traffic =
        traffic
        |> Dispatcher.serve(next)
        |> each(fn id, traffic ->
          busy?(traffic, old, true)
          {:ok, traffic} = InFlight.deliver(traffic, id, "reply")
          traffic
        end)

      busy?(traffic, old, false)
    end

    test "so it is after each call that is given up, and whether the peer may still change programs" do
      {old, _next, traffic} = crowd(3, {:create, "p", nil})

      traffic =
        each(traffic, fn id, traffic ->
          busy?(traffic, old, true)
          InFlight.abandon(traffic, id)
        end)

      busy?(traffic, old, false)

      # What nobody waits for any more is answered all the same.
      traffic =
        each(traffic, fn id, traffic ->
          changing?(traffic, old, true)
          {:ok, traffic} = InFlight.deliver(traffic, id, "reply")
          traffic
        end)

      changing?(traffic, old, false)
    end

    test "after a death each is given to the next peer alone, where that must be, and answered" do
      {dead, next, traffic} = crowd(1, nil)

      traffic =
        traffic
        |> Dispatcher.lost(dead, :died)
        |> Dispatcher.serve(next)
        |> each(fn id, traffic ->
          {:ok, traffic} = InFlight.deliver(traffic, id, "reply")
          traffic
        end)

      assert InFlight.pending(traffic) == 0
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

    test "an old peer answers all that it has, also while half of the callers die, and in a stop",
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

    test "after the death of their peer all are sent again; after a stop all are told", %{
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
