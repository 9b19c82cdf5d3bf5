defmodule DSPex.PythonBridge.SupervisorTest do
  # The default names and the application's configuration.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Monitor}
  alias DSPex.PythonBridge.Supervisor, as: BridgeSupervisor

  defp echo, do: fake_opts("echo", name: Bridge) |> Keyword.delete(:name)

  test "starts a bridge and its monitor under their usual names" do
    start_supervised!({BridgeSupervisor, bridge: echo(), monitor: [timeout: 2_000]})
    assert {:ok, %{"args" => %{"a" => 1}}} = Bridge.call(:echo, %{a: 1})
    assert {:ok, %{"args" => %{}}} = Bridge.call(:echo)
    assert {:ok, %{"timeout_ms" => _}} = Bridge.call(:echo, %{}, 2_000)
    assert {:ok, _, %{}} = Bridge.request(:echo)
    assert {:ok, _, %{}} = Bridge.request(:echo, %{})
    assert {:ok, _, %{}} = Bridge.request(:echo, %{}, timeout: 2_000)
    assert :ok = Bridge.cast(:echo, %{})
    assert %{state: :running} = Bridge.get_status()
    assert %{status: :healthy} = Monitor.force_health_check()
    assert %{checks: 1} = Monitor.get_health_status()
    assert Monitor.reset_stats() == :ok
    assert Bridge.restart() == :ok
    assert {:ok, _} = Bridge.call(:echo)
  end

  test "two run beside each other whose bridges have names of their own, in one tree, too" do
    [one, two] = bridges = for n <- ["One", "Two"], do: Module.concat(__MODULE__, n)
    children = for bridge <- bridges, do: {BridgeSupervisor, bridge: [name: bridge] ++ echo()}

    start_supervised!(%{
      id: :tree,
      start: {Supervisor, :start_link, [children, [strategy: :one_for_one]]}
    })

    start_supervised!({BridgeSupervisor, bridge: echo()})

    for bridge <- bridges do
      assert {:ok, _} = Bridge.call(bridge, :echo)
      assert %{status: :healthy} = Monitor.force_health_check(Module.concat(bridge, "Monitor"))
      assert is_pid(Process.whereis(Module.concat(bridge, "Supervisor")))
    end

    assert Bridge.get_status(one).os_pid != Bridge.get_status(two).os_pid
    assert %{status: :healthy} = Monitor.force_health_check()
    ids = for n <- [:a, :b], do: BridgeSupervisor.child_spec(bridge: [name: {:global, n}]).id
    assert ids == [{:global, :a}, {:global, :b}]
  end

  test "a wrong option is refused with an error that names it" do
    for {opts, text} <- [
          {[bridges: 1], ":bridges"},
          {[bridge: 1], ":bridge"},
          {[bridge: [name: nil]], ":bridge"},
          {[monitor: :none], ":monitor"},
          {:text, "keyword"}
        ] do
      assert {:error, %ArgumentError{message: message}} = BridgeSupervisor.start_link(opts)
      assert message =~ text
    end

    Process.flag(:trap_exit, true)

    assert {:error,
            {:shutdown, {:failed_to_start_child, Bridge, %ArgumentError{message: message}}}} =
             BridgeSupervisor.start_link(bridge: [lm: 5])

    assert message =~ ":lm"
  end

  test "no report of the supervisor shows the bridge's secrets" do
    opts = [bridge: echo() ++ [lm_options: %{api_key: "sk-secret"}]]
    supervisor = start_supervised!({BridgeSupervisor, opts})
    refute inspect(BridgeSupervisor.child_spec(opts), limit: :infinity) =~ "sk-secret"

    log =
      ExUnit.CaptureLog.capture_log(fn ->
        bridge = Process.whereis(Bridge)
        Process.exit(bridge, :kill)
        eventually(fn -> Process.whereis(Bridge) not in [bridge, nil] end)
      end)

    # The supervisor's report has the child's arguments in it.
    assert log =~ "start_link"
    refute log =~ "sk-secret"
    refute inspect(:sys.get_state(supervisor), limit: :infinity) =~ "sk-secret"
    stop_supervised!(BridgeSupervisor)

    # Nor when it was started without its child specification.
    {:ok, supervisor} = BridgeSupervisor.start_link(opts)
    refute inspect(:sys.get_state(supervisor), limit: :infinity) =~ "sk-secret"
    refute inspect(:sys.get_status(supervisor), limit: :infinity) =~ "sk-secret"
    Supervisor.stop(supervisor)
  end

  describe "DSPex.Application" do
    test "starts nothing with autostart: false" do
      assert Application.get_env(:dspex, :autostart) == false
      assert Supervisor.which_children(DSPex.ApplicationSupervisor) == []
    end

    test "starts the supervisor by default" do
      on_exit(fn -> restart_application() end)
      put_config(:python_bridge, echo())
      put_config(:autostart, true)
      restart_application()
      assert {:ok, _} = Bridge.call(:echo)
      assert %{status: :healthy} = Monitor.force_health_check()
    end

    defp restart_application do
      Application.stop(:dspex)
      :ok = Application.start(:dspex)
    end
  end
end
