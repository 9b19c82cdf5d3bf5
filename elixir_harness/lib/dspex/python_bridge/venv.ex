defmodule DSPex.PythonBridge.Venv do
  @moduledoc """
  A virtual environment with the peer and everything that it depends on, in the versions that are tested: what
  `mix dspex.setup` makes.

  A file in it, `dspex_setup.json`, shows that this module made it, and what is installed, with the extras. The file is written before the
  first step and after the last, so an interrupted run is recognised. A new environment that could not be completed is
  removed. This module leaves alone what it did not make. It
  replaces an environment of its own only if that is half made or its Python is gone: other errors may pass. It
  only installs if the folder's interpreter installs into the folder. Two runs for one folder exclude each other.
  """

  alias DSPex.PythonBridge.Python.Interpreter
  alias DSPex.PythonBridge.Venv.{Installer, Lock, Manifest, Release, Source}

  @doc """
  Makes the environment in `folder`, or brings it up to date, and returns its interpreter. An error is one line of text,
  and the output of a program that failed, if any.

    * `:python` – the interpreter to make it from: a path, or a name on the `PATH`
    * `:with` – extras to install in addition: `["optimizers"]` are optuna and numpy, which two of DSPy's optimizers need. An
      environment keeps the extras that it has
    * `:progress` – a function that is called with a line of text for each step
    * `:source` – the folder of `requirements.txt` and `package` (default: that in `priv`)
  """
  @spec make(Path.t(), keyword()) :: {:ok, Path.t()} | {:error, String.t()}
  def make(folder, opts \\ []), do: locked(folder, opts, &make/5)

  @doc """
  Makes an environment in `folder` that may be moved, with the release that it is in or alone, to another folder or to a
  machine of the same system and architecture; returns its interpreter. It is a copy of the interpreter if that is a
  standalone one, such as uv installs, else a script that runs a Python of the same minor version on the `PATH`. Nothing
  is written into it later, and the times of its files do not matter.

  Options and errors are those of `make/2`; by default `:python` is that of the environment variable
  `PYTHON_EXECUTABLE`, or `python3`.
  """
  @spec release(Path.t(), keyword()) :: {:ok, Path.t()} | {:error, String.t()}
  def release(folder, opts \\ []), do: locked(folder, opts, &release/5)

  defp locked(folder, opts, work) do
    folder = Path.expand(folder)
    installer = Installer.new(Keyword.get(opts, :progress, fn _line -> :ok end))
    path = Path.expand(opts[:source] || Application.app_dir(:dspex, "priv/python"))
    asked = Enum.uniq(opts[:with] || [])

    # The lock writes into the folder: the folder is checked before.
    with {:ok, _source} <- Source.read(path, asked),
         {:ok, _installed} <- Manifest.read(folder) do
      Lock.hold(folder, fn ->
        with {:ok, installed} <- Manifest.read(folder),
             kept = kept(folder, installed, asked, installer),
             {:ok, source} <- Source.read(path, Enum.sort(asked ++ kept)),
             do: work.(folder, installed, source, opts[:python], installer)
      end)
    end
  end

  # What was asked for once is needed until the folder is removed.
  defp kept(_folder, :nothing, _asked, _installer), do: []

  defp kept(folder, installed, asked, installer) do
    kept = installed.extras -- asked
    if kept != [], do: installer.progress.("#{folder} keeps its #{Enum.join(kept, ", ")}")
    kept
  end

  defp make(folder, installed, source, python, installer) do
    with {:ok, wanted} <- if(python, do: Installer.base(installer, python), else: {:ok, nil}),
         {:ok, installed} <- environment(folder, installed, wanted, source, installer),
         {:ok, probe} <- Installer.probe(folder, Source.names(source)),
         :ok <- fits(folder, probe, wanted),
         do: packages(folder, installed, source, probe, installer)
  end

  ## The environment

  defp environment(folder, :nothing, wanted, source, installer),
    do: create(folder, wanted, source, installer)

  defp environment(folder, installed, wanted, source, installer) do
    case {broken(folder, installed), Manifest.foreign(folder)} do
      {nil, _foreign} ->
        {:ok, installed}

      {why, []} ->
        installer.progress.("making #{folder} anew: #{why}")
        create(folder, wanted, source, installer)

      {why, foreign} ->
        {:error, foreign(folder, why, foreign)}
    end
  end

  defp foreign(folder, why, names) do
    "#{folder} has to be made anew, since #{why}, but holds what dspex.setup did not make " <>
      "(#{Enum.join(names, ", ")}): " <> Installer.elsewhere()
  end

  # The reason why only making it anew helps, or nil.
  defp broken(_folder, %{stamp: nil}), do: "it is half made"

  defp broken(folder, _installed) do
    case Interpreter.lack(folder) do
      {:gone, target} -> "its Python, #{target}, is gone"
      _another_or_none -> nil
    end
  end

  defp create(folder, wanted, source, installer) do
    with {:ok, base} <- if(wanted, do: {:ok, wanted}, else: Installer.base(installer, nil)),
         :ok <- Manifest.write(folder, unfinished(source)),
         :ok <- Manifest.clear(folder),
         :ok <- Installer.create(installer, folder, source, base) do
      {:ok, unfinished(source)}
    else
      {:failed, text} -> undo(folder, text)
      {:error, text} -> {:error, text}
    end
  end

  defp unfinished(source), do: %Manifest{stamp: nil, extras: source.extras}

  # Half of an environment is worth nothing to anybody.
  defp undo(folder, text) do
    Manifest.remove(folder)
    {:error, text}
  end

  defp fits(folder, probe, wanted) do
    if wanted == nil or wanted.version == probe.version,
      do: :ok,
      else:
        {:error,
         "#{folder} is of Python #{probe.version}, not #{wanted.version}: remove it, or name another with --path"}
  end

  ## The packages

  defp packages(folder, installed, source, probe, installer) do
    if installed.stamp == source.stamp and Source.installed?(source, probe.found) do
      installer.progress.("#{folder} has all that it needs")
      {:ok, probe.python}
    else
      install(folder, installed, source, probe, installer)
    end
  end

  defp install(folder, installed, source, probe, installer) do
    with :ok <- Manifest.write(folder, unfinished(source)),
         :ok <- Installer.install(installer, folder, source),
         :ok <- Manifest.write(folder, %Manifest{stamp: source.stamp, extras: source.extras}) do
      {:ok, probe.python}
    else
      {:failed, text} when installed.stamp == nil ->
        undo(folder, text)

      # A program that failed by itself has left what was there.
      {:failed, text} ->
        Manifest.write(folder, installed)
        {:error, text}

      {:error, text} ->
        {:error, text}
    end
  end

  ## In a release

  defp release(folder, installed, source, python, installer) do
    with {:ok, base} <- Release.base(installer, python),
         wanted = %Manifest{stamp: Release.stamp(source, base), extras: source.extras},
         {:ok, python} <- release(folder, installed, wanted, base, source, installer),
         :ok <- Release.compile_peer(folder) do
      installer.progress.(Release.needs(base))
      {:ok, python}
    end
  end

  defp release(folder, wanted, wanted, _base, source, installer) do
    installer.progress.("#{folder} has all that it needs")
    Release.check(folder, source)
  end

  defp release(folder, installed, wanted, base, source, installer) do
    installer = %{installer | bytecode: :for_any_time}

    with :ok <- ours(folder, installed),
         {:ok, _unfinished} <- create(folder, base.probe, source, installer),
         :ok <- Installer.install(installer, folder, source),
         :ok <- Release.detach(folder, base),
         {:ok, python} <- Release.check(folder, source),
         :ok <- Manifest.write(folder, wanted) do
      {:ok, python}
    else
      {:failed, text} -> undo(folder, text)
      {:error, text} -> {:error, text}
    end
  end

  defp ours(_folder, :nothing), do: :ok

  defp ours(folder, _installed) do
    case Manifest.foreign(folder) do
      [] -> :ok
      names -> {:error, foreign(folder, "it is out of date", names)}
    end
  end
end
