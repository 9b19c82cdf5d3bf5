defmodule DSPex.PythonBridge.OTP.CrashReportTest do
  @moduledoc "What is logged and sent when a process here crashes: never the contents of requests."

  # It reads all that is logged, at all levels.
  use ExUnit.Case, async: false

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Bridge, Pool, Protocol}
  alias DSPex.PythonBridge.Client.StreamProxy
  alias DSPex.PythonBridge.Calls.{Journal, Request}
  alias DSPex.PythonBridge.Pool.Handle
  alias DSPex.PythonBridge.Tools.Invocation
  alias DSPex.PythonBridge.Supervisor, as: BridgeSupervisor

  @secret "sk-planted-secret"

  # Its own handler takes no reports.
  @moduletag capture_log: false

  # Reports as they are, and as the two formatters write them.
  setup context do
    owner = self()
    id = :"#{context.test}"
    primary = :logger.get_primary_config()
    {:ok, %{level: shown}} = :logger.get_handler_config(:default)

    on_exit(fn ->
      :logger.set_primary_config(primary)
      :logger.update_handler_config(:default, :level, shown)
      :logger.remove_handler(id)
    end)

    :ok = :logger.update_handler_config(:default, :level, :none)
    config = %{owner: owner, translator: primary.filters[:logger_translator]}
    :ok = :logger.add_handler(id, __MODULE__.Handler, %{config: config, level: :all})
    :ok = :logger.set_primary_config(%{primary | level: :all, filters: []})
  end

  defmodule Handler do
    @moduledoc false
    def log(event, %{config: %{owner: owner, translator: {translate, config}}}) do
      raw = inspect(event, limit: :infinity, printable_limit: :infinity, structs: false)
      erlang = :logger_formatter.format(event, %{})
      {formatter, settings} = Logger.Formatter.new(metadata: :all)
      translated = translate.(event, %{config | otp: true, sasl: true})
      elixir = if is_map(translated), do: formatter.format(translated, settings), else: ""
      send(owner, {:logged, IO.chardata_to_string([raw, erlang, elixir, "\n"])})
    end
  end

  defp logged(so_far \\ "") do
    receive do
      {:logged, text} -> logged(so_far <> text)
    after
      0 -> so_far
    end
  end

  # Logging is done by the process that ends, before it ends, or by its supervisor.
  defp crash(pid, function) do
    monitor = Process.monitor(pid)
    function.()
    assert_receive {:DOWN, ^monitor, :process, ^pid, reason}, 5_000
    reason
  end

  defp show(term),
    do: inspect(term, limit: :infinity, printable_limit: :infinity, structs: false)

  defp refute_secret(term) do
    refute show(term) =~ @secret
    refute :erlang.iolist_to_binary(:io_lib.format("~0tp", [term])) =~ @secret
  end

  # Calls that wait in it, programs that it knows, keys in its options.
  defp start_bridge(name) do
    opts = [lm_options: %{api_key: @secret}, env: %{"SOME_KEY" => @secret}]
    opts = "plays" |> fake_opts(opts) |> Keyword.put(:name, name)
    monitor = [name: nil, interval: 600_000]
    supervisor = start_supervised!({BridgeSupervisor, name: nil, bridge: opts, monitor: monitor})
    eventually(fn -> Bridge.get_status(name).state == :running end, 10_000)
    fill(name)
    supervisor
  end

  defp fill(bridge) do
    {:ok, _} = Bridge.call(bridge, :create_program, %{id: "qa", signature: @secret})
    args = %{program_id: "qa", play: [["go", "never"]], inputs: %{q: @secret}}
    waiting = spawn(fn -> Bridge.call(bridge, :execute_program, args, :infinity) end)
    eventually(fn -> Bridge.get_status(bridge).pending == 1 end)
    waiting
  end

  defp break(pid, path),
    do: :sys.replace_state(pid, &update_in(&1, path, fn old -> {:broken, old} end))

  defp key(name), do: Access.key!(name)

  # In what is broken are bodies; what does not fit is in the reason, the stack trace or the message.
  @ways [
    {[:in_flight, :calls], :request},
    {[:in_flight, :send_queues], :request},
    {[:in_flight], :request},
    {[:in_flight], :call},
    {[:in_flight], :port},
    {[:in_flight], :unknown},
    {[:restarts_waiting], :restart},
    {[:options], :terminate},
    {[:in_flight], :terminate}
  ]

  test "of a bridge: not in the log, the reports or the reason", %{test: name} do
    start_bridge(name)

    for {path, way} <- @ways do
      bridge = Process.whereis(name)
      # The report of its end shows these events.
      :sys.log(bridge, true)
      Bridge.cast(bridge, :ping, %{a: @secret})

      reason =
        crash(bridge, fn ->
          break(bridge, Enum.map(path, &key/1))
          provoke(bridge, way)
        end)

      refute_secret(reason)
      eventually(fn -> Bridge.get_status(name).state == :running end, 10_000)
      fill(name)
    end

    log = logged()
    assert log =~ "terminating"
    assert log =~ "crash_report"
    assert log =~ "child_terminated"
    refute log =~ @secret
  end

  defp provoke(bridge, :request), do: Bridge.cast(bridge, :ping, %{a: @secret})
  defp provoke(bridge, :call), do: Bridge.get_status(bridge)
  defp provoke(bridge, :restart), do: spawn(fn -> Bridge.restart(bridge) end)
  defp provoke(bridge, :terminate), do: spawn(fn -> GenServer.stop(bridge, {:ended, 1}) end)

  defp provoke(bridge, :unknown) do
    send(bridge, {:unknown, @secret})
    provoke(bridge, :port)
  end

  defp provoke(bridge, :port) do
    port = Enum.find(Port.list(), &(Port.info(&1, :connected) == {:connected, bridge}))
    send(bridge, {port, {:data, ~s({"id":7,"success":true,"result":"#{@secret}"})}})
  end

  test "of a pool's coordinator", %{test: name} do
    opts = "plays" |> fake_opts(pool_size: 1, lm_options: %{api_key: @secret})
    pool = start_supervised!({Pool, Keyword.put(opts, :name, name)})
    create = %{id: "qa", signature: @secret}

    for {path, message} <- [
          {[:handle], {:slot, 1, :down}},
          {[:handle], {:wait, make_ref(), self(), [], []}},
          {[:handle], :stop}
        ] do
      {:ok, _} =
        eventually(fn ->
          with {:error, _} <- Pool.call(pool, :create_program, create), do: nil
        end)

      coordinator = Process.whereis(Handle.coordinator(name))

      reason =
        crash(coordinator, fn ->
          break(coordinator, Enum.map(path, &key/1))
          refute_secret(:sys.get_status(coordinator))
          :sys.log(coordinator, true)
          send(coordinator, {make_ref(), {:frame, @secret}})

          if message == :stop,
            do: spawn(fn -> GenServer.stop(coordinator, :shutdown) end),
            else: send(coordinator, message)
        end)

      refute_secret(reason)
      eventually(fn -> Process.whereis(Handle.coordinator(name)) not in [nil, coordinator] end)
    end

    log = logged()
    assert log =~ "crash_report"
    refute log =~ @secret
  end

  test "of the processes of one call" do
    about = %{pool: nil, program_id: nil, telemetry_metadata: %{}}
    proxy = StreamProxy.start(%{"t" => {& &1, true}}, about)
    # This process is the bridge; its frame is none.
    request = %Request{body: @secret, stream?: true, journal: %Journal{most: :infinity}}
    StreamProxy.make(proxy, self(), :infinity, request)
    assert_receive {:request, %Request{ref: ref, pid: ^proxy, body: @secret, tools?: true}}
    send(ref, {ref, :journal, @secret})
    frame = {:broken, @secret}
    call = %Invocation{port: hd(Port.list()), id: 1, frame: frame, max_frame_bytes: 1_000}
    # The process of the tool, and then that of the call, which owes an answer.
    crash(proxy, fn -> send(ref, {ref, :tool_call, call}) end)

    log = logged()
    assert log =~ inspect(&Protocol.decode_tool_call/1) |> String.trim_leading("&")
    refute log =~ @secret
  end

  test "not in a bridge's status", %{test: name} do
    start_bridge(name)
    bridge = Process.whereis(name)
    fill(name)
    refute_secret(:sys.get_status(bridge))
    break(bridge, [key(:in_flight)])
    refute_secret(:sys.get_status(bridge))
    :sys.replace_state(bridge, &{:broken, &1})
    refute_secret(:sys.get_status(bridge))

    Process.exit(bridge, :kill)
  end
end
