defmodule Mix.Tasks.Dspex.Setup do
  @shortdoc "Makes a virtual environment with DSPy and the Python peer"
  @moduledoc """
  Makes a Python virtual environment with the peer `dspy_bridge` and all that it depends on, DSPy first, in the versions
  that it is tested with; then runs `mix dspex.doctor` with it.

      $ mix dspex.setup
      $ mix dspex.setup --path /opt/dspy_venv --python python3.12

    * `--path` – the folder; otherwise that of `config :dspex, :python_environment, virtual_env: …`, or
      `_build/dspex_venv`
    * `--python` – the interpreter that it is made of, 3.10 or newer; otherwise that of the environment variable
      `PYTHON_EXECUTABLE`, or the one that `uv` chooses, or `python3`

  It uses [uv](https://docs.astral.sh/uv) where that is on the `PATH`, else the interpreter's own `venv` and `pip`; both take packages
  from where they are configured to, for the user or the system: a `pyproject.toml` or `uv.toml` of the project is none of theirs.

  Run again it does what is left to do: nothing, or to install what another version of `:dspex` needs. An environment that it
  made is made anew if that was broken off, or its Python is gone, and nothing but what it made is in the folder. One that it did
  not make is added to, never removed. All else is refused: a folder that is no environment, one of another Python than the
  `--python` that is named, one at which another `mix dspex.setup` is at work.

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

  # A folder that is not meant must not be made.
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

  # Whether it is what bridges of this host will start.
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
