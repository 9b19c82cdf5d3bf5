defmodule DSPex.PythonBridge.Venv do
  @moduledoc """
  A virtual environment with the peer and everything that it depends on, in the versions that are tested: what
  `mix dspex.setup` makes, with uv.

  A file in it, `dspex_setup.json`, shows that this module made it. Folders that it did not make stay as they are. An
  environment whose Python does not run is made anew, and in a release also one of another Python.
  """

  alias DSPex.PythonBridge.OS
  alias DSPex.PythonBridge.Python.{Interpreter, Probe}

  @manifest "dspex_setup.json"
  @not_ours "was not made by dspex.setup; it stays as it is: name another with --path"
  # What is made in a folder here. Everything else belongs to the user.
  @made ~w(bin lib lib64 include share pyvenv.cfg .gitignore .lock .uv CACHEDIR.TAG)
  # Each has its pins in a file of its name, without those that are in requirements.txt.
  @extras ["litellm", "optimizers"]
  # Installing DSPy takes 20 to 60 s with a fast connection.
  @time_limit_ms 30 * 60_000

  # The folder of an interpreter that was made to be moved (python-build-standalone: those of uv).
  @standalone """
  import os, sys, sysconfig
  print(os.path.realpath(sys.base_prefix) if sysconfig.get_config_var("PYTHON_BUILD_STANDALONE") else "")
  """

  # `base`: the interpreter to make it from; nil if uv chooses it. `copied`: the folder of one that is to be copied.
  @enforce_keys [:folder, :source, :extras, :base, :progress, :release?]
  defstruct @enforce_keys ++ [:copied]

  @doc """
  Makes the environment in `folder`, or brings it up to date, and returns its interpreter. An error is a text, with the
  output of a program that failed, if any; a new environment is removed then.

    * `:python` – the interpreter to make it from: a path, or a name on the `PATH`
    * `:with` – extras to install in addition: `["litellm"]` for LMs that DSPy's own engine does not serve, `["optimizers"]` for
      optuna and numpy, which two of DSPy's optimizers need. An environment keeps the extras that it has
    * `:progress` – a function that is called with a line of text for each step
    * `:source` – the folder of `requirements.txt` and `package` (default: that in `priv`)
  """
  @spec make(Path.t(), keyword()) :: {:ok, Path.t()} | {:error, String.t()}
  def make(folder, opts \\ []), do: set_up(folder, opts, false)

  @doc """
  Makes an environment in `folder` that may be moved, with the release that it is in or alone, to another folder or to a
  machine of the same system and architecture; returns its interpreter. That is a copy of one that was made to be moved, such
  as uv installs; else a link to one, which has to be at the same path where the release runs. Nothing is
  written into it later, and the times of its files do not matter.

  Options and errors are those of `make/2`; by default `:python` is that of the environment variable
  `PYTHON_EXECUTABLE`, or `python3`.
  """
  @spec release(Path.t(), keyword()) :: {:ok, Path.t()} | {:error, String.t()}
  def release(folder, opts \\ []), do: set_up(folder, opts, true)

  defp set_up(folder, opts, release?) do
    folder = Path.expand(folder)
    asked = opts[:with] || []

    with :ok <- known(asked),
         {:ok, kept} <- extras_of(folder),
         {:ok, base} <- base(opts[:python], release?) do
      setup = %__MODULE__{
        folder: folder,
        source: Path.expand(opts[:source] || Application.app_dir(:dspex, "priv/python")),
        extras: Enum.uniq(asked ++ (kept || [])),
        base: base,
        progress: Keyword.get(opts, :progress, fn _line -> :ok end),
        release?: release?,
        copied: if(release?, do: standalone(base))
      }

      if (kept || []) -- asked != [],
        do: setup.progress.("#{folder} keeps its #{Enum.join(kept, ", ")}")

      with {:error, text} <- complete(setup, kept == nil) do
        # Half of an environment is worth nothing to anybody.
        if kept == nil, do: clear(folder)
        {:error, text}
      end
    end
  end

  defp known(extras) do
    case extras -- @extras do
      [] ->
        :ok

      [name | _] ->
        {:error, "--with #{name} is not known; what may be added: #{Enum.join(@extras, ", ")}"}
    end
  end

  ## The folder

  # Nil if it is empty or missing.
  defp extras_of(folder) do
    case File.ls(folder) do
      none when none in [{:ok, []}, {:error, :enoent}] ->
        {:ok, nil}

      {:error, reason} ->
        {:error, "#{folder} cannot be used: #{:file.format_error(reason)}"}

      {:ok, _names} ->
        with {:ok, text} <- File.read(Path.join(folder, @manifest)),
             {:ok, %{"extras" => extras}} <- JSON.decode(text),
             do: {:ok, extras},
             else: (_not_ours -> {:error, "#{folder} is not empty, and #{@not_ours}"})
    end
  end

  defp write_manifest(%{folder: folder, extras: extras}),
    do: File.write!(Path.join(folder, @manifest), JSON.encode!(%{made: true, extras: extras}))

  # The file that shows whose it is goes last.
  defp clear(folder) do
    for name <- @made ++ [@manifest], do: File.rm_rf!(Path.join(folder, name))
    File.rmdir(folder)
  end

  ## The interpreter

  defp base(nil, release?) do
    uv? = not release? and System.find_executable("uv") != nil

    case Interpreter.base() do
      {:ok, _python, :path} when uv? -> {:ok, nil}
      {:ok, python, _source} -> fit(python)
      {:error, "no Python found: no interpreter" <> _} when uv? -> {:ok, nil}
      {:error, text} -> {:error, "#{text}; name one with --python, or install uv"}
    end
  end

  defp base(named, _release?),
    do: with({:ok, python} <- Interpreter.executable(named, "--python"), do: fit(python))

  defp fit(python) do
    with {:ok, probe} <- Probe.run(python, "", []) do
      if text = Probe.too_old(probe),
        do: {:error, "#{text} or newer; name another Python with --python"},
        else: {:ok, probe}
    end
  end

  defp standalone(%Probe{python: python}) do
    {output, _status} = System.cmd(python, ["-c", @standalone], cd: "/", stderr_to_stdout: true)
    prefix = output |> String.trim() |> String.split("\n") |> List.last()
    if File.dir?(prefix), do: prefix
  end

  ## The environment

  defp complete(%{folder: folder, source: source, release?: release?} = setup, new?) do
    with :ok <- environment(setup, new?),
         {:ok, output} <- install(setup) do
      # It is larger than what it has installed.
      File.rm_rf!(Path.join(folder, ".uv"))
      # It is not built and installed: a build backend would be downloaded and run without a hash.
      peer = Path.join(Interpreter.site_packages(folder), "dspy_bridge")
      File.rm_rf!(peer)
      File.cp_r!(Path.join(source, "package/dspy_bridge"), peer)
      if release?, do: finish_release(setup, peer)
      write_manifest(setup)
      unless output =~ ~r/^Installed /m, do: setup.progress.("#{folder} has all that it needs")
      if release?, do: setup.progress.(needs(setup))
      {:ok, Interpreter.in_venv(folder)}
    end
  rescue
    error in [File.Error, File.CopyError] -> {:error, Exception.message(error)}
  end

  defp environment(setup, true), do: create(setup)

  defp environment(%{folder: folder, base: base, copied: copied} = setup, false) do
    python = Interpreter.in_venv(folder)
    probe = python && Probe.run(python, "", [])
    cfg? = File.exists?(Path.join(folder, "pyvenv.cfg"))

    case probe do
      {:ok, %{version: version}}
      when (base == nil or version == base.version) and cfg? == (copied == nil) ->
        :ok

      # It may have packages of yours.
      {:ok, %{version: version}} when cfg? and not setup.release? ->
        {:error,
         "#{folder} is of Python #{version}, not #{base.version}: remove it, or name another with --path"}

      _another ->
        setup.progress.("making #{folder} anew: it is of another Python, or of none")
        clear(folder)
        create(setup)
    end
  end

  defp create(%{folder: folder, base: base, copied: nil} = setup) do
    from = if base, do: " from #{base.python}, Python #{base.version}"
    python = if base, do: base.python, else: ">=" <> Probe.min_python()
    # The manifest is there already.
    args = ["venv", "--quiet", "--relocatable", "--allow-existing", "--python", python, folder]
    own(setup)

    with {:ok, _output} <- uv(setup, "making #{folder} with uv#{from}", args), do: :ok
  end

  defp create(%{folder: folder, base: base, copied: prefix} = setup) do
    setup.progress.("copying #{base.python}, Python #{base.version}, to #{folder}")
    own(setup)
    for name <- ~w(bin lib), do: File.cp_r!(Path.join(prefix, name), Path.join(folder, name))
    site = Interpreter.site_packages(folder)
    File.rm_rf!(site)
    File.mkdir_p!(site)
    compile(setup, "unchecked-hash", [Path.dirname(site)])
    :ok
  end

  # Before anything else: if this is interrupted, the folder is still known.
  defp own(%{folder: folder} = setup) do
    File.mkdir_p!(folder)
    write_manifest(setup)
  end

  ## The packages. Nothing from a package index is installed or run without the hash that it is pinned by, and nothing is
  ## built, as that would run a build backend.

  defp install(%{folder: folder, source: source} = setup) do
    # Compiled now: the user that runs the peer later may not write there. The pins are complete: what else DSPy requires,
    # LiteLLM, is an extra.
    args = ["pip", "install", "--compile-bytecode", "--no-build", "--no-deps", "--require-hashes"]
    args = args ++ ["--python", Interpreter.in_venv(folder)]
    args = if setup.copied, do: args ++ ["--break-system-packages"], else: args
    files = for name <- ["requirements" | setup.extras], do: Path.join(source, name <> ".txt")
    line = "installing the packages with uv: this may take some minutes"
    uv(setup, line, args ++ Enum.flat_map(files, &["-r", &1]))
  end

  defp uv(%{folder: folder} = setup, line, args) do
    own = Path.join(folder, ".uv/bin/uv")
    found = System.find_executable("uv") || if(File.exists?(own), do: own)

    with {:ok, uv} <- if(found, do: {:ok, found}, else: install_uv(setup, own)) do
      setup.progress.(line)
      run(setup, uv, args)
    end
  end

  # The interpreter's own venv and pip install the pinned uv into the environment's folder.
  defp install_uv(%{source: source} = setup, uv) do
    venv = uv |> Path.dirname() |> Path.dirname()
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    pip = pip ++ ["--only-binary", ":all:", "--require-hashes", "-r", "#{source}/uv.txt"]

    setup.progress.("installing uv with pip: there is none on the PATH")

    with {:ok, _output} <- run(setup, setup.base.python, ["-m", "venv", venv]),
         {:ok, _output} <- run(setup, Path.join(venv, "bin/python3"), pip),
         do: {:ok, uv}
  end

  defp run(setup, program, args) do
    # Files are copied without their times, by Docker's COPY among others: bytecode in a release is to stay valid.
    bytecode = if setup.release?, do: ~c"UNCHECKED_HASH", else: ~c"TIMESTAMP"
    env = [{~c"PIP_REQUIRE_VIRTUALENV", ~c"1"}, {~c"PYC_INVALIDATION_MODE", bytecode}]

    # uv reads settings from its working directory, and Python reads modules.
    case OS.Command.run(program, args, limit_ms: @time_limit_ms, cd: "/", env: env) do
      {:exit, 0, output} ->
        {:ok, output}

      {:exit, status, output} ->
        # URLs of package indexes may have a name and a password.
        output = Regex.replace(~r{://[^/\s]+@}, String.trim(output), "://[redacted]@")
        {:error, "#{program} failed (exit status #{status}):\n#{output}"}

      {:error, why} ->
        {:error, "#{program} failed (#{why})"}
    end
  end

  ## A release

  defp finish_release(%{folder: folder} = setup, peer) do
    # Scripts start with the path of the interpreter.
    for name <- if(setup.copied, do: File.ls!(Path.join(folder, "bin")), else: []),
        not String.starts_with?(name, "python") or name =~ "config",
        do: File.rm!(Path.join([folder, "bin", name]))

    # Not Path.wildcard: the folder's own path may have pattern characters.
    lib = Path.join(Path.dirname(folder), "lib")

    peers =
      for "dspex-" <> _ = name <- if(File.dir?(lib), do: File.ls!(lib), else: []),
          do: Path.join([lib, name, "priv/python"])

    compile(setup, "checked-hash", [peer | Enum.filter(peers, &File.dir?/1)])
  end

  # Some files cannot be compiled, such as the standard library's tests of syntax errors.
  defp compile(%{folder: folder} = setup, mode, paths) do
    args = ["-m", "compileall", "-q", "--invalidation-mode", mode] ++ paths
    run(setup, Path.join(folder, "bin/python3"), args)
  end

  defp needs(%{copied: nil, base: base, folder: folder}) do
    target = File.read_link!(Path.join(folder, "bin/python"))
    "it needs the Python #{target}, #{base.version}, at this path where it runs"
  end

  defp needs(%{base: base}), do: "it has its own Python, #{base.version}"
end
