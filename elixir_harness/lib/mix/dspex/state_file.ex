defmodule Mix.DSPex.StateFile do
  @moduledoc false
  # The file for a program's state. It is replaced in one step: a temporary file next to it is written, synced and renamed,
  # so that a kill or a power cut leaves the old state or the new one. A symbolic link stays, and its target is replaced.

  @doc "Whether a state can be written there, found out before anything is paid for; the text says why not."
  @spec check(Path.t()) :: :ok | {:error, String.t()}
  def check(path), do: path |> prepare("", fn part, _target -> File.rm(part) end) |> named(path)

  @doc "Replaces the file. It keeps its permissions and, if this user may set it, its owner."
  @spec write(Path.t(), iodata()) :: :ok | {:error, String.t()}
  def write(path, contents), do: path |> prepare(contents, &replace/2) |> named(path)

  defp named({:error, reason}, path) when is_atom(reason),
    do: named({:error, :file.format_error(reason)}, path)

  defp named({:error, text}, path), do: {:error, "--out #{path}: #{text}"}
  defp named(:ok, _path), do: :ok

  defp prepare(path, contents, fun) do
    with {:ok, target, stat} <- target(path) do
      part = "#{target}.#{System.pid()}.part"
      # In a container an earlier process, which was killed, may have had the same id.
      _ = File.rm(part)

      with {:ok, result} <-
             File.open(part, [:write, :exclusive], &fill(&1, part, contents, stat)),
           :ok <- result,
           :ok <- fun.(part, target) do
        :ok
      else
        failed ->
          _ = File.rm(part)
          failed
      end
    end
  end

  defp target(""), do: {:error, "expected the path of a file"}

  defp target(path) do
    case File.stat(path) do
      {:ok, %{type: :regular} = stat} -> {:ok, behind_links(path), stat}
      {:ok, %{type: :directory}} -> {:error, "it is a folder; expected a file"}
      {:ok, _other} -> {:error, "it is not a regular file, and cannot be replaced"}
      {:error, :enoent} -> {:ok, behind_links(path), nil}
      {:error, reason} -> {:error, reason}
    end
  end

  # The links end somewhere, else there would be no stat.
  defp behind_links(path) do
    case File.read_link(path) do
      {:ok, next} -> next |> Path.absname(Path.dirname(path)) |> behind_links()
      {:error, _no_link} -> path
    end
  end

  # The owner and permissions come first: nobody else may read what only the owner could.
  defp fill(file, part, contents, stat) do
    with :ok <- if(stat, do: keep(part, stat), else: :ok),
         :ok <- IO.binwrite(file, contents),
         do: :file.sync(file)
  end

  defp keep(part, stat) do
    # Only root may give a file away.
    _ = :file.change_owner(part, stat.uid, stat.gid)
    File.chmod(part, Bitwise.band(stat.mode, 0o7777))
  end

  # The folder is synced so that the new name outlives a power cut. Some network file systems refuse that; the file is
  # complete in any case.
  defp replace(part, target) do
    with :ok <- File.rename(part, target) do
      with {:ok, folder} <- :file.open(Path.dirname(target), [:read, :raw, :directory]) do
        _ = :file.sync(folder)
        _ = :file.close(folder)
      end

      :ok
    end
  end

  @doc "A state that was written; raises if it is none."
  @spec read!(Path.t()) :: map()
  def read!(path) do
    with {:ok, bytes} <- File.read(path),
         {:ok, %{} = state} <- JSON.decode(bytes) do
      state
    else
      {:error, reason} when is_atom(reason) ->
        Mix.raise("--state #{path}: #{:file.format_error(reason)}")

      _other ->
        Mix.raise("--state #{path}: expected a JSON object, as mix dspex.optimize writes")
    end
  end
end
