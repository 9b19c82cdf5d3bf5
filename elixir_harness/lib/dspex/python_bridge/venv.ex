defmodule DSPex.PythonBridge.Venv do
  @moduledoc """
  A virtual environment with the peer and everything that it depends on, in the versions that are tested: what
  `mix dspex.setup` makes, with uv.

  A file in it, `dspex_setup.json`, shows that this module made it, whether it is complete, and its extras. An environment
  of its own is made anew if a run was interrupted or its Python is gone, and nothing else is in the folder. Folders that it
  did not make stay as they are. Two runs for one folder exclude each other.
  """

  alias DSPex.PythonBridge.Python.{Interpreter, Probe}
  alias DSPex.PythonBridge.Venv.{Folder, Release, Source, Uv}

  @elsewhere "remove it yourself, or name another with --path"

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
    progress = Keyword.get(opts, :progress, fn _line -> :ok end)
    path = Path.expand(opts[:source] || Application.app_dir(:dspex, "priv/python"))
    asked = Enum.uniq(opts[:with] || [])

    # The lock writes into the folder: the folder is checked before.
    with {:ok, source} <- Source.read(path, asked),
         {:ok, _made} <- Folder.read(folder) do
      Folder.lock(folder, fn ->
        with {:ok, made} <- Folder.read(folder),
             source = with_kept(source, folder, made, progress),
             {:ok, base} <- base(opts[:python], release?),
             uv = %Uv{folder: folder, source: source, progress: progress, base: base},
             uv = if(release?, do: Release.of(uv), else: uv),
             :ok <- environment(uv, made),
             do: install(uv, made)
      end)
    end
  end

  # What was asked for once is needed until the folder is removed.
  defp with_kept(source, _folder, :nothing, _progress), do: source

  defp with_kept(source, folder, made, progress) do
    kept = made.extras -- source.extras
    if kept != [], do: progress.("#{folder} keeps its #{Enum.join(kept, ", ")}")
    %{source | extras: Enum.sort(source.extras ++ kept)}
  end

  ## The interpreter that it is made from; nil: uv chooses it, and downloads one if it has to

  defp base(nil, release?) do
    case Interpreter.base() do
      {:ok, python, source} when release? or source != :path -> fit(python)
      {:error, text} when release? -> {:error, "#{text}; name one with --python"}
      {:error, "no Python found: PYTHON_EXECUTABLE" <> _ = text} -> {:error, text}
      _none_named -> {:ok, nil}
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

  ## The environment

  defp environment(uv, :nothing), do: create(uv)

  defp environment(%Uv{folder: folder} = uv, made) do
    case {anew(uv, made), Folder.foreign(folder)} do
      {nil, _foreign} ->
        usable(uv)

      {why, []} ->
        uv.progress.("making #{folder} anew: #{why}")
        create(uv)

      {why, foreign} ->
        {:error,
         "#{folder} has to be made anew, since #{why}, but holds what dspex.setup did not make " <>
           "(#{Enum.join(foreign, ", ")}): #{@elsewhere}"}
    end
  end

  # The reason why only making it anew helps, or nil: other errors may pass.
  defp anew(_uv, %{complete?: false}), do: "it is half made"

  defp anew(%Uv{folder: folder} = uv, _made) do
    case Interpreter.lack(folder) do
      {:gone, target} -> "its Python, #{target}, is gone"
      _another_or_none -> if(uv.release, do: Release.outdated(uv))
    end
  end

  defp create(%Uv{folder: folder, source: source} = uv) do
    with :ok <- Folder.clear(folder),
         :ok <- Folder.write(folder, %{complete?: false, extras: source.extras}),
         :ok <- if(uv.release, do: Release.create(uv), else: Uv.create(uv)) do
      :ok
    else
      {_kind, text} -> undo(folder, text)
    end
  end

  # Half of an environment is worth nothing to anybody.
  defp undo(folder, text) do
    Folder.clear(folder)
    {:error, text}
  end

  defp usable(%Uv{folder: folder, base: base} = uv) do
    with {:ok, probe} <- probe(folder, uv.release) do
      if base == nil or base.version == probe.version,
        do: :ok,
        else:
          {:error,
           "#{folder} is of Python #{probe.version}, not #{base.version}: remove it, or name another with --path"}
    end
  end

  # Nothing may go into the Python that it was made from.
  defp probe(folder, release) do
    python = Interpreter.in_venv(folder)

    cond do
      python == nil ->
        {:error, "#{folder} has no bin/python that this user can run: #{@elsewhere}"}

      release == nil and not File.exists?(Path.join(folder, "pyvenv.cfg")) ->
        {:error, "#{folder} is not a virtual environment any more: #{@elsewhere}"}

      true ->
        Probe.run(python, "", [])
    end
  end

  ## The packages

  defp install(%Uv{folder: folder, source: source} = uv, made) do
    unfinished = %{complete?: false, extras: source.extras}

    with :ok <- Folder.write(folder, unfinished),
         {:ok, changed?} <- Uv.install(uv),
         :ok <- Source.copy_peer(source, folder),
         :ok <- if(uv.release, do: Release.finish(uv), else: :ok),
         :ok <- Folder.write(folder, %{unfinished | complete?: true}) do
      unless changed?, do: uv.progress.("#{folder} has all that it needs")
      if uv.release, do: uv.progress.(Release.needs(uv))
      {:ok, Interpreter.in_venv(folder)}
    else
      {_kind, text} when made == :nothing ->
        undo(folder, text)

      # uv has failed by itself, and has left what was there.
      {:failed, text} ->
        Folder.write(folder, made)
        {:error, text}

      {:error, text} ->
        {:error, text}
    end
  end
end
