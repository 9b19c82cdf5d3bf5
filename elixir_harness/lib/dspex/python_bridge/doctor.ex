defmodule DSPex.PythonBridge.Doctor do
  @moduledoc """
  A checklist: whether a bridge can work here, what was found, and for each failure what to do. `mix dspex.doctor`
  prints it; without Mix, for example in a release:

      bin/my_app eval "DSPex.PythonBridge.Doctor.print() || System.halt(1)"

  The checks, in their order; one that builds on a failed one is skipped:

  | name | what |
  | --- | --- |
  | `configuration` | that of `:dspex`: keys, with the nearest right one of a misspelt one, and types |
  | `interpreter` | which Python, and what decided |
  | `version` | of that Python |
  | `dspy`, `psutil`, and what `required_packages` names | their versions |
  | `script`, `package` | the peer's script, and where its package `dspy_bridge` is |
  | `folders` | those of `DSPY_BRIDGE_STATE_DIR`, `DSPY_BRIDGE_FILES_DIR` and `DSPY_BRIDGE_DISK_CACHE`, where set |
  | `ping` | a peer, started with the host's settings, answers |
  | `program` | a program of that peer answers, by `offline/echo`: DSPy works |
  | `lm` | the default LM's name, and whether the key that it needs is set, never its value; nothing is sent to it |

  Options given in code, as to a bridge in a supervisor of the host's, are not seen: hand them to `print/1` or `run/1`.

  It starts a bridge of its own, without a name, and stops it. Nothing of the host needs to run. All of it is bounded
  in time: a few seconds, at most three minutes where all that can hang does.
  """

  alias DSPex.PythonBridge.{EnvironmentCheck, Monitor, Options, Python}
  alias DSPex.PythonBridge.Doctor.{Folders, LM, Packages, Peer}
  alias DSPex.PythonBridge.Python.{Interpreter, Probe}

  @typedoc """
  `status`: `:note` is something to know that may be as it should; `:skipped`: it builds on a check that failed.
  `advice`: what to do; nil if there is nothing to say.
  """
  @type check :: %{
          name: String.t(),
          status: :ok | :failed | :note | :skipped,
          found: String.t(),
          advice: String.t() | nil
        }

  @doc """
  Makes the checks. Options: those of a bridge (`DSPex.PythonBridge.Options`), over the configuration of the
  application, and

    * `:each` – a function that is called with each check as it is made
    * `:hint` – a text for whoever has configured no interpreter
    * `:decided` – what is said to have decided on the interpreter, if not the configuration has
  """
  @spec run(keyword()) :: [check()]
  def run(opts \\ []) do
    # In a release's `eval` nothing is loaded: its configuration would not be seen.
    Application.load(:dspex)
    {each, opts} = Keyword.pop(opts, :each, fn _check -> :ok end)
    {hint, opts} = Keyword.pop(opts, :hint)
    {decided, opts} = Keyword.pop(opts, :decided)

    first = [
      {"configuration", [], fn _facts -> configuration(opts) end},
      {"interpreter", ["configuration"], &interpreter(&1, hint, decided)},
      {"version", ["interpreter"], &version/1}
    ]

    {checks, facts} = Enum.map_reduce(first, %{}, &check(&1, &2, each))
    {more, facts} = facts |> packages() |> Enum.map_reduce(facts, &check(&1, &2, each))

    last = [
      {"script", ["configuration"], &script/1},
      {"package", ["version", "script"], &package/1},
      {"folders", ["configuration"], &Folders.check(&1["configuration"].options)},
      {"ping", ["package", "dspy"], &Peer.ping(opts, &1["configuration"].options)},
      {"program", ["ping"], &Peer.program(&1["ping"])},
      {"lm", ["dspy"], &LM.check(&1["interpreter"], &1["configuration"].options)}
    ]

    {rest, facts} = Enum.map_reduce(last, facts, &check(&1, &2, each))
    Peer.stop(facts["ping"])
    checks ++ more ++ rest
  end

  # A check gives its status, what it found, its advice, and what later ones build on; nil: nothing can.
  defp check({name, needs, fun}, facts, each) do
    {status, found, advice, fact} =
      case Enum.find(needs, &(facts[&1] == nil)) do
        nil -> fun.(facts)
        missing -> {:skipped, "needs #{missing}", nil, nil}
      end

    check = %{name: name, status: status, found: found, advice: advice}
    each.(check)
    {check, Map.put(facts, name, fact)}
  end

  @doc "Whether none has failed."
  @spec ok?([check()]) :: boolean()
  def ok?(checks), do: Enum.all?(checks, &(&1.status != :failed))

  @doc """
  Makes the checks, with the options of `run/1`, and hands each to `puts` as lines of text, when it is made, and at the end
  a summary. Gives whether none has failed.
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

  ## The checks that are no module of their own

  defp configuration(opts) do
    results = [Python.Config.required_packages(), Python.Config.bridge(opts)]
    monitor = Python.Config.checked(Monitor.options(), :python_bridge_monitor)
    others = [monitor, Python.Config.keys()]
    problems = for {:error, text} <- results ++ others, do: text

    # With those two the rest can be told, whatever else is wrong.
    facts =
      with [ok: required, ok: options] <- results,
           do: %{required: required, options: options},
           else: (_wrong -> nil)

    if problems == [],
      do: {:ok, "its keys and types are right", nil, facts},
      else: {:failed, Enum.join(problems, "; "), "correct it in config/", facts}
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

  # A folder that is configured it would take, whatever that is.
  defp with_setup do
    path = if Interpreter.configured_venv(), do: " --path FOLDER", else: ""
    "; `mix dspex.setup#{path}` makes a virtual environment"
  end

  defp about(:option, _hint), do: nil

  # One that is found only from here.
  defp about(:virtual_env, _hint) do
    case Interpreter.relative(Interpreter.configured_venv()) do
      "" -> nil
      "; " <> text -> text
    end
  end

  defp about(_by_chance, hint), do: hint

  defp version(%{"configuration" => config, "interpreter" => python}) do
    case EnvironmentCheck.probe(python, required(config), config.options) do
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

  # The peer needs both, whatever the configuration requires; dspy-ai is its old name.
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
