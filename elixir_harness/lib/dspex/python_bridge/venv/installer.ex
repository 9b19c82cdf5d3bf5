defmodule DSPex.PythonBridge.Venv.Installer do
  @moduledoc false
  # Makes an environment and installs into it, with uv. Without uv on the PATH, the interpreter's own venv and pip make
  # the environment and install uv into it. Nothing from a package index is installed or run without the hash that it
  # is pinned by: all of it are wheels, as building one would run a build backend.

  alias DSPex.PythonBridge.{OS, Options}
  alias DSPex.PythonBridge.Bridge.Redaction
  alias DSPex.PythonBridge.Python.{Interpreter, Probe}
  alias DSPex.PythonBridge.Venv.{Source, Wheel}

  # Installing DSPy takes 20 to 60 s with a fast connection.
  @time_limit_ms 30 * 60_000
  @error_lines 15

  @enforce_keys [:progress]
  # sign_of_life_ms: the interval of progress lines during a step. bytecode: whether it is valid only while the source has
  # the time that it had.
  defstruct [:progress, :uv, bytecode: :of_a_time, sign_of_life_ms: 10_000]

  @type t :: %__MODULE__{
          progress: (String.t() -> term()),
          uv: Path.t() | nil,
          bytecode: :of_a_time | :for_any_time,
          sign_of_life_ms: pos_integer()
        }
  @typedoc "`:failed`: a program failed by itself and has kept the old installation."
  @type failure :: {:failed | :error, String.t()}

  @spec new((String.t() -> term())) :: t()
  def new(progress), do: %__MODULE__{progress: progress, uv: System.find_executable("uv")}

  @doc "The interpreter to make an environment from, if it can; nil if uv chooses it."
  @spec base(t(), String.t() | nil) :: {:ok, Probe.t() | nil} | {:error, String.t()}
  def base(%__MODULE__{uv: uv}, nil) do
    case Interpreter.base() do
      {:ok, python, source} when uv == nil or source != :path -> fit(python, uv)
      {:error, text} when uv == nil -> {:error, "#{text}; #{what_to_do()}"}
      _none_named -> {:ok, nil}
    end
  end

  def base(%__MODULE__{uv: uv}, named) do
    case Interpreter.executable(named, "--python") do
      {:ok, python} -> fit(python, uv)
      {:error, text} -> {:error, "#{text}; #{what_to_do()}"}
    end
  end

  defp fit(python, uv) do
    with {:ok, probe} <- Probe.run(python, "", []) do
      too_old = Probe.too_old(probe)
      missing = if uv, do: [], else: ["ensurepip", "venv"] -- probe.modules

      cond do
        too_old ->
          {:error, "#{too_old} or newer; #{what_to_do()}"}

        missing != [] ->
          {:error,
           "#{python} can make no virtual environments, as it lacks the module #{hd(missing)}: install it " <>
             "(Debian, Ubuntu: apt install python3-venv), or uv, or name another Python with --python"}

        true ->
          {:ok, probe}
      end
    end
  end

  defp what_to_do,
    do:
      "install Python #{Probe.min_python()} or newer, or uv, which brings one, or name one with --python"

  @doc "Makes the environment."
  @spec create(t(), Path.t(), Source.t(), Probe.t() | nil) :: :ok | failure()
  def create(%__MODULE__{uv: nil} = installer, folder, source, base) do
    line = "making #{folder} from #{base.python}, Python #{base.version}"
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    pip = pip ++ ["--only-binary", ":all:", "--require-hashes", "-r", source.uv]

    with :ok <- step(installer, line, base.python, ["-m", "venv", folder]),
         {:ok, probe} <- probe(folder, []),
         do: step(installer, "installing uv with pip", probe.python, pip)
  end

  def create(%__MODULE__{uv: uv} = installer, folder, _source, base) do
    {of, python} =
      if base,
        do: {" from #{base.python}, Python #{base.version}", base.python},
        else: {"", ">=" <> Probe.min_python()}

    # The manifest is there already.
    args = ["venv", "--quiet", "--allow-existing", "--python", python, folder]

    step(installer, "making #{folder} with uv" <> of, uv, args)
  end

  @doc """
  Probes the folder's interpreter, for the versions of `names`. An error if it is too old, or does not install into
  the folder.
  """
  @spec probe(Path.t(), [String.t()]) :: {:ok, Probe.t()} | {:error, String.t()}
  def probe(folder, names) do
    with {:ok, python} <- python(folder),
         {:ok, probe} <- Probe.run(python, folder, names) do
      cond do
        text = Probe.too_old(probe) ->
          {:error, "#{text}: #{elsewhere()}"}

        not Probe.of?(probe, folder) ->
          {:error,
           "#{folder} is not a virtual environment any more, its Python would install into #{probe.prefix}: #{elsewhere()}"}

        true ->
          {:ok, probe}
      end
    end
  end

  defp python(folder) do
    case Interpreter.lack(folder) do
      nil -> {:ok, Interpreter.in_venv(folder)}
      {:out_of_reach, path} -> {:error, "#{folder}: its Python, #{path}, this user may not reach"}
      _none -> {:error, "#{folder} has no bin/python: #{elsewhere()}"}
    end
  end

  @doc "The advice for a folder that this program may not change."
  @spec elsewhere() :: String.t()
  def elsewhere, do: "remove it yourself, or name another with --path"

  @doc "Installs into the environment in the folder."
  @spec install(t(), Path.t(), Source.t()) :: :ok | failure()
  def install(installer, folder, source) do
    count = map_size(source.pins)
    line = "installing #{count} packages with uv: this may take a minute"
    files = Enum.flat_map(source.requirements, &["-r", &1])
    hashed = ["--no-build", "--require-hashes" | files]

    with {:ok, uv} <- uv(installer, folder),
         :ok <- uv_pip(installer, uv, line, folder, hashed),
         do: install_peer(installer, uv, folder, source)
  end

  # In `lib`, which this program may remove, should it be interrupted.
  defp install_peer(installer, uv, folder, source) do
    with {:ok, wheel} <- Wheel.write(source, Path.join(folder, "lib")) do
      # Always: the peer may have changed under the same version.
      args = ["--no-deps", "--no-index", "--reinstall", "dspy-bridge @ file://" <> encode(wheel)]

      try do
        uv_pip(installer, uv, "installing the peer, dspy_bridge", folder, args)
      after
        File.rm(wheel)
      end
    end
  end

  defp uv(%__MODULE__{uv: nil}, folder) do
    uv = Path.join(folder, "bin/uv")

    if File.exists?(uv),
      do: {:ok, uv},
      else: {:failed, "there is no uv, neither on the PATH nor in #{folder}: install it"}
  end

  defp uv(%__MODULE__{uv: uv}, _folder), do: {:ok, uv}

  # As a plain path, one with a semicolon or a bracket would be misread.
  defp encode(path), do: URI.encode(path, &(&1 == ?/ or URI.char_unreserved?(&1)))

  # Probed before each step: minutes may have passed since the last, and nothing may go into the Python that the
  # environment was made from. Compiled now: the user that runs the peer later may not write there.
  defp uv_pip(installer, uv, line, folder, args) do
    case probe(folder, []) do
      {:ok, %{python: python}} ->
        first = ["pip", "install", "--quiet", "--compile-bytecode", "--python", python]
        step(installer, line, uv, first ++ args)

      {:error, text} ->
        {:failed, text}
    end
  end

  defp step(installer, line, program, args) do
    installer.progress.(line)
    started = System.monotonic_time(:second)

    tick = fn ->
      installer.progress.("  still at it after #{System.monotonic_time(:second) - started} s")
    end

    # uv reads settings from its working directory, and Python reads modules.
    opts = [
      limit_ms: @time_limit_ms,
      tick: {installer.sign_of_life_ms, tick},
      cd: "/",
      env: [{~c"PIP_REQUIRE_VIRTUALENV", ~c"1"} | bytecode(installer)]
    ]

    case OS.Command.run(program, args, opts) do
      {:exit, 0, _output} -> :ok
      # From 128 on a signal has killed it.
      {:exit, status, output} when status < 128 -> {:failed, failure(program, status, output)}
      {:exit, status, output} -> {:error, failure(program, status, output)}
      {:error, why} -> {:error, "#{program} failed (#{why})"}
    end
  end

  # A variable of uv's.
  defp bytecode(%__MODULE__{bytecode: :of_a_time}), do: []

  defp bytecode(%__MODULE__{bytecode: :for_any_time}),
    do: [{~c"PYC_INVALIDATION_MODE", ~c"UNCHECKED_HASH"}]

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
