defmodule Mix.Tasks.Dspex.Setup do
  @shortdoc "Makes a virtual environment with DSPy and the Python peer"
  @moduledoc """
  Makes a Python virtual environment with the peer `dspy_bridge` and everything that it depends on, above all DSPy, in the
  versions that are tested; then runs `mix dspex.doctor` with it.

      $ mix dspex.setup
      $ mix dspex.setup --with litellm --with optimizers
      $ mix dspex.setup --path /opt/dspy_venv --python python3.12
      $ mix dspex.setup --release _build/prod/rel/my_app

    * `--path` – the folder; by default that of `config :dspex, :python_environment, virtual_env: …`, or
      `_build/dspex_venv`
    * `--python` – the interpreter to make it from, 3.10 or newer; by default that of the environment variable
      `PYTHON_EXECUTABLE`, or the one that `uv` chooses, or `python3`
    * `--with litellm` – also LiteLLM, for the LMs that DSPy's own engine does not serve
    * `--with optimizers` – also optuna and numpy, which the optimizers `mipro_v2` and `simba` import
    * `--release` – the folder of a release

  It uses [uv](https://docs.astral.sh/uv). Where that is not on the `PATH`, the `venv` and `pip` of the interpreter install uv
  into the environment's folder. The package index is uv's: PyPI, or that of `UV_DEFAULT_INDEX` or of the user's or
  system's `uv.toml`. A `pyproject.toml` or `uv.toml` of the project is not read.

  A second run does what is left to do: nothing, or it installs what another version of `:dspex` needs. It makes the
  environment anew, with its extras, if its Python is gone, and with `--release` also if it is another one. It refuses a folder
  that it did not make, and an environment of another Python than `--python`.

  Each package is pinned by version and by the hash of each of its files, and nothing else is installed (uv's
  `--require-hashes`), uv itself included if pip installs it. A new environment that could not be completed is removed.

  With `--release`, after `mix release`, the environment is laid into the release, as `dspex_venv`, and may be moved with it,
  to another folder or to a machine of the same system and architecture, and be read-only there. Its `bin/python` is a link, so
  that the machine needs the same Python at the same path; or a copy, of an interpreter that was made to be moved, as uv
  installs them. The page [Deploying](deploying.md#python-in-the-release) has the step for `mix.exs` that does it with each
  `mix release`.

  The exit status is the doctor's. With `--release`, what only the machine has where the release will run is a note: the
  key of the LM, its server, folders.
  """

  use Mix.Task

  alias DSPex.PythonBridge.{Python, Venv}
  alias DSPex.PythonBridge.Python.Interpreter

  # Checks of what is on the machine where a release runs, not where it is built.
  @elsewhere ["lm", "folders"]

  @impl Mix.Task
  def run(args) do
    switches = arguments(args)
    Mix.Task.run("app.config")
    extras = Keyword.get_values(switches, :with)
    opts = [python: switches[:python], with: extras, progress: &Mix.shell().info/1]
    if root = switches[:release], do: release(root, opts), else: make(switches[:path], opts)
  end

  defp make(path, opts) do
    folder = Path.expand(path || Interpreter.configured_venv() || Mix.DSPex.default_venv())
    python = or_raise(Venv.make(folder, opts))
    finish(python, unless(used?(python), do: how_to_use(folder)), [])
  end

  # Its name in the release is that of the default elsewhere.
  defp release(root, opts) do
    unless File.dir?(root),
      do: Mix.raise("--release: there is no folder #{Path.expand(root)}; run `mix release` first")

    folder = Path.join(Path.expand(root), "dspex_venv")
    finish(or_raise(Venv.release(folder, opts)), how_to_release(), @elsewhere)
  end

  defp or_raise({:ok, value}), do: value
  defp or_raise({:error, text}), do: Mix.raise(text)

  defp arguments(args) do
    strict = [path: :string, python: :string, release: :string, with: :keep]

    case OptionParser.parse!(args, strict: strict) do
      {switches, []} ->
        if switches[:path] && switches[:release],
          do: Mix.raise("--path and --release exclude each other")

        switches

      {_switches, [word | _rest]} ->
        Mix.raise("mix dspex.setup takes no #{word}; did you mean --path #{word}?")
    end
  end

  defp finish(python, advice, notes) do
    ok? = Mix.DSPex.doctor(python_executable: python, notes: notes)
    if advice, do: Mix.shell().info(advice)
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

  defp how_to_release do
    """

    The release uses it with this in config/runtime.exs:

        if root = System.get_env("RELEASE_ROOT") do
          config :dspex, :python_environment, virtual_env: Path.join(root, "dspex_venv")
        end
    """
  end
end
