defmodule Mix.Tasks.Dspex.Setup do
  @shortdoc "Makes a virtual environment with DSPy and the Python peer"
  @moduledoc """
  Makes a Python virtual environment with the peer `dspy_bridge` and everything that it depends on, above all DSPy, in the
  versions that are tested; then runs `mix dspex.doctor` with it.

      $ mix dspex.setup
      $ mix dspex.setup --path /opt/dspy_venv --python python3.12

    * `--path` – the folder; by default that of `config :dspex, :python_environment, virtual_env: …`, or
      `_build/dspex_venv`
    * `--python` – the interpreter to make it from, 3.10 or newer; by default that of the environment variable
      `PYTHON_EXECUTABLE`, or the one that `uv` chooses, or `python3`

  It uses [uv](https://docs.astral.sh/uv). Where that is not on the `PATH`, the interpreter's own `venv` and `pip` make the
  environment and install uv into it. The package index is uv's: PyPI, or that of `UV_DEFAULT_INDEX` or of the user's or
  system's `uv.toml`. A `pyproject.toml` or `uv.toml` of the project is not read.

  A second run does what is left to do: nothing, or it installs what another version of `:dspex` needs. It makes its
  environment anew if an earlier run was interrupted or the Python is gone, and the folder has nothing else in it. It
  refuses a folder that it did not make, an environment of another Python than `--python`, and a folder at which another
  `mix dspex.setup` is at work.

  The exit status is the doctor's.
  """

  use Mix.Task

  alias DSPex.PythonBridge.{Doctor, Python, Venv}
  alias DSPex.PythonBridge.Python.Interpreter

  @impl Mix.Task
  def run(args) do
    switches = arguments(args)
    Mix.DSPex.load_config()
    folder = Path.expand(switches[:path] || configured() || Mix.DSPex.default_venv())

    case Venv.make(folder, python: switches[:python], progress: &Mix.shell().info/1) do
      {:ok, python} -> finish(folder, python)
      {:error, text} -> Mix.raise(text)
    end
  end

  defp arguments(args) do
    case OptionParser.parse!(args, strict: [path: :string, python: :string]) do
      {switches, []} ->
        switches

      {_switches, [word | _rest]} ->
        Mix.raise("mix dspex.setup takes no #{word}; did you mean --path #{word}?")
    end
  end

  # With a wrong configuration it would make the wrong folder.
  defp configured do
    case Python.Config.required_packages() do
      {:ok, _packages} -> Interpreter.configured_venv()
      {:error, text} -> Mix.raise(text)
    end
  end

  defp finish(folder, python) do
    opts = [python_executable: python, decided: "the one that was set up"]
    ok? = Doctor.print(opts, &Mix.shell().info/1)
    unless used?(python), do: Mix.shell().info(how_to_use(folder))
    unless ok?, do: exit({:shutdown, 1})
  end

  # Whether the bridges of this project will start it.
  defp used?(python), do: Interpreter.find(named()) == {:ok, python}

  defp named do
    with {:ok, options} <- Python.Config.bridge(),
         do: options.python_executable,
         else: (_wrong -> nil)
  end

  defp how_to_use(folder) do
    first =
      if named(),
        do: " and remove :python_executable from :python_bridge, which comes first",
        else: ""

    {where, import_line} =
      case Mix.DSPex.config_file() do
        {:there, file} -> {"have this in #{file}", ""}
        {:missing, file} -> {"make #{file} with this", "import Config\n\n    "}
      end

    """

    To use it, #{where}#{first}:

        #{import_line}#{Mix.DSPex.config_line(folder)}
    """
  end
end
