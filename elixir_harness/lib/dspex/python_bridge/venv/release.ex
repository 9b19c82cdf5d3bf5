defmodule DSPex.PythonBridge.Venv.Release do
  @moduledoc false
  # An environment that may be moved with a release: a virtual environment of uv's, whose scripts have no absolute paths and
  # whose Python is a link to one path of the machine; or, of an interpreter that was made to be moved
  # (python-build-standalone: those of uv), a copy, with the packages in the place of its own.

  alias DSPex.PythonBridge.Python.{Interpreter, Probe}
  alias DSPex.PythonBridge.Venv.Uv

  @where """
  import os, sys, sysconfig
  print(os.path.realpath(sys.base_prefix) if sysconfig.get_config_var("PYTHON_BUILD_STANDALONE") else "")
  """

  @enforce_keys [:copied]
  defstruct [:copied]

  @typedoc "`copied`: the folder of an interpreter that was made to be moved; nil if it is another one."
  @type t :: %__MODULE__{copied: Path.t() | nil}

  @doc "The set-up for a release."
  @spec of(Uv.t()) :: Uv.t()
  def of(%Uv{base: base} = uv) do
    {output, _status} = System.cmd(base.python, ["-c", @where], cd: "/", stderr_to_stdout: true)
    prefix = output |> String.trim() |> String.split("\n") |> List.last()
    %{uv | release: %__MODULE__{copied: if(File.dir?(prefix), do: prefix)}}
  end

  @doc "Why an environment that is complete has to be made anew; nil if it has not."
  @spec outdated(Uv.t()) :: String.t() | nil
  def outdated(%Uv{folder: folder, base: base, release: %{copied: copied}}) do
    with python when python != nil <- Interpreter.in_venv(folder),
         {:ok, %{version: version}} <- Probe.run(python, "", []),
         true <- version == base.version,
         true <- File.exists?(Path.join(folder, "pyvenv.cfg")) == (copied == nil) do
      nil
    else
      _another -> "it is of another Python"
    end
  end

  @doc "Makes it."
  @spec create(Uv.t()) :: :ok | Uv.failure()
  def create(%Uv{release: %{copied: nil}} = uv), do: Uv.create(uv)

  def create(%Uv{folder: folder, base: base, release: %{copied: prefix}} = uv) do
    uv.progress.("copying #{base.python}, Python #{base.version}, to #{folder}")
    for name <- ~w(bin lib), do: File.cp_r!(Path.join(prefix, name), Path.join(folder, name))
    site = Interpreter.site_packages(folder)
    File.rm_rf!(site)
    File.mkdir_p!(site)
    compile(uv, "unchecked-hash", [Path.dirname(site)])
  rescue
    error in [File.Error, File.CopyError] -> {:error, Exception.message(error)}
  end

  @doc "What is left to do when the packages are installed."
  @spec finish(Uv.t()) :: :ok | Uv.failure()
  def finish(%Uv{folder: folder} = uv) do
    File.rm_rf!(Path.join(folder, ".uv"))

    # Scripts start with the path of the interpreter.
    for name <- if(uv.release.copied, do: File.ls!(Path.join(folder, "bin")), else: []),
        not String.starts_with?(name, "python") or name =~ "config",
        do: File.rm!(Path.join([folder, "bin", name]))

    # Not Path.wildcard: the folder's own path may have pattern characters.
    lib = Path.join(Path.dirname(folder), "lib")

    peers =
      for "dspex-" <> _ = name <- if(File.dir?(lib), do: File.ls!(lib), else: []),
          do: Path.join([lib, name, "priv/python"])

    peer = Path.join(Interpreter.site_packages(folder), "dspy_bridge")
    compile(uv, "checked-hash", [peer | Enum.filter(peers, &File.dir?/1)])
  end

  # Also with 1: a file could not be compiled, such as the standard library's tests of syntax errors.
  defp compile(%Uv{folder: folder} = uv, mode, paths) do
    args = ["-m", "compileall", "-q", "--invalidation-mode", mode] ++ paths

    case Uv.run(uv, nil, Path.join(folder, "bin/python3"), args) do
      {:error, text} -> {:error, text}
      _compiled -> :ok
    end
  end

  @doc "What a machine must have on which it runs, as text."
  @spec needs(Uv.t()) :: String.t()
  def needs(%Uv{base: base, release: %{copied: nil}, folder: folder}) do
    {:ok, target} = File.read_link(Path.join(folder, "bin/python"))
    "it needs the Python #{target}, #{base.version}, at this path where it runs"
  end

  def needs(%Uv{base: base}), do: "it has its own Python, #{base.version}"
end
