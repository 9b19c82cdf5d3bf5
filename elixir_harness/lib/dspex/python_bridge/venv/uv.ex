defmodule DSPex.PythonBridge.Venv.Uv do
  @moduledoc false
  # Makes an environment and installs into it, with the uv on the PATH. Without one, the interpreter's own venv and pip
  # install the pinned uv into the environment's folder. Nothing from a package index is installed or run without the hash
  # that it is pinned by, and nothing is built, as that would run a build backend.

  alias DSPex.PythonBridge.{OS, Options}
  alias DSPex.PythonBridge.Bridge.Redaction
  alias DSPex.PythonBridge.Python.{Interpreter, Probe}
  alias DSPex.PythonBridge.Venv.{Release, Source}

  # Installing DSPy takes 20 to 60 s with a fast connection.
  @time_limit_ms 30 * 60_000
  @error_lines 15

  @enforce_keys [:folder, :source, :progress, :base]
  defstruct [:folder, :source, :progress, :base, :release]

  @typedoc "`base`: the interpreter to make it from; nil if uv chooses it. `release`: nil for one that stays where it is."
  @type t :: %__MODULE__{
          folder: Path.t(),
          source: Source.t(),
          progress: (String.t() -> term()),
          base: Probe.t() | nil,
          release: Release.t() | nil
        }
  @typedoc "`:failed`: a program failed by itself and has kept the old installation."
  @type failure :: {:failed | :error, String.t()}

  @doc "Makes the environment."
  @spec create(t()) :: :ok | failure()
  def create(%__MODULE__{folder: folder, base: base} = setup) do
    from = if base, do: " from #{base.python}, Python #{base.version}"
    python = if base, do: base.python, else: ">=" <> Probe.min_python()
    # The manifest is there already.
    args = ["venv", "--quiet", "--relocatable", "--allow-existing", "--python", python, folder]

    with {:ok, uv} <- uv(setup),
         {:ok, _output} <- run(setup, "making #{folder} with uv#{from}", uv, args),
         do: :ok
  end

  @doc "Installs what is missing into the environment, and tells whether that was anything."
  @spec install(t()) :: {:ok, changed? :: boolean()} | failure()
  def install(%__MODULE__{folder: folder, source: source} = setup) do
    python = Interpreter.in_venv(folder)
    line = "installing the packages with uv: this may take some minutes"
    # Compiled now: the user that runs the peer later may not write there.
    args = ["pip", "install", "--compile-bytecode", "--no-build", "--require-hashes"]

    args =
      args ++ ["--python", python | if(setup.release, do: ["--break-system-packages"], else: [])]

    files = Enum.flat_map(Source.requirements(source), &["-r", &1])

    with {:ok, uv} <- uv(setup),
         {:ok, output} <- run(setup, line, uv, args ++ files),
         do: {:ok, output =~ ~r/^Installed /m}
  end

  defp uv(%__MODULE__{folder: folder} = setup) do
    own = Path.join(folder, ".uv/bin/uv")

    cond do
      uv = System.find_executable("uv") -> {:ok, uv}
      File.exists?(own) -> {:ok, own}
      true -> with :ok <- install_uv(setup), do: {:ok, own}
    end
  end

  defp install_uv(%__MODULE__{folder: folder, source: source} = setup) do
    venv = Path.join(folder, ".uv")
    pins = Path.join(source.folder, "uv.txt")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    pip = pip ++ ["--only-binary", ":all:", "--require-hashes", "-r", pins]

    with {:ok, python} <- python(setup.base),
         line = "installing uv with pip: there is none on the PATH",
         {:ok, _output} <- run(setup, line, python, ["-m", "venv", venv]),
         {:ok, _output} <- run(setup, nil, Path.join(venv, "bin/python3"), pip) do
      :ok
    else
      failure -> failure
    end
  end

  defp python(%Probe{python: python}), do: {:ok, python}

  defp python(nil) do
    case Interpreter.base() do
      {:ok, python, _source} ->
        {:ok, python}

      {:error, text} ->
        {:error,
         "#{text}; install Python #{Probe.min_python()} or newer, or uv, which brings one"}
    end
  end

  @doc "Runs a program, after a line about it."
  @spec run(t(), String.t() | nil, Path.t(), [String.t()]) :: {:ok, String.t()} | failure()
  def run(setup, line, program, args) do
    if line, do: setup.progress.(line)
    # uv reads settings from its working directory, and Python reads modules.
    env = [{~c"PIP_REQUIRE_VIRTUALENV", ~c"1"}, {~c"PYC_INVALIDATION_MODE", bytecode(setup)}]

    case OS.Command.run(program, args, limit_ms: @time_limit_ms, cd: "/", env: env) do
      {:exit, 0, output} -> {:ok, output}
      # From 128 on a signal has killed it.
      {:exit, status, output} when status < 128 -> {:failed, failure(program, status, output)}
      {:exit, status, output} -> {:error, failure(program, status, output)}
      {:error, why} -> {:error, "#{program} failed (#{why})"}
    end
  end

  # Files are copied without their times, by Docker's COPY among others: bytecode in a release is to stay valid.
  defp bytecode(%__MODULE__{release: nil}), do: ~c"TIMESTAMP"
  defp bytecode(_release), do: ~c"UNCHECKED_HASH"

  defp failure(program, status, output) do
    lines = output |> String.split("\n", trim: true) |> Enum.take(-@error_lines)
    text = Enum.map_join(lines, &"\n  #{&1}")
    # URLs of package indexes may have a name and a password.
    text = Regex.replace(~r{://[^/\s]+@}, text, "://[redacted]@")
    text = Redaction.redact(text, %Options{script_path: "", drain_ms: 0, env: fn -> %{} end})
    "#{program} failed (exit status #{status}):" <> text <> mismatch(output)
  end

  # What uv and pip print for it may be longer than what is shown.
  defp mismatch(output) do
    uv = Regex.run(~r/Hash mismatch for `([^`]+)`/, output)
    pip = Regex.run(~r/DO NOT MATCH THE HASHES.*?^\s+(\S+)/ms, output)

    if match = uv || pip,
      do:
        "\nThe package index gave another file for #{Enum.at(match, 1)} than the one that is pinned by its hash, so " <>
          "nothing was installed. It, or a proxy or cache on the way, may have been tampered with.",
      else: ""
  end
end
