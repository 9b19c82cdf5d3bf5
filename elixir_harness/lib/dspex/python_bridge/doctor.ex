defmodule DSPex.PythonBridge.Doctor do
  @moduledoc """
  Checks whether a bridge can work on this machine, and says what to do about each failure. `mix dspex.doctor` prints the
  checks; without Mix, for example in a release:

      bin/my_app eval "DSPex.PythonBridge.Doctor.print() || System.halt(1)"

  The checks, in their order; a check that depends on a failed one is skipped:

  | name | what is checked |
  | --- | --- |
  | `configuration` | keys and types in the configuration of `:dspex`, with a suggestion for a misspelt key; whether `:dspex` starts a Bridge of its own, which beside a Pool is one Python process more |
  | `interpreter` | which Python is used, and which setting decided |
  | `version` | the version of that Python |
  | `dspy`, `psutil`, and what `required_packages` names | their versions |
  | `litellm` | its version, or a note: only LMs that DSPy's own engine does not serve need it |
  | `optimizers` | whether `mipro_v2` and `simba` find the packages that they need; a note if not, as programs do not need them |
  | `script`, `package` | the peer's script, and where its package `dspy_bridge` is |
  | `folders` | those of `DSPY_BRIDGE_STATE_DIR`, `DSPY_BRIDGE_FILES_DIR` and `DSPY_BRIDGE_DISK_CACHE`, where set |
  | `ping` | a peer that is started with your settings answers |
  | `program` | a program with the LM `offline/echo` runs in that peer: DSPy works |
  | `programs` | the declared programs (`:programs`) can be created there; none is run |
  | `lm` | the default LM's name, whether its key is set (the value is not shown), and whether its `api_base` can be connected to; no request is made |
  | `ask` | with `ask: true` only: the default LM answers; whether it honours response schemas and function calls, and the `supports` to configure. Two or three small requests, each within a minute |

  Options that your code gives to a bridge are not known here: pass them to `print/1` or `run/1`.

  It starts a bridge without a name and stops it; your application does not have to run. It takes a few seconds, at most
  three minutes if everything hangs.
  """

  alias DSPex.PythonBridge.{Bridge, EnvironmentCheck, Error, Monitor, Options, Python}
  alias DSPex.PythonBridge.Doctor.LM
  alias DSPex.PythonBridge.OTP.Deadline
  alias DSPex.PythonBridge.Programs.Declared
  alias DSPex.PythonBridge.Python.{Interpreter, Probe}

  # Those of pyproject.toml: the least version, and the first that is not tested.
  @needed [{"dspy", "3.4.1", "4"}, {"psutil", "5.9", nil}]
  @optimizers [{"numpy", "1.26", nil}, {"optuna", "3.4", nil}]
  @ranges @needed ++ [{"litellm", "1.65.8", nil} | @optimizers]
  @with_litellm "`mix dspex.setup --with litellm`"
  # What each optimizer imports that DSPy does not install.
  @imports [{"mipro_v2", "optuna"}, {"simba", "numpy"}]
  # A peer imports nothing heavy to start. A shorter :start_timeout is kept.
  @start_ms 15_000
  # The first import of DSPy, perhaps from a cold disk and without bytecode.
  @program_ms 60_000
  @todo "correct the option or variable that it names, or see what the peer wrote to the log"

  @typedoc """
  `status`: `:note` is not an error but worth knowing; `:skipped`: it depends on a check that failed. `advice`: what to
  do, or nil.
  """
  @type check :: %{
          name: String.t(),
          status: :ok | :failed | :note | :skipped,
          found: String.t(),
          advice: String.t() | nil
        }

  @doc """
  Runs the checks. Options: those of a bridge (`DSPex.PythonBridge.Options`), which override the configuration, and

    * `:ask` – whether to ask the default LM; false by default
    * `:each` – a function that is called with each check when it is done
    * `:notes` – names of checks whose failure is a note, such as those of what only the machine has that will run this
  """
  @spec run(keyword()) :: [check()]
  def run(opts \\ []) do
    # A release's `eval` loads no application, and so no configuration.
    Application.load(:dspex)
    {own, opts} = Keyword.split(opts, [:ask, :each, :notes])
    packages = packages()
    options = & &1["configuration"]

    checks =
      [
        {"configuration", [], fn _facts -> configuration(opts) end},
        {"interpreter", ["configuration"], &interpreter(options.(&1))},
        {"version", ["interpreter"], &version(&1["interpreter"], packages, options.(&1))}
      ] ++
        for(name <- packages, do: {name, ["version"], &package(name, &1["version"])}) ++
        [
          {"litellm", ["version"], &litellm(&1["version"])},
          {"optimizers", ["version"], &optimizers(&1["version"])},
          {"script", ["configuration"], &script(options.(&1))},
          {"package", ["version", "script"], &peer_package(&1, options.(&1))},
          {"folders", ["configuration"], &folders(options.(&1))},
          {"ping", ["package", "dspy"], &ping(opts, options.(&1))},
          {"program", ["ping"], &program(&1["ping"])},
          {"programs", ["program"], &programs(&1["ping"], options.(&1))},
          {"lm", ["dspy"], &LM.check(&1["interpreter"], options.(&1))}
        ] ++
        if own[:ask], do: [{"ask", ["lm"], &LM.ask(&1["interpreter"], options.(&1))}], else: []

    {checks, facts} = Enum.map_reduce(checks, %{}, &check(&1, &2, own))
    if bridge = facts["ping"], do: Bridge.stop(bridge)
    checks
  end

  # A check returns its status, what it found, its advice, and a fact for later checks; nil: these are skipped.
  defp check({name, needs, fun}, facts, own) do
    {status, found, advice, fact} =
      case Enum.find(needs, &(facts[&1] == nil)) do
        nil -> fun.(facts)
        missing -> {:skipped, "needs #{missing}", nil, nil}
      end

    status = if status == :failed and name in (own[:notes] || []), do: :note, else: status
    check = %{name: name, status: status, found: found, advice: advice}
    if each = own[:each], do: each.(check)
    {check, Map.put(facts, name, fact)}
  end

  @doc """
  Runs the checks, with the options of `run/1`, and passes each to `puts` as lines of text when it is done, and a
  summary at the end. Returns whether no check has failed.
  """
  @spec print(keyword(), (String.t() -> term())) :: boolean()
  def print(opts \\ [], puts \\ &IO.puts/1) do
    checks = opts |> Keyword.put(:each, &puts.(lines(&1))) |> run()
    failed = Enum.count(checks, &(&1.status == :failed))
    puts.(if failed == 0, do: "All is well.", else: "Failed: #{failed} of #{length(checks)}.")
    failed == 0
  end

  @marks %{ok: "✓", failed: "✗", note: "–", skipped: "–"}
  # For a terminal without Unicode.
  @ascii %{ok: "+", failed: "x", note: "-", skipped: "-"}

  defp lines(check) do
    marks = if :io.getopts()[:encoding] == :unicode, do: @marks, else: @ascii
    found = if check.status == :skipped, do: "skipped: #{check.found}", else: check.found
    line = "#{marks[check.status]} #{String.pad_trailing(check.name, 14)}#{found}"
    advice = check.advice && "\n" <> String.duplicate(" ", 16) <> "-> " <> check.advice
    "#{line}#{advice}"
  end

  ## Configuration, interpreter, packages

  defp configuration(opts) do
    options = Python.Config.bridge(opts)
    monitor = Python.Config.checked(Monitor.options(), :python_bridge_monitor)
    all = [Python.Config.required_packages(), options, monitor, Python.Config.keys()]
    fact = with {:ok, options} <- options, do: options, else: (_wrong -> nil)

    autostart? = Application.get_env(:dspex, :autostart, true)
    note = "; :dspex starts a Bridge (:autostart), one Python more if you have a Pool"

    case for {:error, text} <- all, do: text do
      [] -> {:ok, "its keys and types are right#{if autostart?, do: note}", nil, fact}
      problems -> {:failed, Enum.join(problems, "; "), "correct it in config/", fact}
    end
  end

  defp interpreter(options) do
    case Interpreter.locate(options.python_executable) do
      {:ok, python, source} ->
        {:ok, "#{python} (#{Interpreter.describe(source)})", nil, python}

      {:error, text} ->
        path = if Interpreter.configured_venv(), do: " --path FOLDER", else: ""
        advice = "name one that is there; `mix dspex.setup#{path}` makes a virtual environment"
        {:failed, text, advice, nil}
    end
  end

  defp version(python, packages, options) do
    names = ["litellm" | packages] ++ for({name, _least, _below} <- @optimizers, do: name)

    with {:ok, probe} <- EnvironmentCheck.probe(python, names, options),
         nil <- Probe.too_old(probe) do
      {:ok, probe.version, nil, probe}
    else
      {:error, text} ->
        {:failed, text, "see whether #{python} --version works", nil}

      text ->
        {:failed, text, "`mix dspex.setup --path FOLDER --python PYTHON` takes another", nil}
    end
  end

  # The peer needs the first two, whatever the configuration requires; dspy-ai is the old name of dspy.
  defp packages do
    needed = for {name, _least, _below} <- @needed, do: name

    case Python.Config.required_packages() do
      {:ok, required} -> needed ++ (required -- ["dspy-ai" | needed])
      {:error, _text} -> needed
    end
  end

  @doc false
  @spec requirement(String.t()) :: String.t()
  def requirement(package) do
    case List.keyfind(@ranges, package, 0) do
      nil -> package
      {_name, least, nil} -> "#{package}>=#{least}"
      {_name, least, below} -> "#{package}>=#{least},<#{below}"
    end
  end

  defp package(name, probe) do
    version = EnvironmentCheck.version(name, probe)
    # Nothing should be installed into the system's Python or a shared one.
    there = if probe.venv?, do: ", or install '#{requirement(name)}' there", else: ""
    advice = "`mix dspex.setup` makes an environment with what the peer needs" <> there

    cond do
      version == nil -> {:failed, "not installed in #{probe.python}", advice, nil}
      fits?(name, version) -> {:ok, version, nil, true}
      true -> {:failed, "#{version}; tested is #{requirement(name)}", advice, nil}
    end
  end

  defp litellm(%{found: found}) do
    if fits?("litellm", found["litellm"]),
      do: {:ok, found["litellm"], nil, true},
      else:
        {:note, "not there: LMs other than those of DSPy's own engine need #{@with_litellm}", nil,
         true}
  end

  # Programs run without what optimizers import.
  defp optimizers(%{found: found}) do
    case for {name, package} <- @imports, not fits?(package, found[package]), do: {name, package} do
      [] ->
        versions = for {name, _, _} <- @optimizers, do: "#{name} #{found[name]}"
        {:ok, "all of them, with #{Enum.join(versions, ", ")}", nil, true}

      lacking ->
        needs = for {name, package} <- lacking, do: "#{name} (needs #{requirement(package)})"
        text = "all but #{Enum.join(needs, " and ")}: `mix dspex.setup --with optimizers`"
        {:note, text, nil, true}
    end
  end

  defp fits?(_package, nil), do: false

  defp fits?(package, version) do
    {_name, least, below} = List.keyfind(@ranges, package, 0, {package, "0", nil})
    numbers(version) >= numbers(least) and (below == nil or numbers(version) < numbers(below))
  end

  # Only the numbers count: a release candidate of 4 is already too new.
  defp numbers(version) do
    [release] = Regex.run(~r/\A[\d.]*/, version)
    for number <- String.split(release, ".", trim: true), do: String.to_integer(number)
  end

  ## The peer's script, package and folders

  defp script(%Options{script_path: path}) do
    case EnvironmentCheck.script(path) do
      {:ok, source} ->
        {:ok, path, nil, source}

      {:error, text} ->
        {:failed, text, "leave :script_path out to use that of the package", nil}
    end
  end

  defp peer_package(%{"version" => probe, "script" => source}, options) do
    case EnvironmentCheck.bridge_package(probe, source, options.script_path) do
      {:ok, true} -> {:ok, "it comes with the script", nil, true}
      {:ok, folder} -> {:ok, "dspy_bridge in #{folder}", nil, folder}
      {:error, text} -> {:failed, text, "`mix dspex.setup` installs it", nil}
    end
  end

  defp folders(options) do
    set =
      for name <- ~w(STATE_DIR FILES_DIR DISK_CACHE),
          variable = "DSPY_BRIDGE_" <> name,
          folder = String.trim(options.env.()[variable] || System.get_env(variable, "")),
          folder != "",
          do: {variable, folder}

    case for {name, folder} <- set,
             why = unusable(name, Path.expand(folder)),
             do: "#{name}: #{why}" do
      [] when set == [] -> {:ok, "none are set", nil, true}
      [] -> {:ok, Enum.map_join(set, ", ", fn {name, path} -> "#{name} #{path}" end), nil, true}
      errors -> {:failed, Enum.join(errors, "; "), "make it, or correct :env", nil}
    end
  end

  defp unusable(name, path) do
    cache? = name == "DSPY_BRIDGE_DISK_CACHE"

    case File.stat(path) do
      # It is made when it is needed.
      {:error, :enoent} when cache? -> nil
      {:ok, %{type: :directory, access: :read_write}} -> nil
      {:ok, %{type: :directory, access: :read}} when not cache? -> nil
      _other -> "this user cannot use a folder #{path}"
    end
  end

  ## A peer with the application's settings, in a bridge of its own

  defp ping(opts, options) do
    start_ms = min(@start_ms, options.start_timeout)
    # Without a name, and without a second attempt. Programs have a check of their own.
    opts = Keyword.merge(opts, name: nil, max_retries: 0, start_timeout: start_ms, programs: [])
    started = Deadline.now()
    {:ok, bridge} = Bridge.start_link(opts)

    # The bridge's start_timeout ends it sooner, with a better text.
    case Bridge.call(bridge, :ping, %{}, 2 * start_ms) do
      {:ok, _pong} ->
        {:ok, "answered #{Deadline.now() - started} ms after its start", nil, bridge}

      {:error, reason} ->
        Bridge.stop(bridge)
        {:failed, "#{reason}", @todo, nil}
    end
  end

  defp program(bridge) do
    # The program brings its LM, so the peer is tried with the application's own LM settings.
    create = %{id: "doctor", signature: "question -> answer", lm: %{model: "offline/echo"}}
    execute = %{program_id: "doctor", inputs: %{question: "How are you?"}}
    started = Deadline.now()

    with {:ok, _created} <- Bridge.call(bridge, :create_program, create, @program_ms),
         {:ok, %{"answer" => _text}} <-
           Bridge.call(bridge, :execute_program, execute, @program_ms) do
      ms = Deadline.now() - started
      {:ok, "offline/echo answered; with the import of DSPy it took #{ms} ms", nil, true}
    else
      {:error, reason} ->
        {:failed, "#{reason}", @todo, nil}
    end
  end

  defp programs(bridge, options) do
    declared = options.programs.()

    case for {id, args} <- declared,
             text = refused(bridge, args),
             do: "#{Declared.shown(id)}: #{text}" do
      [] when declared == [] ->
        text =
          "none are configured; those that your code gives to a Bridge or Pool are not known here"

        {:ok, text, nil, true}

      [] ->
        {:ok, "#{length(declared)} declared, and created", nil, true}

      texts ->
        advice = "correct it in :programs; its runs fail until then"
        {:failed, Enum.join(texts, "; "), advice, nil}
    end
  end

  defp refused(bridge, args) do
    case Bridge.request(bridge, :create_program, args, timeout: @program_ms) do
      {:ok, _created, _meta} -> nil
      {:error, %Error{message: text}} -> text
    end
  end
end
