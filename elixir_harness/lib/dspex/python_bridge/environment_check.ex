defmodule DSPex.PythonBridge.EnvironmentCheck do
  @moduledoc """
  Checks before the first call whether this machine has what a bridge needs: the configuration, the interpreter, its
  version, the installed packages, the peer's script. `DSPex.PythonBridge.Doctor` reports each by itself, and starts
  a peer.

  `config :dspex, :python_environment`:

    * `:virtual_env` – the folder of a virtual environment
    * `:required_packages` – distribution names, as `pip` has them (default `["dspy", "psutil"]`)
  """

  alias DSPex.PythonBridge.{Monitor, Options, Python}
  alias DSPex.PythonBridge.Python.{Interpreter, Probe}

  # A script without these is not a peer's.
  @script_texts ["class DSPyBridge", "def handle_command", "def main():"]

  @type report :: %{
          python_path: Path.t(),
          script_path: Path.t(),
          python_version: String.t(),
          dspy_version: String.t() | nil,
          packages: %{String.t() => String.t()}
        }

  @doc """
  Checks everything with one launch of the interpreter (at most 15 s; usually 50 ms).

  `packages` of the result maps each required package to its version. An error is a string with what is wrong and what
  was expected.
  """
  @spec validate_environment() :: {:ok, report()} | {:error, String.t()}
  def validate_environment do
    with {:ok, required} <- Python.Config.required_packages(),
         {:ok, options} <- Python.Config.bridge(),
         {:ok, _monitor} <- Python.Config.checked(Monitor.options(), :python_bridge_monitor),
         {:ok, python} <- Interpreter.find(options.python_executable),
         {:ok, source} <- script(options.script_path),
         {:ok, probe} <- probe(python, required, options),
         nil <- Probe.too_old(probe),
         {:ok, packages} <- packages(required, probe),
         {:ok, _folder} <- bridge_package(probe, source, options.script_path) do
      {:ok,
       %{
         python_path: python,
         script_path: options.script_path,
         python_version: probe.version,
         dspy_version: version("dspy", probe),
         packages: packages
       }}
    else
      {:error, text} -> {:error, text}
      too_old -> {:error, too_old}
    end
  end

  @doc "The source of the peer's script, if it is one."
  @spec script(Path.t()) :: {:ok, String.t()} | {:error, String.t()}
  def script(path) do
    with {:ok, source} <- File.read(path),
         [] <- Enum.reject(@script_texts, &String.contains?(source, &1)) do
      {:ok, source}
    else
      {:error, :enoent} -> {:error, "script not found: #{path}"}
      {:error, why} -> {:error, "script not readable: #{path} (#{:file.format_error(why)})"}
      missing -> {:error, "#{path} is not a peer's script: it lacks #{list(missing)}"}
    end
  end

  # The next three are also for `DSPex.PythonBridge.Doctor`.

  # The required packages of the interpreter, in the environment that the peer gets.
  @doc false
  @spec probe(Path.t(), [String.t()], Options.t()) :: {:ok, Probe.t()} | {:error, String.t()}
  def probe(python, required, options) do
    names = Enum.uniq(Enum.flat_map(required, &names/1))
    Probe.run(python, options.script_path, names, Options.port_env(options))
  end

  # The version of a package that the probe was made for; nil if it is not installed.
  @doc false
  @spec version(String.t(), Probe.t()) :: String.t() | nil
  def version(package, probe), do: Enum.find_value(names(package), &probe.found[&1])

  # dspy-ai is the old name of dspy: either may be required or installed.
  defp names(name) when name in ["dspy", "dspy-ai"], do: ["dspy", "dspy-ai"]
  defp names(name), do: [name]

  defp packages(required, probe) do
    versions = Map.new(required, &{&1, version(&1, probe)})

    missing = for name <- required, versions[name] == nil, do: name

    todo =
      if probe.venv?, do: "install them there", else: "`mix dspex.setup` makes an environment"

    if missing == [],
      do: {:ok, versions},
      else: {:error, "missing in #{probe.python}: #{list(missing)} (#{todo})"}
  end

  # Where the peer's package is: a folder, or true if it is somewhere, or the script is one of another kind, which brings
  # what it needs.
  @doc false
  @spec bridge_package(Probe.t(), String.t(), Path.t()) ::
          {:ok, String.t() | true} | {:error, String.t()}
  def bridge_package(%Probe{bridge: false} = probe, source, script) do
    if String.contains?(source, "from dspy_bridge"),
      do:
        {:error,
         "the package dspy_bridge is neither next to #{script} nor installed in #{probe.python} " <>
           "(install it for that interpreter)"},
      else: {:ok, true}
  end

  def bridge_package(probe, _source, _script), do: {:ok, probe.bridge}

  defp list(names), do: Enum.map_join(names, ", ", &"`#{&1}`")
end
