defmodule DSPex.Test.Helpers do
  @moduledoc """
  What the tests share: which Python, the fakes, the wire examples, waiting for a condition.
  """

  import ExUnit.Assertions, only: [flunk: 1]

  alias DSPex.PythonBridge.{Bridge, Pool}

  @root Path.expand("../../..", __DIR__)

  @doc "The interpreter of the tests, as `make test` sets it, else the checkout's own."
  def python do
    venv = Path.join(@root, ".venv/bin/python")

    System.get_env("DSPY_BRIDGE_PYTHON") ||
      if File.exists?(venv), do: venv, else: System.find_executable("python3")
  end

  @doc "A port program with one bad habit; for a name that no file has, a path that does not exist."
  def fake(name) do
    fakes = Path.join(@root, "tests/fakes")
    List.first(Path.wildcard("#{fakes}/**/#{name}.py"), "#{fakes}/#{name}.py")
  end

  @doc "Options for a bridge without a name, to a fake."
  def fake_opts(name, opts \\ []),
    do: [name: nil, python_executable: python(), script_path: fake(name)] ++ opts

  @doc "Options for a bridge without a name, to the real peer with the LM that needs no network."
  def real_opts(opts \\ []),
    do: Keyword.merge([name: nil, python_executable: python(), lm: "offline/echo"], opts)

  @doc "The same, with the modules of tests/fakes/host.py, which write into `dir`."
  def host_opts(dir, opts \\ []) do
    env = %{
      "PYTHONPATH" => Path.dirname(fake("host")),
      "DSPY_BRIDGE_ALLOW_MODULES" => "host",
      "FAKE_LOG" => Path.join(dir, "log"),
      "FAKE_FILE" => Path.join(dir, "spoilt")
    }

    real_opts([env: env] ++ opts)
  end

  @doc "How often the module of this name has begun a run there."
  def noted(dir, name) do
    case File.read(Path.join(dir, "log")) do
      {:ok, log} -> log |> String.split("\n") |> Enum.count(&String.starts_with?(&1, name))
      {:error, :enoent} -> 0
    end
  end

  def vectors(name),
    do: [@root, "tests", "vectors", name] |> Path.join() |> File.read!() |> JSON.decode!()

  @doc "The bytes of an entry of malformed.json."
  def vector_bytes(vector) do
    head =
      if vector["base64"], do: Base.decode64!(vector["base64"]), else: vector["payload"] || ""

    repeated =
      case vector["repeat"] do
        [text, times] -> String.duplicate(text, times)
        nil -> ""
      end

    head <> repeated <> (vector["then"] || "")
  end

  @doc "Whether a process of the system is there; one that only waits to be reaped is not."
  def alive?(os_pid) do
    case File.read("/proc/#{os_pid}/stat") do
      {:ok, stat} ->
        not (stat |> String.split(")") |> List.last() |> String.starts_with?(" Z"))

      {:error, _gone} ->
        not File.dir?("/proc/self") and
          match?({_, 0}, System.cmd("/bin/sh", ["-c", "kill -0 #{os_pid} 2>/dev/null"]))
    end
  end

  @doc "Kills a process of the system by its number."
  def kill(os_pid), do: signal("KILL", os_pid)

  @doc "Sends it a signal by its name."
  def signal(name, os_pid), do: {_, 0} = System.cmd("/bin/sh", ["-c", "kill -#{name} #{os_pid}"])

  @doc "Calls `fun` while a process of the system stands still."
  def while_stopped(os_pid, fun) do
    signal("STOP", os_pid)
    fun.()
  after
    signal("CONT", os_pid)
  end

  @doc "Waits until all peers of a pool run, and gives their states."
  def all_up(pool, ms \\ 20_000) do
    eventually(fn -> Enum.all?(Pool.status(pool).peers, &(&1.state == :running)) end, ms)
    Pool.status(pool).peers
  end

  @doc "Starts a bridge that stays ended once it has ended, and waits until it runs."
  def start_and_wait(opts, ms \\ 20_000) do
    spec = Supervisor.child_spec({Bridge, opts}, restart: :temporary, id: make_ref())
    bridge = ExUnit.Callbacks.start_supervised!(spec)
    eventually(fn -> Bridge.get_status(bridge).state == :running end, ms)
    bridge
  end

  @doc "The messages that the calling process has not received yet."
  def mailbox, do: elem(Process.info(self(), :messages), 1)

  @doc "Waits until `fun` gives something true, and gives it; fails after `ms`."
  def eventually(fun, ms \\ 5_000),
    do: poll(fun, System.monotonic_time(:millisecond) + ms)

  defp poll(fun, deadline) do
    cond do
      result = fun.() ->
        result

      System.monotonic_time(:millisecond) > deadline ->
        flunk("the condition did not come true in time")

      true ->
        Process.sleep(5)
        poll(fun, deadline)
    end
  end

  @doc "How long `fun` took, in ms, and what it gave."
  def timed(fun) do
    {us, result} = :timer.tc(fun)
    {us / 1000, result}
  end

  @doc "Sets a key of the application's environment for one test."
  def put_config(key, value) do
    before = Application.fetch_env(:dspex, key)
    Application.put_env(:dspex, key, value)

    ExUnit.Callbacks.on_exit(fn ->
      case before do
        {:ok, old} -> Application.put_env(:dspex, key, old)
        :error -> Application.delete_env(:dspex, key)
      end
    end)
  end

  @doc "Sets (nil: unsets) a variable of the system's environment for one test."
  def put_system_env(name, value) do
    before = System.get_env(name)
    System.put_env(%{name => value})
    ExUnit.Callbacks.on_exit(fn -> System.put_env(%{name => before}) end)
  end

  @doc "For the test: of all that is configured or in the environment only the interpreter of the tests."
  def only_python(_context) do
    put_system_env("DSPY_VENV", nil)
    put_system_env("PYTHON_EXECUTABLE", python())
    put_config(:python_environment, [])
    put_config(:python_bridge, [])
  end

  @doc "An interpreter that is a shell script."
  def interpreter(dir, script) do
    path = Path.join(dir, "python3")
    File.write!(path, "#!/bin/sh\n" <> script)
    File.chmod!(path, 0o755)
    path
  end

  @doc "The same, as that of the environment for one test."
  def use_interpreter(dir, script) do
    path = interpreter(dir, script)
    put_system_env("PYTHON_EXECUTABLE", path)
    path
  end
end
