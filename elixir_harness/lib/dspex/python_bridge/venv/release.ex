defmodule DSPex.PythonBridge.Venv.Release do
  @moduledoc false
  # Makes an environment that may be moved out of a virtual environment that was just made. A virtual environment has
  # absolute paths: to its Python (the link bin/python3, pyvenv.cfg) and in its scripts.
  #
  # What remains are the packages, whose bytecode does not depend on the times of files, and a bin/python3. That is a copy
  # of the interpreter, where this was made to be moved (python-build-standalone: those of uv), else a script that runs
  # the Python of the same minor version of the machine it finds itself on.

  alias DSPex.PythonBridge.OS
  alias DSPex.PythonBridge.Python.{Interpreter, Probe}
  alias DSPex.PythonBridge.Venv.{Installer, Source}

  @about """
  import json, os, sys, sysconfig
  minor = "%d.%d" % sys.version_info[:2]
  prefix = os.path.realpath(sys.base_prefix)
  standalone = bool(sysconfig.get_config_var("PYTHON_BUILD_STANDALONE"))
  print("DSPEX " + json.dumps({"minor": minor, "prefix": prefix, "standalone": standalone}))
  """

  # Of the pip that may have made the environment, and of Python up to 3.11.
  @tools ~w(pip uv setuptools pkg_resources _distutils_hack distutils-precedence.pth)
  @compile_limit_ms 10 * 60_000

  @enforce_keys [:probe, :minor, :prefix, :standalone?]
  defstruct [:probe, :minor, :prefix, :standalone?]

  @typedoc "The interpreter to make it from: `minor` is 3.11, `prefix` the folder it is installed in."
  @type base :: %__MODULE__{
          probe: Probe.t(),
          minor: String.t(),
          prefix: Path.t(),
          standalone?: boolean()
        }

  @doc "The interpreter that is named, else `PYTHON_EXECUTABLE` or `python3`: never one that uv chooses."
  @spec base(Installer.t(), String.t() | nil) :: {:ok, base()} | {:error, String.t()}
  def base(installer, named) do
    with {:ok, named} <- named(named),
         {:ok, probe} <- Installer.base(installer, named),
         {:exit, 0, output} <- OS.Command.run(probe.python, ["-c", @about], cd: "/"),
         %{"minor" => minor, "prefix" => prefix} = about <- Probe.answer(output) do
      standalone? = about["standalone"] == true
      {:ok, %__MODULE__{probe: probe, minor: minor, prefix: prefix, standalone?: standalone?}}
    else
      {:error, text} -> {:error, text}
      _other -> {:error, "#{named} cannot be asked where it is installed"}
    end
  end

  defp named(nil) do
    case Interpreter.base() do
      {:ok, python, _source} -> {:ok, python}
      {:error, text} -> {:error, "#{text}; name one with --python"}
    end
  end

  defp named(named), do: {:ok, named}

  @doc "What an environment is compared with that an earlier run has made."
  @spec stamp(Source.t(), base()) :: String.t()
  def stamp(source, base),
    do:
      Enum.join(
        [source.stamp, base.probe.version, if(base.standalone?, do: "own", else: "found")],
        " "
      )

  @doc "What a machine must have on which it runs, as text."
  @spec needs(base()) :: String.t()
  def needs(%{standalone?: true} = base), do: "it has its own Python, #{base.probe.version}"

  def needs(base),
    do: "it needs a Python #{base.minor} where it runs: python#{base.minor} on the PATH"

  @doc "Whether the environment in the folder has everything, where it is now."
  @spec check(Path.t(), Source.t()) :: {:ok, Path.t()} | {:error, String.t()}
  def check(folder, source) do
    with {:ok, probe} <- Probe.run(Path.join(folder, "bin/python3"), "", Source.names(source)) do
      if Source.installed?(source, probe.found),
        do: {:ok, probe.python},
        else:
          {:error,
           "#{probe.python} does not find all packages of #{folder}: remove it and run this again"}
    end
  end

  @doc "Makes the virtual environment in the folder one that may be moved."
  @spec detach(Path.t(), base()) :: :ok | {:error, String.t()}
  def detach(folder, base) do
    site = Path.join(folder, "lib/python#{base.minor}/site-packages")
    bin = Path.join(folder, "bin")
    for path <- tools(site), do: File.rm_rf!(path)

    for name <- ~w(bin include lib64 pyvenv.cfg .lock CACHEDIR.TAG),
        do: File.rm_rf!(Path.join(folder, name))

    if base.standalone? do
      copy(base, folder, site)
    else
      File.mkdir!(bin)
      File.write!(Path.join(bin, "python3"), script(base))
      File.chmod!(Path.join(bin, "python3"), 0o755)
      File.ln_s!("python3", Path.join(bin, "python"))
    end
  rescue
    error in [File.Error, File.CopyError, File.RenameError, File.LinkError] ->
      {:error, Exception.message(error)}
  end

  defp tools(site) do
    for name <- File.ls!(site),
        tool <- @tools,
        name == tool or (String.starts_with?(name, tool <> "-") and name =~ ".dist-info"),
        do: Path.join(site, name)
  end

  # The packages in the place of the interpreter's own.
  defp copy(base, folder, site) do
    kept = Path.join(folder, "lib/site-packages")
    File.rename!(site, kept)
    File.rm_rf!(Path.dirname(site))
    for name <- ~w(bin lib), do: File.cp_r!(Path.join(base.prefix, name), Path.join(folder, name))
    File.rm_rf!(site)
    File.rename!(kept, site)

    # The others start with the path of the interpreter.
    for name <- File.ls!(Path.join(folder, "bin")),
        not String.starts_with?(name, "python") or name =~ "config",
        do: File.rm!(Path.join([folder, "bin", name]))

    compile(folder, "unchecked-hash", [Path.dirname(site)], ["-x", "/site-packages/"])
  end

  @doc "Compiles the peer's code in the release that the environment's folder is in."
  @spec compile_peer(Path.t()) :: :ok | {:error, String.t()}
  def compile_peer(folder) do
    # Not Path.wildcard: the folder's own path may have pattern characters.
    lib = Path.join(Path.dirname(folder), "lib")

    peers =
      for name <- if(File.dir?(lib), do: File.ls!(lib), else: []),
          path = Path.join([lib, name, "priv/python"]),
          String.starts_with?(name, "dspex-") and File.dir?(path),
          do: path

    if peers == [], do: :ok, else: compile(folder, "checked-hash", peers, [])
  end

  # Files are copied without their times, by Docker's COPY among others: bytecode is to stay valid.
  defp compile(folder, mode, paths, args) do
    python = Path.join(folder, "bin/python3")
    args = ["-m", "compileall", "-q", "--invalidation-mode", mode] ++ args ++ paths

    case OS.Command.run(python, args, cd: "/", limit_ms: @compile_limit_ms) do
      # 1: a file could not be compiled, such as the standard library's tests of syntax errors.
      {:exit, status, _output} when status in [0, 1] ->
        :ok

      {:exit, status, _output} ->
        {:error, "#{python} failed (exit status #{status}) at compiling"}

      {:error, why} ->
        {:error, "#{python} failed (#{why}) at compiling"}
    end
  end

  # Run at each start of a peer. Without `site` (-S) the packages of the machine's Python are not found, as in a virtual
  # environment.
  defp script(base) do
    """
    #!/bin/sh
    # Made by `mix dspex.setup --release`: runs a Python #{base.minor} of this machine with the packages in this folder.
    self=$0
    [ -L "$self" ] && self=$(readlink -f "$self")
    case $self in /*) ;; *) self=$PWD/$self ;; esac
    site=${self%/*}/../lib/python#{base.minor}/site-packages
    export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$site" PYTHONNOUSERSITE=1
    python=#{quoted(Path.join(base.prefix, "bin/python#{base.minor}"))}
    [ -x "$python" ] || python=$(command -v python#{base.minor})
    [ -x "$python" ] && exec "$python" -S "$@"
    echo "no python#{base.minor} on the PATH, which the packages in ${self%/bin/*} need: install it" >&2
    exit 127
    """
  end

  defp quoted(path), do: "'" <> String.replace(path, "'", "'\\''") <> "'"
end
