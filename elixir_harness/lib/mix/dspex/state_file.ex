defmodule Mix.DSPex.StateFile do
  @moduledoc false
  # The file for a program's state. It is replaced in one step: a temporary file next to it is written, synced and renamed,
  # so that a kill or a power cut leaves the old state or the new one. A symbolic link stays, and its target is replaced.

  alias DSPex.PythonBridge.Protocol.Payload

  # As many as Linux follows.
  @most_links 40
  @permissions 0o7777

  @doc "Whether a state can be written there, found out before anything is paid for; the text says why not."
  @spec check(Path.t()) :: :ok | {:error, String.t()}
  def check(path) do
    with {:ok, target, _mode} <- target(path),
         :ok <- regular(path),
         {:ok, part, file} <- open(target) do
      _ = :file.close(file)
      _ = File.rm(part)
      :ok
    else
      {:error, reason} -> {:error, "--out #{path}: #{text(reason)}"}
    end
  end

  # What a link leads to, also where that can be written, as `/dev/stdout`.
  defp regular(path) do
    case File.stat(path) do
      {:ok, %{type: :regular}} -> :ok
      {:ok, %{type: :directory}} -> {:error, "it is a folder; expected a file"}
      {:ok, _device_pipe_or_socket} -> {:error, "it is no regular file, which cannot be replaced"}
      {:error, :enoent} -> :ok
      {:error, reason} -> {:error, reason}
    end
  end

  @doc "Replaces the file. It keeps its permissions."
  @spec write(Path.t(), iodata()) :: :ok | {:error, String.t()}
  def write(path, contents) do
    with {:ok, target, mode} <- target(path),
         {:ok, part, file} <- open(target),
         :ok <- fill(file, part, mode, contents),
         :ok <- rename(part, target) do
      sync_folder(Path.dirname(target))
    else
      {:error, reason} -> {:error, "--out #{path}: #{text(reason)}"}
    end
  end

  @doc "A state that was written."
  @spec read(Path.t()) :: {:ok, map()} | {:error, String.t()}
  def read(path) do
    with {:ok, bytes} <- File.read(path),
         {:ok, %{} = state} <- Payload.decode(bytes) do
      {:ok, state}
    else
      {:error, {_type, text}} ->
        {:error, "--state #{path}: #{text}"}

      {:error, reason} ->
        {:error, "--state #{path}: #{text(reason)}"}

      {:ok, _other} ->
        {:error, "--state #{path}: expected an object, as mix dspex.optimize writes"}
    end
  end

  ## What is replaced

  # The file behind all links, and its permissions, nil if it does not exist.
  defp target(path, links \\ @most_links)
  defp target("", _links), do: {:error, "expected the path of a file"}
  defp target(_path, 0), do: {:error, :eloop}

  defp target(path, links) do
    path = Path.absname(path)

    case File.lstat(path) do
      {:ok, %{type: :symlink}} ->
        with {:ok, next} <- File.read_link(path),
             do: target(Path.absname(next, Path.dirname(path)), links - 1)

      {:ok, %{mode: mode}} ->
        {:ok, path, Bitwise.band(mode, @permissions)}

      {:error, :enoent} ->
        {:ok, path, nil}

      {:error, reason} ->
        {:error, reason}
    end
  end

  ## The temporary file

  defp open(target) do
    part = "#{target}.#{System.pid()}.part"
    # In a container an earlier process, which was killed, may have had the same id.
    _ = File.rm(part)

    with {:ok, file} <- :file.open(part, [:write, :exclusive, :raw, :binary]),
         do: {:ok, part, file}
  end

  # The permissions come first: nobody else may read what only the owner could.
  defp fill(file, part, mode, contents) do
    with :ok <- if(mode, do: File.chmod(part, mode), else: :ok),
         :ok <- :file.write(file, contents),
         :ok <- :file.sync(file),
         :ok <- :file.close(file) do
      :ok
    else
      failed ->
        _ = :file.close(file)
        _ = File.rm(part)
        failed
    end
  end

  defp rename(part, target) do
    with {:error, _reason} = failed <- File.rename(part, target) do
      _ = File.rm(part)
      failed
    end
  end

  # So that the new name outlives a power cut. On macOS `:file.sync` asks the disk itself to write (F_FULLFSYNC), where
  # that is supported. Some network file systems refuse it for folders; the file is complete in any case.
  defp sync_folder(folder) do
    with {:ok, opened} <- :file.open(folder, [:read, :raw, :directory]) do
      _ = :file.sync(opened)
      _ = :file.close(opened)
    end

    :ok
  end

  defp text(reason) when is_atom(reason), do: List.to_string(:file.format_error(reason))
  defp text(text), do: text
end
