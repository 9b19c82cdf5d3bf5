defmodule DSPex.PythonBridge.Venv.Manifest do
  @moduledoc false
  # The file in an environment that shows that it was made here, and what is installed.

  @enforce_keys [:stamp, :extras]
  defstruct [:stamp, :extras]

  @file_name "dspex_setup.json"
  # Written first and then renamed, so that the file is never half written.
  @draft "." <> @file_name
  @lock ".dspex_setup.lock"
  # What venv and uv make in a folder. Everything else belongs to the user.
  @made ~w(bin lib lib64 include share pyvenv.cfg .gitignore .lock CACHEDIR.TAG)

  @typedoc """
  `stamp`: that of what is installed; nil while something is being installed, or if that was interrupted. `extras`: those of
  `Source` that are installed, or are to be.
  """
  @type t :: %__MODULE__{stamp: String.t() | nil, extras: [String.t()]}

  @doc "What is installed in the folder; `:nothing` if it is empty or missing. An error if it was not made here."
  @spec read(Path.t()) :: {:ok, t() | :nothing} | {:error, String.t()}
  def read(folder) do
    case File.ls(folder) do
      {:error, :enoent} -> {:ok, :nothing}
      {:ok, names} -> known(folder, names -- [@draft, @lock])
      {:error, :enotdir} -> {:error, "#{folder} is not a folder; name another with --path"}
      {:error, reason} -> {:error, "#{folder} cannot be read: #{:file.format_error(reason)}"}
    end
  end

  defp known(_folder, []), do: {:ok, :nothing}

  defp known(folder, names) do
    if @file_name in names,
      do: decode(Path.join(folder, @file_name)),
      else:
        {:error,
         "#{folder} is not empty, and was not made by dspex.setup; it stays as it is: name another with --path"}
  end

  defp decode(path) do
    with {:ok, text} <- File.read(path),
         {:ok, %{"made" => true, "installed" => stamp} = manifest} <- JSON.decode(text) do
      {:ok, %__MODULE__{stamp: stamp, extras: Map.get(manifest, "extras", [])}}
    else
      _other -> {:error, "#{path} is not what dspex.setup wrote: remove its folder yourself"}
    end
  end

  @doc "Writes the file; makes the folder if it is missing."
  @spec write(Path.t(), t()) :: :ok | {:error, String.t()}
  def write(folder, %__MODULE__{stamp: stamp, extras: extras}) do
    draft = Path.join(folder, @draft)
    manifest = JSON.encode!(%{made: true, installed: stamp, extras: extras})

    with :ok <- File.mkdir_p(folder),
         :ok <- File.write(draft, manifest),
         :ok <- File.rename(draft, Path.join(folder, @file_name)) do
      :ok
    else
      {:error, reason} ->
        {:error, "#{folder} cannot be written to: #{:file.format_error(reason)}"}
    end
  end

  @doc "The path of the folder's lock, for `Lock`."
  @spec lock(Path.t()) :: Path.t()
  def lock(folder), do: Path.join(folder, @lock)

  @doc "The files in the folder that neither venv, uv nor this program made, and that may not be removed."
  @spec foreign(Path.t()) :: [String.t()]
  def foreign(folder), do: Enum.sort(File.ls!(folder) -- [@file_name, @draft, @lock | @made])

  @doc "Removes what venv and uv make, but not the file: if this is interrupted, the folder is still known."
  @spec clear(Path.t()) :: :ok | {:error, String.t()}
  def clear(folder) do
    for name <- @made, reduce: :ok do
      :ok -> rm_rf(Path.join(folder, name))
      error -> error
    end
  end

  @doc "Removes all of that, and the file."
  @spec remove(Path.t()) :: :ok | {:error, String.t()}
  def remove(folder) do
    with :ok <- clear(folder), do: rm_rf(Path.join(folder, @file_name))
  end

  defp rm_rf(path) do
    case File.rm_rf(path) do
      {:ok, _removed} ->
        :ok

      {:error, reason, path} ->
        {:error, "#{path} cannot be removed: #{:file.format_error(reason)}"}
    end
  end
end
