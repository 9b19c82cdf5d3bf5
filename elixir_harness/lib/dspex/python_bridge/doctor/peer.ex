defmodule DSPex.PythonBridge.Doctor.Peer do
  @moduledoc false
  # A peer with the application's settings, in a bridge of its own: whether it answers a ping, runs a program, and takes
  # those that are declared.

  alias DSPex.PythonBridge.{Bridge, Error, OS, Options}
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Programs.Declared

  # It imports nothing heavy. A shorter :start_timeout is kept.
  @start_ms 15_000
  # The first import of DSPy, perhaps from a cold disk and without bytecode.
  @program_ms 60_000
  @filter :dspex_doctor

  @spec ping(keyword(), Options.t()) :: {:ok | :failed, String.t(), String.t() | nil, pid() | nil}
  def ping(opts, options) do
    start_ms = min(@start_ms, options.start_timeout)
    # Without a name, and without a second attempt. Programs have a check of their own.
    opts = Keyword.merge(opts, name: nil, max_retries: 0, start_timeout: start_ms, programs: [])
    started = Deadline.now()
    # The check reports the failure that the bridge would log.
    :logger.add_primary_filter(@filter, {&not_of_child/2, self()})
    {:ok, bridge} = start_here(opts)

    # The bridge's start_timeout ends it sooner, with a better text.
    case Bridge.call(bridge, :ping, %{}, 2 * start_ms) do
      {:ok, _pong} ->
        {:ok, "answered #{Deadline.now() - started} ms after its start", nil, bridge}

      {:error, reason} ->
        stop(bridge)
        {:failed, why(reason), advice_of_start(reason), nil}
    end
  end

  @not_started "the Python process does not start: "

  # Of a peer that has written why, that.
  defp why(@not_started <> reason) do
    line =
      case String.split(reason, ": ", parts: 2) do
        ["exit status" <> _code, line] -> line
        _no_line -> reason
      end

    "the peer does not start: " <> line
  end

  defp why(reason), do: "#{reason}"

  # Log events go to the node of the group leader, which for a caller by rpc is another one, without this node's filters.
  defp start_here(opts) do
    leader = Process.group_leader()
    Process.group_leader(self(), Process.whereis(:user) || leader)

    try do
      Bridge.start_link(opts)
    after
      Process.group_leader(self(), leader)
    end
  end

  defp not_of_child(%{meta: %{bridge: bridge}}, parent) when node(bridge) == node(),
    do: if(Process.info(bridge, :parent) == {:parent, parent}, do: :stop, else: :ignore)

  defp not_of_child(_event, _parent), do: :ignore

  defp advice_of_start(@not_started <> "exit" <> _status),
    do:
      "correct what it names: an option of the bridge, :env among them, DSPY_BRIDGE_* of the environment, or, if it is a " <>
        "module, the Python, as `mix dspex.setup` does"

  defp advice_of_start(_no_answer),
    do:
      "see whether `python -m dspy_bridge --selftest` with that Python ends; :start_timeout gives it more time"

  @spec program(pid()) :: {:ok | :failed, String.t(), String.t() | nil, true | nil}
  def program(bridge) do
    # The program brings its LM, so the peer is tried with the application's own LM settings.
    create = %{id: "doctor", signature: "question -> answer", lm: %{model: "offline/echo"}}
    execute = %{program_id: "doctor", inputs: %{question: "How are you?"}}
    started = Deadline.now()

    with {:ok, _created} <- Bridge.call(bridge, :create_program, create, @program_ms),
         {:ok, %{"answer" => _text}} <-
           Bridge.call(bridge, :execute_program, execute, @program_ms) do
      {:ok,
       "offline/echo answered; with the import of DSPy it took #{Deadline.now() - started} ms",
       nil, true}
    else
      {:error, :timeout} ->
        {:failed, "no answer within #{OS.Command.time(@program_ms)}",
         "see whether `import dspy` ends in that Python", nil}

      {:error, reason} ->
        {:failed, "#{reason}", advice(reason), nil}
    end
  end

  defp advice("DSPY_BRIDGE_LM" <> _rest), do: "correct :lm and :lm_options of the bridge"
  defp advice("DSPY_BRIDGE_INIT" <> _rest), do: "correct the function that DSPY_BRIDGE_INIT names"
  defp advice(_reason), do: "`python -m dspy_bridge --selftest` with that Python shows more"

  @spec programs(pid(), Options.t()) :: {:ok | :failed, String.t(), String.t() | nil, true | nil}
  def programs(bridge, options) do
    declared = options.programs.()

    case for(
           {id, args} <- declared,
           text = refused(bridge, args),
           do: "#{Declared.shown(id)}: #{text}"
         ) do
      [] when declared == [] ->
        text =
          "none are configured; those that your code gives to a Bridge or Pool are not known here"

        {:ok, text, nil, true}

      [] ->
        {:ok, "#{length(declared)} declared, and created", nil, true}

      refused ->
        {:failed, Enum.join(refused, "; "), "correct it in :programs; its runs fail until then",
         nil}
    end
  end

  # A peer that dies of one is followed by another.
  defp refused(bridge, args) do
    with {:ok, _body} <- Declared.encode(args),
         {:ok, _created, _meta} <-
           Bridge.request(bridge, :create_program, args, timeout: @program_ms) do
      nil
    else
      {:error, %Error{message: text}} -> text
    end
  end

  @spec stop(pid() | nil) :: :ok
  def stop(nil), do: :ok

  def stop(bridge) do
    Bridge.stop(bridge)
    :logger.remove_primary_filter(@filter)
    Process.unlink(bridge)

    # If the caller traps exits.
    receive do
      {:EXIT, ^bridge, _reason} -> :ok
    after
      0 -> :ok
    end
  end
end
