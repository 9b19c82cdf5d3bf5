defmodule DSPex.PythonBridge.Venv.Manifest do
  @moduledoc false
  # The file in an environment that tells what was done to it, and what may therefore be done.

  @file_name "dspex_setup.json"
  # Written beside it and moved: it is never seen half written.
  @draft "." <> @file_name
  @lock ".dspex_setup.lock"
  # What venv and uv make in a folder. Whatever else is there is somebody's.
  @made ~w(bin lib lib64 include share pyvenv.cfg .gitignore .lock CACHEDIR.TAG)

  # made?: by us, so that it may be made anew; installed: the stamp of what is; begun?: an installation was,
  # and not ended.
  defstruct made?: false, installed: nil, begun?: false

  @type t :: %__MODULE__{made?: boolean(), installed: String.t() | nil, begun?: boolean()}

  @doc "What is in the folder; `:nothing` if it is empty or not there. A text if it is no environment."
  @spec read(Path.t()) :: {:ok, t() | :nothing} | {:error, String.t()}
  def read(folder) do
    case File.ls(folder) do
      {:error, :enoent} -> {:ok, :nothing}
      {:ok, names} -> known(folder, names -- [@draft, @lock])
      {:error, :enotdir} -> {:error, "#{folder} is no folder; name another with --path"}
      {:error, reason} -> {:error, "#{folder} cannot be read: #{:file.format_error(reason)}"}
    end
  end

  defp known(_folder, []), do: {:ok, :nothing}

  defp known(folder, names) do
    cond do
      @file_name in names ->
        decode(Path.join(folder, @file_name))

      "pyvenv.cfg" in names ->
        {:ok, %__MODULE__{}}

      true ->
        {:error,
         "#{folder} is not empty, and no virtual environment; it stays as it is: name another with --path"}
    end
  end

  defp decode(path) do
    with {:ok, text} <- File.read(path),
         {:ok, %{"made" => made?, "installed" => installed, "begun" => begun?}} <-
           JSON.decode(text) do
      {:ok, %__MODULE__{made?: made?, installed: installed, begun?: begun?}}
    else
      _other -> {:error, "#{path} is not what dspex.setup wrote: remove its folder yourself"}
    end
  end

  @doc "Writes it, and makes the folder if need be."
  @spec write(Path.t(), t()) :: :ok | {:error, String.t()}
  def write(folder, %__MODULE__{made?: made?, installed: installed, begun?: begun?}) do
    text = JSON.encode!(%{made: made?, installed: installed, begun: begun?})
    draft = Path.join(folder, @draft)

    with :ok <- File.mkdir_p(folder),
         :ok <- File.write(draft, text),
         :ok <- File.rename(draft, Path.join(folder, @file_name)) do
      :ok
    else
      {:error, reason} ->
        {:error, "#{folder} cannot be written to: #{:file.format_error(reason)}"}
    end
  end

  @doc "Where the lock of the folder is, for `Lock`."
  @spec lock(Path.t()) :: Path.t()
  def lock(folder), do: Path.join(folder, @lock)

  @doc "What is in the folder that neither venv, uv nor this program made: not to be removed."
  @spec foreign(Path.t()) :: [String.t()]
  def foreign(folder), do: Enum.sort(File.ls!(folder) -- [@file_name, @draft, @lock | @made])

  @doc "Removes what venv and uv make, not the marker: whenever that is broken off, it is known whose it is."
  @spec clear(Path.t()) :: :ok | {:error, String.t()}
  def clear(folder) do
    for name <- @made, reduce: :ok do
      :ok -> remove(Path.join(folder, name))
      error -> error
    end
  end

  defp remove(path) do
    case File.rm_rf(path) do
      {:ok, _removed} ->
        :ok

      {:error, reason, path} ->
        {:error, "#{path} cannot be removed: #{:file.format_error(reason)}"}
    end
  end
end
