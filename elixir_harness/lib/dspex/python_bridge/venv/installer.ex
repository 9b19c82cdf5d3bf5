defmodule DSPex.PythonBridge.Venv.Installer do
  @moduledoc false
  # The programs of others that make an environment and install into it: uv where there is one, else the
  # interpreter's own venv and pip.

  alias DSPex.PythonBridge.{Interpreter, Options, OsCommand, Probe, Redaction}
  alias DSPex.PythonBridge.Venv.Source

  # All of DSPy takes 20 to 60 s by a good line.
  @time_limit_ms 30 * 60_000
  @sign_of_life_ms 10_000
  @error_lines 15

  @enforce_keys [:progress]
  defstruct [:progress, :uv]

  @type t :: %__MODULE__{progress: (String.t() -> term()), uv: Path.t() | nil}

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
    step(installer, line, base.python, ["-m", "venv", folder])
  end

  def create(%__MODULE__{uv: uv} = installer, folder, base) do
    {of, python} =
      if base,
        do: {" from #{base.python}, Python #{base.version}", base.python},
        else: {"", ">=" <> Probe.min_python()}

    # Existing is the marker.
    args = ["venv", "--quiet", "--allow-existing", "--python", python, folder]
    step(installer, "making #{folder} with uv" <> of, uv, args)
  end

  @doc "Installs into the environment of the interpreter that was probed; `reinstall?`: what is there may be broken."
  @spec install(t(), Probe.t(), Source.t(), boolean()) :: :ok | {:error, String.t()}
  def install(installer, probe, source, reinstall?) do
    count = map_size(source.pins)
    line = "installing #{count} packages with #{tool(installer)}: this may take a minute"
    packages = if(reinstall?, do: [reinstall(installer)], else: []) ++ ["-r", source.requirements]
    # Always: it may have changed under the same version.
    peer = ["--no-deps", reinstall(installer), "dspy-bridge @ file://" <> encode(source.package)]

    with :ok <- ensure_pip(installer, probe),
         :ok <- pip(installer, line, probe.python, packages),
         do: pip(installer, "installing the peer, dspy_bridge", probe.python, peer)
  end

  # As a path, one with a semicolon or a bracket in it would be read as something else.
  defp encode(path), do: URI.encode(path, &(&1 == ?/ or URI.char_unreserved?(&1)))

  # uv makes environments without it.
  defp ensure_pip(%__MODULE__{uv: nil} = installer, probe) do
    if "pip" in probe.modules,
      do: :ok,
      else: step(installer, "installing pip", probe.python, ["-m", "ensurepip"])
  end

  defp ensure_pip(_uv, _probe), do: :ok

  # Compiled now: the user that runs the peer later may not write there.
  defp pip(%__MODULE__{uv: nil} = installer, line, python, args) do
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    step(installer, line, python, ["-m", "pip", "install"] ++ quiet ++ args)
  end

  defp pip(%__MODULE__{uv: uv} = installer, line, python, args) do
    options = ["--quiet", "--compile-bytecode", "--python", python]
    step(installer, line, uv, ["pip", "install"] ++ options ++ args)
  end

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

    opts = [limit_ms: @time_limit_ms, tick: {@sign_of_life_ms, tick}]

    case OsCommand.run_guarded(program, args, opts) do
      {:exit, 0, _output} -> :ok
      {:exit, status, output} -> failed(program, "exit status #{status}", output)
      {:error, why} -> failed(program, why, "")
    end
  end

  defp failed(program, why, output) do
    said =
      output
      |> String.split("\n", trim: true)
      |> Enum.take(-@error_lines)
      |> Enum.map_join(&"\n  #{&1}")

    {:error, "#{program} failed (#{why}):" <> redact(said)}
  end

  # Addresses of package indexes may have a name and a password in them.
  defp redact(text) do
    text = Regex.replace(~r{://[^/\s]+@}, text, "://[redacted]@")
    Redaction.redact(text, %Options{script_path: "", env: fn -> %{} end})
  end
end
