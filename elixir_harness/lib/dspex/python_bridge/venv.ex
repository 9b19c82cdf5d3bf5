defmodule DSPex.PythonBridge.Venv do
  @moduledoc """
  A virtual environment with the peer and all that it depends on, in the versions that are tested: what
  `mix dspex.setup` makes.

  A file in it, `dspex_setup.json`, tells whether this module made the environment, and what is installed. It is written
  before each step and after the last, so that one that was broken off is seen. What this module did not make it adds to, and
  never removes.
  """

  alias DSPex.PythonBridge.{Interpreter, Probe}
  alias DSPex.PythonBridge.Venv.{Installer, Marker, Source}

  @doc """
  Makes the environment in `folder`, or brings it up to date, and gives its interpreter. An error is a text for people: one line,
  and where a program of others failed, what that said.

    * `:python` – the interpreter to make it of: a path, or a name on the `PATH`
    * `:progress` – a function that is called with a line of text for each step
    * `:source` – the folder of `requirements.txt` and `package` (default: that in `priv`)
  """
  @spec make(Path.t(), keyword()) :: {:ok, Path.t()} | {:error, String.t()}
  def make(folder, opts \\ []) do
    installer = Installer.new(Keyword.get(opts, :progress, fn _line -> :ok end))

    with {:ok, source} <-
           Source.read(opts[:source] || Application.app_dir(:dspex, "priv/python")),
         {:ok, marker} <- Marker.read(folder),
         {:ok, wanted} <- wanted(installer, opts[:python]),
         {:ok, marker} <- environment(folder, marker, wanted, installer),
         do: packages(folder, marker, source, installer)
  end

  # Whoever names an interpreter wants that, also in an environment that is there.
  defp wanted(_installer, nil), do: {:ok, nil}
  defp wanted(installer, python), do: Installer.base(installer, python)

  ## The environment

  defp environment(folder, marker, wanted, installer) do
    case {marker, problem(folder, marker, wanted)} do
      {:nothing, _none} ->
        create(folder, wanted, installer)

      {marker, nil} ->
        {:ok, marker}

      {%Marker{made?: true}, why} ->
        create_anew(folder, why, wanted, installer)

      {_not_ours, why} ->
        {:error, "#{folder} was not made by dspex.setup, and #{why}: " <> elsewhere()}
    end
  end

  defp elsewhere, do: "remove it yourself, or name another with --path"

  # Why what is there cannot be used; nil if it can.
  defp problem(_folder, :nothing, _wanted), do: nil
  defp problem(_folder, %Marker{made?: true, installed: nil}, _wanted), do: "it is half made"

  defp problem(folder, _marker, wanted) do
    with python when python != nil <- Interpreter.in_venv(folder),
         {:ok, probe} <- Probe.run(python, folder, []) do
      Probe.too_old(probe) || another(probe, wanted)
    else
      nil -> lacks_python(folder)
      {:error, text} -> text
    end
  end

  defp lacks_python(folder) do
    if target = Interpreter.gone(folder),
      do: "its Python, #{target}, is gone",
      else: "it has no bin/python"
  end

  defp another(_probe, nil), do: nil
  defp another(%{version: version}, %{version: version}), do: nil
  defp another(probe, wanted), do: "it is of Python #{probe.version}, not #{wanted.version}"

  defp create_anew(folder, why, wanted, installer) do
    installer.progress.("making #{folder} anew: #{why}")
    create(folder, wanted, installer)
  end

  defp create(folder, wanted, installer) do
    marker = %Marker{made?: true}

    with {:ok, base} <- if(wanted, do: {:ok, wanted}, else: Installer.base(installer, nil)),
         :ok <- Marker.write(folder, marker),
         :ok <- Marker.clear(folder),
         :ok <- Installer.create(installer, folder, base),
         do: {:ok, marker}
  end

  ## The packages

  defp packages(folder, marker, source, installer) do
    with python when python != nil <- Interpreter.in_venv(folder),
         {:ok, probe} <- Probe.run(python, folder, Source.names(source)) do
      if marker.installed == source.stamp and Source.installed?(source, probe.found) do
        installer.progress.("#{folder} has all that it needs")
        {:ok, python}
      else
        install(folder, marker, source, probe, installer)
      end
    else
      nil -> {:error, "#{folder}: #{lacks_python(folder)}; " <> elsewhere()}
      {:error, text} -> {:error, text}
    end
  end

  defp install(folder, marker, source, probe, installer) do
    with :ok <- Marker.write(folder, %{marker | installed: nil, begun?: true}) do
      case Installer.install(installer, probe, source, marker.begun?) do
        :ok ->
          with :ok <- Marker.write(folder, %{marker | installed: source.stamp, begun?: false}),
               do: {:ok, probe.python}

        # One that fails in order leaves what was there.
        {:error, text} ->
          Marker.write(folder, marker)
          {:error, text}
      end
    end
  end
end
