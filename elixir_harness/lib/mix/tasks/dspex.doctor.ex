defmodule Mix.Tasks.Dspex.Doctor do
  @shortdoc "Checks whether DSPy programs can run here, and says what to do"
  @moduledoc """
  Checks whether DSPy programs can run here: the configuration, the interpreter and its packages, the peer, a ping, a
  program with an LM that needs no network, and whether the configured LM has its key and its server can be reached.

      $ mix dspex.doctor
      $ mix dspex.doctor --ask

  Each line is a check: ✓ has passed, ✗ has failed, with what to do, – is a note, or was skipped since it depends on a
  failed check. The exit status is 1 if any has failed.

  The project's configuration is loaded, its application is not started. Options that your
  code gives to a bridge are not known here: pass them to `DSPex.PythonBridge.Doctor.print/1`.

  No request is made to an LM, but with `--ask`: the configured LM is asked two or three small questions, which show how
  long it takes, and whether it honours response schemas and function calls. What it needs in `:lm_options` is printed.

  `DSPex.PythonBridge.Doctor` describes each check, and how to run them in a release.
  """

  use Mix.Task

  alias DSPex.PythonBridge.Doctor

  @impl Mix.Task
  def run(args) do
    case OptionParser.parse!(args, strict: [ask: :boolean]) do
      {switches, []} ->
        Mix.Task.run("app.config")
        unless Doctor.print(switches, &Mix.shell().info/1), do: exit({:shutdown, 1})

      {_switches, [word | _rest]} ->
        Mix.raise("mix dspex.doctor takes no #{word}; see mix help dspex.doctor")
    end
  end
end
