defmodule DSPex.PythonBridge.Venv.Folder do
  @moduledoc false
  # The folder of an environment: a file that shows that it was made here, and a lock for one run at a time.

  alias DSPex.PythonBridge.OS

  @manifest "dspex_setup.json"
  # Written first and then renamed, so that the manifest is never half written.
  @draft "." <> @manifest
  # A symbolic link, which is made in one step: its target names the process that holds it.
  @lock ".dspex_setup.lock"
  # What is made in a folder here. Everything else belongs to the user.
  @made ~w(bin lib lib64 include share pyvenv.cfg .gitignore .lock .uv CACHEDIR.TAG)

  @typedoc "`complete?`: false while something is being installed, or if that was interrupted. `extras`: see `Source`."
  @type made :: %{complete?: boolean(), extras: [String.t()]}

  @doc "What was made in the folder; `:nothing` if it is empty or missing. An error if it was not made here."
  @spec read(Path.t()) :: {:ok, made() | :nothing} | {:error, String.t()}
  def read(folder) do
    with {:ok, names} <- File.ls(folder),
         {:made, true, _names} <- {:made, @manifest in names, names -- [@draft, @lock]},
         {:ok, text} <- File.read(Path.join(folder, @manifest)),
         {:ok, %{"made" => true} = manifest} <- JSON.decode(text) do
      {:ok, %{complete?: manifest["complete"] == true, extras: Map.get(manifest, "extras", [])}}
    else
      {:error, :enoent} ->
        {:ok, :nothing}

      {:made, false, []} ->
        {:ok, :nothing}

      {:made, false, _names} ->
        {:error,
         "#{folder} is not empty, and was not made by dspex.setup; it stays as it is: name another with --path"}

      {:error, :enotdir} ->
        {:error, "#{folder} is not a folder; name another with --path"}

      {:error, reason} when is_atom(reason) ->
        {:error, "#{folder} cannot be read: #{:file.format_error(reason)}"}

      _no_manifest ->
        {:error,
         "#{folder}/#{@manifest} is not what dspex.setup wrote: remove its folder yourself"}
    end
  end

  @doc "Writes that file."
  @spec write(Path.t(), made()) :: :ok | {:error, String.t()}
  def write(folder, made) do
    draft = Path.join(folder, @draft)
    manifest = JSON.encode!(%{made: true, complete: made.complete?, extras: made.extras})

    with {:error, reason} <- File.write(draft, manifest),
         do: unwritable(folder, reason),
         else: (:ok -> File.rename(draft, Path.join(folder, @manifest)))
  end

  defp unwritable(folder, reason),
    do: {:error, "#{folder} cannot be written to: #{:file.format_error(reason)}"}

  @doc "The files in the folder that were not made here, and that may not be removed."
  @spec foreign(Path.t()) :: [String.t()]
  def foreign(folder), do: Enum.sort(File.ls!(folder) -- [@manifest, @draft, @lock | @made])

  @doc "Removes what was made there. The file goes last: if this is interrupted, the folder is still known."
  @spec clear(Path.t()) :: :ok | {:error, String.t()}
  def clear(folder) do
    Enum.reduce_while(@made ++ [@manifest], :ok, fn name, :ok ->
      case File.rm_rf(Path.join(folder, name)) do
        {:ok, _removed} ->
          {:cont, :ok}

        {:error, reason, path} ->
          {:halt, {:error, "#{path} cannot be removed: #{:file.format_error(reason)}"}}
      end
    end)
  end

  @doc """
  Runs `fun` with the folder locked; an error while another process holds the lock. A missing folder is made, and
  removed again if nothing is in it.
  """
  @spec lock(Path.t(), (-> result)) :: result | {:error, String.t()} when result: term()
  def lock(folder, fun) do
    new? = not File.dir?(folder)
    lock = Path.join(folder, @lock)

    with :ok <- File.mkdir_p(folder),
         :ok <- take(lock) do
      try do
        fun.()
      after
        File.rm(lock)
        if new?, do: File.rmdir(folder)
      end
    else
      {:held, os_pid} ->
        {:error, "another dspex.setup (process #{os_pid}) is working on #{folder}"}

      {:error, reason} ->
        unwritable(folder, reason)
    end
  end

  defp take(lock) do
    own = String.to_integer(System.pid())

    with {:error, :eexist} <- File.ln_s("#{own} #{OS.Process.start_time(own)}", lock),
         {:ok, holder} <- File.read_link(lock) do
      {os_pid, started} = Integer.parse(holder)
      started = String.trim(started)

      # Its process may have ended, and another one may have its number.
      if OS.Process.gone?(os_pid, if(started != "", do: started)),
        do: with(:ok <- File.rm(lock), do: take(lock)),
        else: {:held, os_pid}
    end
  end
end
