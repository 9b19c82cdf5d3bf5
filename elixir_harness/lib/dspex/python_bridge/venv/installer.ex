defmodule DSPex.PythonBridge.Venv.Installer do
  @moduledoc false
  # The programs of others that make an environment and install into it: uv where there is one, else the
  # interpreter's own venv and pip.

  alias DSPex.PythonBridge.{OS, Options}
  alias DSPex.PythonBridge.Bridge.Redaction
  alias DSPex.PythonBridge.Python.{Interpreter, Probe}
  alias DSPex.PythonBridge.Venv.Source

  # All of DSPy takes 20 to 60 s by a good line.
  @time_limit_ms 30 * 60_000
  @error_lines 15

  @enforce_keys [:progress]
  # sign_of_life_ms: how long a step may be silent.
  defstruct [:progress, :uv, sign_of_life_ms: 10_000]

  @type t :: %__MODULE__{
          progress: (String.t() -> term()),
          uv: Path.t() | nil,
          sign_of_life_ms: pos_integer()
        }

  @spec new((String.t() -> term())) :: t()
  def new(progress), do: %__MODULE__{progress: progress, uv: System.find_executable("uv")}

  @doc "The interpreter to make an environment of, if it can; nil if that is uv's to choose."
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

  @spec create(t(), Path.t(), Probe.t() | nil) :: :ok | {:error, String.t()}
  def create(%__MODULE__{uv: nil} = installer, folder, base) do
    line = "making #{folder} from #{base.python}, Python #{base.version}"
    made(step(installer, line, base.python, ["-m", "venv", folder]))
  end

  def create(%__MODULE__{uv: uv} = installer, folder, base) do
    {of, python} =
      if base,
        do: {" from #{base.python}, Python #{base.version}", base.python},
        else: {"", ">=" <> Probe.min_python()}

    # Existing is the marker.
    args = ["venv", "--quiet", "--allow-existing", "--python", python, folder]
    made(step(installer, "making #{folder} with uv" <> of, uv, args))
  end

  defp made(:ok), do: :ok
  defp made({_how, text}), do: {:error, text}

  @doc """
  What the folder's interpreter says of itself, with the versions of `names`: an error if it is too old, or installs anywhere but
  into the folder.
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
           "#{folder} is no virtual environment any more, its Python would install into #{probe.prefix}: #{elsewhere()}"}

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

  @doc "What is to be done where this program may do nothing."
  @spec elsewhere() :: String.t()
  def elsewhere, do: "remove it yourself, or name another with --path"

  @doc """
  Installs into the environment in the folder; `reinstall?`: what is there may be broken. Of a step that has ended, in
  whichever way, what was there is left whole: `:failed`.
  """
  @spec install(t(), Path.t(), Source.t(), boolean()) ::
          :ok | {:failed, String.t()} | {:error, String.t()}
  def install(installer, folder, source, reinstall?) do
    count = map_size(source.pins)
    line = "installing #{count} packages with #{tool(installer)}: this may take a minute"
    packages = if(reinstall?, do: [reinstall(installer)], else: []) ++ ["-r", source.requirements]
    # Always: it may have changed under the same version.
    peer = ["--no-deps", reinstall(installer), "dspy-bridge @ file://" <> encode(source.package)]

    with :ok <- ensure_pip(installer, folder),
         :ok <- pip(installer, line, folder, packages),
         do: pip(installer, "installing the peer, dspy_bridge", folder, peer)
  end

  # As a path, one with a semicolon or a bracket in it would be read as something else.
  defp encode(path), do: URI.encode(path, &(&1 == ?/ or URI.char_unreserved?(&1)))

  # uv makes environments without it.
  defp ensure_pip(%__MODULE__{uv: nil} = installer, folder) do
    with {:ok, probe} <- again(folder) do
      if "pip" in probe.modules,
        do: :ok,
        else: step(installer, "installing pip", probe.python, ["-m", "ensurepip"])
    end
  end

  defp ensure_pip(_uv, _folder), do: :ok

  defp pip(installer, line, folder, args) do
    with {:ok, probe} <- again(folder) do
      {program, first} = install_by(installer, probe.python)
      step(installer, line, program, first ++ args)
    end
  end

  # Before each step: minutes may have passed since the last, and the one that it was made of must stay as it is.
  defp again(folder) do
    with {:error, text} <- probe(folder, []), do: {:failed, text}
  end

  # Compiled now: the user that runs the peer later may not write there.
  defp install_by(%__MODULE__{uv: nil}, python) do
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    {python, ["-m", "pip", "install"] ++ quiet}
  end

  defp install_by(%__MODULE__{uv: uv}, python),
    do: {uv, ["pip", "install", "--quiet", "--compile-bytecode", "--python", python]}

  defp reinstall(%__MODULE__{uv: nil}), do: "--force-reinstall"
  defp reinstall(_uv), do: "--reinstall"

  defp tool(%__MODULE__{uv: nil}), do: "pip"
  defp tool(_uv), do: "uv"

  defp step(installer, line, program, args) do
    installer.progress.(line)
    started = System.monotonic_time(:second)

    tick = fn ->
      installer.progress.("  still at it after #{System.monotonic_time(:second) - started} s")
    end

    # uv reads settings in the folder that it is started in, and Python modules.
    opts = [
      limit_ms: @time_limit_ms,
      tick: {installer.sign_of_life_ms, tick},
      cd: "/",
      env: [{~c"PIP_REQUIRE_VIRTUALENV", ~c"1"}]
    ]

    case OS.Command.run(program, args, opts) do
      {:exit, 0, _output} -> :ok
      # Higher ones are signals: it was killed.
      {:exit, status, output} when status < 128 -> {:failed, failure(program, status, output)}
      {:exit, status, output} -> {:error, failure(program, status, output)}
      {:error, why} -> {:error, "#{program} failed (#{why})"}
    end
  end

  defp failure(program, status, output) do
    said =
      output
      |> String.split("\n", trim: true)
      |> Enum.take(-@error_lines)
      |> Enum.map_join(&"\n  #{&1}")

    "#{program} failed (exit status #{status}):" <> redact(said)
  end

  # Addresses of package indexes may have a name and a password in them.
  defp redact(text) do
    text = Regex.replace(~r{://[^/\s]+@}, text, "://[redacted]@")
    Redaction.redact(text, %Options{script_path: "", env: fn -> %{} end})
  end
end
