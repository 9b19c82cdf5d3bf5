defmodule DSPex.PythonBridge.Bridge.LogForwarderTest do
  @moduledoc "Log records of the peer's in Logger."

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.Bridge
  alias DSPex.Test.FakePeer

  # A handler of its own for each test's bridge. The tests' Logger drops what is below :warning.
  setup context do
    owner = self()
    id = :"#{context.test}"
    config = %{owner: owner, bridge: id}
    :ok = :logger.add_handler(id, __MODULE__.Handler, %{config: config})
    on_exit(fn -> :logger.remove_handler(id) end)
    %{name: id}
  end

  defmodule Handler do
    @moduledoc false
    def log(%{level: level, msg: msg, meta: %{bridge: bridge} = meta}, %{
          config: %{owner: owner, bridge: bridge}
        }) do
      {:string, text} = msg
      send(owner, {:logged, level, IO.chardata_to_string(text), meta})
    end

    def log(_event, _config), do: :ok
  end

  defp start(name) do
    start_supervised!({Bridge, Keyword.put(FakePeer.opts(:plays), :name, name)})
  end

  defp log(bridge, records), do: send_frames(bridge, Enum.map(records, &JSON.encode!(%{log: &1})))

  defp send_frames(bridge, frames) do
    play = for(frame <- frames, do: ["raw", frame]) ++ [["reply"]]
    {:ok, _} = Bridge.call(bridge, :execute_program, %{play: play}, 20_000)
  end

  defp record(level, message, logger \\ "a.b"),
    do: %{level: level, logger: logger, message: message}

  test "each reaches Logger with its level, the names of its logger and its bridge", %{name: name} do
    bridge = start(name)
    os_pid = Bridge.get_status(bridge).os_pid

    for level <- [:warning, :error, :critical] do
      log(bridge, [record(level, "something #{level}")])
      text = "something #{level}"
      assert_receive {:logged, ^level, ^text, meta}, 5_000
      assert %{python_logger: "a.b", bridge: ^name, os_pid: ^os_pid, application: :dspex} = meta
    end

    traceback =
      "it failed\nTraceback (most recent call last):\n  File \"x.py\", line 1\nValueError: é"

    log(bridge, [record("error", traceback)])
    assert_receive {:logged, :error, ^traceback, _meta}, 5_000
  end

  test "one that cannot be read is counted as dropped", %{name: name} do
    bridge = start(name)
    send_frames(bridge, [~s({"log":)])

    assert_receive {:logged, :warning, text, _meta}, 5_000
    assert text =~ "log records of the Python process dropped: 1"
    assert Bridge.get_status(bridge).unreadable_frames == 0
  end

  test "a long message is cut, between characters", %{name: name} do
    bridge = start(name)
    log(bridge, [record("error", "x" <> String.duplicate("é", 1_000_000))])
    assert_receive {:logged, :error, text, _meta}, 5_000
    assert String.valid?(text)
    assert byte_size(text) == 65_535
  end

  test "a peer that floods the log delays no call; excess records are dropped and counted",
       %{name: name} do
    # As slow as a Logger gets that is overloaded.
    owner = self()
    slow = :"#{name} slow"
    :ok = :logger.add_handler(slow, __MODULE__.Slow, %{config: %{bridge: name, owner: owner}})
    on_exit(fn -> :logger.remove_handler(slow) end)
    bridge = start(name)

    records = for n <- 1..20_000, do: record("warning", "record #{n}")
    flood = Task.async(fn -> log(bridge, records) end)
    assert_receive {:slowed, pid}, 5_000
    {ms, {:ok, _}} = timed(fn -> Task.await(flood, 20_000) end)
    assert ms < 10_000
    assert {:ok, _} = Bridge.call(bridge, :ping, %{}, 5_000)
    assert %{pending: 0, unreadable_frames: 0, late_replies: 0} = Bridge.get_status(bridge)
    {:message_queue_len, waiting} = Process.info(pid, :message_queue_len)
    assert waiting <= 1_000
    :logger.remove_handler(slow)
    eventually(fn -> Process.info(pid, :message_queue_len) == {:message_queue_len, 0} end, 30_000)
    # The next one brings the number.
    log(bridge, [record("warning", "record last")])
    {logged, dropped} = account({0, 0}, 20_001)
    assert logged + dropped == 20_001
    assert dropped > 15_000
  end

  defmodule Slow do
    @moduledoc false
    def log(%{meta: %{bridge: bridge}}, %{config: %{bridge: bridge, owner: owner}}) do
      send(owner, {:slowed, self()})
      Process.sleep(100)
    end

    def log(_event, _config), do: :ok
  end

  # Records that came, and those that are said not to.
  defp account({logged, dropped}, all) when logged + dropped >= all, do: {logged, dropped}

  defp account({logged, dropped}, all) do
    receive do
      {:logged, :warning, "record " <> _n, _meta} ->
        account({logged + 1, dropped}, all)

      {:logged, :warning, line, _meta} ->
        [_, count] = Regex.run(~r/Python process dropped: (\d+)/, line)
        account({logged, dropped + String.to_integer(count)}, all)
    after
      5_000 -> {logged, dropped}
    end
  end

  test "records sent before the bridge ended are still logged", %{name: name} do
    bridge = start(name)
    pid = :sys.get_state(bridge).log_forwarder.pid
    records = for n <- 1..100, do: record("error", "last words #{n}")
    log(bridge, records)
    Process.exit(bridge, :kill)
    assert_receive {:logged, :error, "last words 100", _meta}, 5_000
    eventually(fn -> not Process.alive?(pid) end)
  end

  @tag :tmp_dir
  test "the real peer's come this way, a traceback as one record", %{name: name, tmp_dir: dir} do
    File.write!(Path.join(dir, "startup.py"), """
    import logging

    def start():
        logging.getLogger("my.app").warning("to be seen")
        try:
            1 / 0
        except ZeroDivisionError:
            logging.getLogger("my.app").exception("failed")
    """)

    env = %{"PYTHONPATH" => dir, "DSPY_BRIDGE_INIT" => "startup:start"}
    bridge = start_supervised!({Bridge, real_opts(name: name, env: env)})
    create = %{id: "qa", signature: "question -> answer"}
    assert {:ok, _} = Bridge.call(bridge, :create_program, create, 30_000)
    assert_receive {:logged, :warning, "to be seen", %{python_logger: "my.app"}}, 5_000
    assert_receive {:logged, :error, text, %{python_logger: "my.app"}}, 5_000
    assert ["failed", "Traceback (most recent call last):" | rest] = String.split(text, "\n")
    assert List.last(rest) =~ "ZeroDivisionError"
  end
end
