defmodule Mix.Tasks.Dspex.Doctor do
  @shortdoc "Checks whether DSPy programs can run here, and says what to do"
  @moduledoc """
  Checks whether DSPy programs can run here: the configuration, the interpreter and its packages, the peer, a ping, a
  program with an LM that needs no network, and whether the configured LM has its key and its server can be reached.

      $ mix dspex.doctor
      $ mix dspex.doctor --ask
      $ mix dspex.doctor --json

  Each line is a check: ✓ has passed, ✗ has failed, with what to do, – is a note, or was skipped since it depends on a
  failed check. The exit status is 1 if any has failed.

  The project's configuration is loaded, its application is not started. Options that your
  code gives to a bridge are not known here: pass them to `DSPex.PythonBridge.Doctor.print/1`.

  No request is made to an LM, but with `--ask`: the configured LM is asked two or three small questions, which show how
  long it takes, and whether it honours response schemas and function calls. What it needs in `:lm_options` is printed.

  With `--json` standard output has one line, an object
  `{"ok": …, "checks": [{"name", "status", "found", "advice"}, …]}` with a status of `ok`, `failed`, `note` or `skipped`.
  `MIX_QUIET=1` suppresses what Mix itself prints before it runs a task.

  `DSPex.PythonBridge.Doctor` describes each check, and how to run them in a release.
  """

  use Mix.Task

  alias DSPex.PythonBridge.Doctor
  alias DSPex.PythonBridge.Python.Interpreter

  @impl Mix.Task
  def run(args) do
    switches = arguments(args)
    json? = Keyword.get(switches, :json, false)
    Mix.DSPex.load_config(quiet: json?)
    opts = [hint: hint(), ask: Keyword.get(switches, :ask, false)]
    unless report(json?, opts), do: exit({:shutdown, 1})
  end

  defp arguments(args) do
    case OptionParser.parse!(args, strict: [json: :boolean, ask: :boolean]) do
      {switches, []} ->
        switches

      {_switches, [word | _rest]} ->
        Mix.raise("mix dspex.doctor takes no #{word}; see mix help dspex.doctor")
    end
  end

  defp report(true, opts) do
    checks = Doctor.run(opts)
    # Also if the shell is quiet.
    IO.puts(Doctor.to_json(checks))
    Doctor.ok?(checks)
  end

  defp report(false, opts), do: Doctor.print(opts, &Mix.shell().info/1)

  # An environment of dspex.setup is only used if it is configured.
  defp hint do
    venv = Mix.DSPex.default_venv()

    if Interpreter.in_venv(venv),
      do:
        "the one in #{venv} is not configured: #{Mix.DSPex.config_line(venv)}, in #{where(Mix.DSPex.config_file())}"
  end

  defp where({:there, file}), do: file
  defp where({:missing, file}), do: "#{file} (beginning with `import Config`)"
end
