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

  alias DSPex.PythonBridge.{EnvironmentCheck, Monitor, Options, Python}
  alias DSPex.PythonBridge.Doctor.{Folders, LM, Packages, Peer}
  alias DSPex.PythonBridge.Python.{Interpreter, Probe}

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
    * `:hint` – the advice if no interpreter is configured
    * `:decided` – what decided on the interpreter, if not the configuration
    * `:notes` – names of checks whose failure is a note, such as those of what only the machine has that will run this
  """
  @spec run(keyword()) :: [check()]
  def run(opts \\ []) do
    # A release's `eval` loads no application, and so no configuration.
    Application.load(:dspex)
    {each, opts} = Keyword.pop(opts, :each, fn _check -> :ok end)
    {hint, opts} = Keyword.pop(opts, :hint)
    {decided, opts} = Keyword.pop(opts, :decided)
    {notes, opts} = Keyword.pop(opts, :notes, [])
    {ask?, opts} = Keyword.pop(opts, :ask, false)
    done = {each, notes}

    first = [
      {"configuration", [], fn _facts -> configuration(opts) end},
      {"interpreter", ["configuration"], &interpreter(&1, hint, decided)},
      {"version", ["interpreter"], &version/1}
    ]

    {checks, facts} = Enum.map_reduce(first, %{}, &check(&1, &2, done))
    {more, facts} = facts |> packages() |> Enum.map_reduce(facts, &check(&1, &2, done))

    last = [
      {"optimizers", ["version"], &Packages.check_optimizers(&1["version"])},
      {"script", ["configuration"], &script/1},
      {"package", ["version", "script"], &package/1},
      {"folders", ["configuration"], &Folders.check(&1["configuration"].options)},
      {"ping", ["package", "dspy"], &Peer.ping(opts, &1["configuration"].options)},
      {"program", ["ping"], &Peer.program(&1["ping"])},
      {"programs", ["program"], &Peer.programs(&1["ping"], &1["configuration"].options)},
      {"lm", ["dspy"], &LM.check(&1["interpreter"], &1["configuration"].options)}
      | if(ask?,
          do: [{"ask", ["lm"], &LM.ask(&1["interpreter"], &1["configuration"].options)}],
          else: []
        )
    ]

    {rest, facts} = Enum.map_reduce(last, facts, &check(&1, &2, done))
    Peer.stop(facts["ping"])
    checks ++ more ++ rest
  end

  # A check returns its status, what it found, its advice, and a fact for later checks; nil: these are skipped.
  defp check({name, needs, fun}, facts, {each, notes}) do
    {status, found, advice, fact} =
      case Enum.find(needs, &(facts[&1] == nil)) do
        nil -> fun.(facts)
        missing -> {:skipped, "needs #{missing}", nil, nil}
      end

    status = if status == :failed and name in notes, do: :note, else: status
    check = %{name: name, status: status, found: found, advice: advice}
    each.(check)
    {check, Map.put(facts, name, fact)}
  end

  @doc "Whether no check has failed."
  @spec ok?([check()]) :: boolean()
  def ok?(checks), do: Enum.all?(checks, &(&1.status != :failed))

  @doc """
  Runs the checks, with the options of `run/1`, and passes each to `puts` as lines of text when it is done, and a
  summary at the end. Returns whether no check has failed.
  """
  @spec print(keyword(), (String.t() -> term())) :: boolean()
  def print(opts \\ [], puts \\ &IO.puts/1) do
    marks = marks()
    checks = opts |> Keyword.put(:each, &puts.(lines(&1, marks))) |> run()
    puts.(summary(checks))
    ok?(checks)
  end

  @doc "The checks as one JSON object, `{\"ok\": …, \"checks\": [{\"name\", \"status\", \"found\", \"advice\"}, …]}`."
  @spec to_json([check()]) :: String.t()
  def to_json(checks), do: JSON.encode!(%{ok: ok?(checks), checks: checks})

  defp marks do
    if :io.getopts()[:encoding] == :unicode,
      do: %{ok: "✓", failed: "✗", note: "–", skipped: "–"},
      else: %{ok: "ok  ", failed: "FAIL", note: "-   ", skipped: "-   "}
  end

  defp lines(check, marks) do
    found = if check.status == :skipped, do: "skipped: #{check.found}", else: check.found
    mark = marks[check.status]
    line = "#{mark} #{String.pad_trailing(check.name, 14)}#{found}"

    if check.advice,
      do:
        line <> "\n" <> String.duplicate(" ", String.length(mark) + 15) <> "-> " <> check.advice,
      else: line
  end

  defp summary(checks) do
    case Enum.count(checks, &(&1.status == :failed)) do
      0 -> "All is well."
      1 -> "1 check failed."
      failed -> "#{failed} checks failed."
    end
  end

  ## The checks without a module of their own

  defp configuration(opts) do
    results = [Python.Config.required_packages(), Python.Config.bridge(opts)]
    monitor = Python.Config.checked(Monitor.options(), :python_bridge_monitor)
    others = [monitor, Python.Config.keys()]
    problems = for {:error, text} <- results ++ others, do: text

    # The other checks need those two only.
    facts =
      with [ok: required, ok: options] <- results,
           do: %{required: required, options: options},
           else: (_wrong -> nil)

    if problems == [],
      do: {:ok, "its keys and types are right" <> autostart(), nil, facts},
      else: {:failed, Enum.join(problems, "; "), "correct it in config/", facts}
  end

  defp autostart do
    if Application.get_env(:dspex, :autostart, true),
      do: "; :dspex starts a Bridge (:autostart), one Python more if you have a Pool",
      else: ""
  end

  defp interpreter(facts, hint, decided) do
    case Interpreter.locate(facts["configuration"].options.python_executable) do
      {:ok, python, source} ->
        advice = about(source, hint)
        found = "#{python} (#{decided || Interpreter.describe(source)})"
        {if(advice, do: :note, else: :ok), found, advice, python}

      {:error, text} ->
        {:failed, text, hint || "name one that is there#{with_setup()}", nil}
    end
  end

  # Without --path it uses the configured folder.
  defp with_setup do
    path = if Interpreter.configured_venv(), do: " --path FOLDER", else: ""
    "; `mix dspex.setup#{path}` makes a virtual environment"
  end

  defp about(:option, _hint), do: nil

  # A relative path, which is found only from here.
  defp about(:virtual_env, _hint) do
    case Interpreter.relative(Interpreter.configured_venv()) do
      "" -> nil
      "; " <> text -> text
    end
  end

  defp about(_by_chance, hint), do: hint

  defp version(%{"configuration" => config, "interpreter" => python}) do
    names = required(config) ++ Packages.optimizers()

    case EnvironmentCheck.probe(python, names, config.options) do
      {:ok, probe} ->
        if text = Probe.too_old(probe),
          do: {:failed, text, newer(), nil},
          else: {:ok, probe.version, nil, probe}

      {:error, text} ->
        {:failed, text, "see whether #{python} runs by itself: #{python} --version", nil}
    end
  end

  defp newer,
    do:
      "use Python #{Probe.min_python()} or newer: `mix dspex.setup --path FOLDER --python PYTHON` makes a virtual " <>
        "environment of one"

  defp packages(facts) do
    for name <- required(facts["configuration"]),
        do: {name, ["version"], &Packages.check(name, &1["version"])}
  end

  # The peer needs these, whatever the configuration requires; dspy-ai is the old name of dspy.
  defp required(nil), do: Packages.needed()

  defp required(%{required: required}),
    do: Packages.needed() ++ (required -- ["dspy-ai" | Packages.needed()])

  defp script(%{"configuration" => %{options: %Options{script_path: path}}}) do
    case EnvironmentCheck.script(path) do
      {:ok, source} ->
        {:ok, path, nil, source}

      {:error, text} ->
        {:failed, text <> relative_script(),
         "leave :script_path out to use that of the package, or make it readable for this user",
         nil}
    end
  end

  defp relative_script do
    case Keyword.get(Application.get_env(:dspex, :python_bridge, []), :script_path) do
      nil -> ""
      path -> Interpreter.relative(path)
    end
  end

  defp package(%{"configuration" => config, "version" => probe, "script" => source}) do
    case EnvironmentCheck.bridge_package(probe, source, config.options.script_path) do
      {:ok, true} -> {:ok, "it comes with the script", nil, true}
      {:ok, folder} -> {:ok, "dspy_bridge in #{folder}", nil, folder}
      {:error, text} -> {:failed, text, "`mix dspex.setup` installs it", nil}
    end
  end
end
