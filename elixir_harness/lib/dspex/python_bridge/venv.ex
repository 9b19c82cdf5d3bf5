defmodule DSPex.PythonBridge.Venv do
  @moduledoc """
  A virtual environment with the peer and all that it depends on, in the versions that are tested: what
  `mix dspex.setup` makes.

  A file in it, `dspex_setup.json`, tells whether this module made the environment, and what is installed. It is written
  before each step and after the last, so that one that was broken off is seen. What this module did not make it adds to, and
  never removes. It removes what it made only where that is half made, or its Python is gone: whatever else is wrong
  may pass. It installs only where the folder's interpreter installs into the folder, and alone.
  """

  alias DSPex.PythonBridge.Python.Interpreter
  alias DSPex.PythonBridge.Venv.{Installer, Lock, Manifest, Source}

  @doc """
  Makes the environment in `folder`, or brings it up to date, and gives its interpreter. An error is a text for people: one line,
  and where a program of others failed, what that said.

    * `:python` – the interpreter to make it of: a path, or a name on the `PATH`
    * `:progress` – a function that is called with a line of text for each step
    * `:source` – the folder of `requirements.txt` and `package` (default: that in `priv`)
  """
  @spec make(Path.t(), keyword()) :: {:ok, Path.t()} | {:error, String.t()}
  def make(folder, opts \\ []) do
    folder = Path.expand(folder)
    installer = Installer.new(Keyword.get(opts, :progress, fn _line -> :ok end))
    source = Path.expand(opts[:source] || Application.app_dir(:dspex, "priv/python"))

    # Read before it is written to: what is something else stays as it is.
    with {:ok, source} <- Source.read(source),
         {:ok, _manifest} <- Manifest.read(folder),
         do: Lock.hold(folder, fn -> alone(folder, source, opts[:python], installer) end)
  end

  defp alone(folder, source, python, installer) do
    with {:ok, wanted} <- wanted(installer, python),
         {:ok, manifest} <- Manifest.read(folder),
         {:ok, manifest} <- environment(folder, manifest, wanted, installer),
         {:ok, probe} <- Installer.probe(folder, Source.names(source)),
         :ok <- fits(folder, probe, wanted),
         do: packages(folder, manifest, source, probe, installer)
  end

  # Whoever names an interpreter wants that.
  defp wanted(_installer, nil), do: {:ok, nil}
  defp wanted(installer, python), do: Installer.base(installer, python)

  ## The environment

  defp environment(folder, :nothing, wanted, installer), do: create(folder, wanted, installer)

  defp environment(folder, manifest, wanted, installer) do
    case {broken(folder, manifest), manifest, Manifest.foreign(folder)} do
      {nil, manifest, _foreign} ->
        {:ok, manifest}

      {why, %Manifest{made?: true}, []} ->
        installer.progress.("making #{folder} anew: #{why}")
        create(folder, wanted, installer)

      {why, %Manifest{made?: true}, foreign} ->
        {:error,
         "#{folder} is to be made anew, as #{why}, but holds what dspex.setup did not make " <>
           "(#{Enum.join(foreign, ", ")}): " <> Installer.elsewhere()}

      {why, _not_ours, _foreign} ->
        {:error, "#{folder} was not made by dspex.setup, and #{why}: " <> Installer.elsewhere()}
    end
  end

  # Why nothing but making it anew will help; nil if anything else may.
  defp broken(_folder, %Manifest{made?: true, installed: nil}), do: "it is half made"

  defp broken(folder, _manifest) do
    case Interpreter.lack(folder) do
      {:gone, target} -> "its Python, #{target}, is gone"
      _another_or_none -> nil
    end
  end

  defp create(folder, wanted, installer) do
    manifest = %Manifest{made?: true}

    with {:ok, base} <- if(wanted, do: {:ok, wanted}, else: Installer.base(installer, nil)),
         :ok <- Manifest.write(folder, manifest),
         :ok <- Manifest.clear(folder),
         :ok <- Installer.create(installer, folder, base),
         do: {:ok, manifest}
  end

  defp fits(folder, probe, wanted) do
    if wanted == nil or wanted.version == probe.version,
      do: :ok,
      else:
        {:error,
         "#{folder} is of Python #{probe.version}, not #{wanted.version}: remove it, or name another with --path"}
  end

  ## The packages

  defp packages(folder, manifest, source, probe, installer) do
    if manifest.installed == source.stamp and Source.installed?(source, probe.found) do
      installer.progress.("#{folder} has all that it needs")
      {:ok, probe.python}
    else
      install(folder, manifest, source, probe, installer)
    end
  end

  defp install(folder, manifest, source, probe, installer) do
    with :ok <- Manifest.write(folder, %{manifest | installed: nil, begun?: true}) do
      case Installer.install(installer, folder, source, manifest.begun?) do
        :ok ->
          with :ok <-
                 Manifest.write(folder, %{manifest | installed: source.stamp, begun?: false}),
               do: {:ok, probe.python}

        # One that fails in order leaves what was there.
        {:failed, text} ->
          Manifest.write(folder, manifest)
          {:error, text}

        {:error, text} ->
          {:error, text}
      end
    end
  end
end
