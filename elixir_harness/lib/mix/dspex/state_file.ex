defmodule Mix.DSPex.StateFile do
  @moduledoc false
  # The file for the state of an optimized program, checked before the run is paid for and replaced in one step: a reader,
  # or a machine that loses power, sees the old state or the new one.

  import Bitwise

  # Linux follows as many links in one path.
  @most_links 40

  @enforce_keys [:given, :target]
  defstruct @enforce_keys

  @typedoc "`given`: the path as the user wrote it, for texts. `target`: the file that it leads to."
  @type t :: %__MODULE__{given: Path.t(), target: Path.t()}

  @doc "The file at a path, which is a regular file, or missing, in a folder that can be written to; or what is wrong."
  @spec new(Path.t()) :: {:ok, t()} | {:error, String.t()}
  def new(path) do
    with :ok <- regular(path),
         {:ok, target} <- target(Path.absname(path), @most_links),
         :ok <- with_part(target, fn _part, _device -> :ok end) do
      {:ok, %__MODULE__{given: path, target: target}}
    else
      {:error, reason} -> {:error, failure(path, reason)}
    end
  end

  @doc "Replaces the file. Its permissions stay, and nothing is left next to it if that fails."
  @spec write(t(), iodata()) :: :ok | {:error, String.t()}
  def write(%__MODULE__{given: given, target: target}, content) do
    replace = fn part, device ->
      # Without a sync the new name may be on the disk before the content is.
      with :ok <- :file.write(device, content),
           :ok <- :file.sync(device),
           do: File.rename(part, target)
    end

    with {:error, reason} <- with_part(target, replace), do: {:error, failure(given, reason)}
  end

  defp regular(path) do
    if path == "" or String.ends_with?(path, "/") do
      {:error, :no_name}
    else
      case File.stat(path) do
        {:ok, %{type: :regular}} -> :ok
        {:ok, %{type: :directory}} -> {:error, :eisdir}
        {:ok, _other} -> {:error, :not_regular}
        {:error, :enoent} -> :ok
        {:error, reason} -> {:error, reason}
      end
    end
  end

  # Renaming to a link would replace the link.
  defp target(path, links) do
    case :file.read_link(path) do
      {:ok, _to} when links == 0 -> {:error, :eloop}
      {:ok, to} -> path |> Path.dirname() |> join(to) |> target(links - 1)
      {:error, _no_link} -> {:ok, path}
    end
  end

  # `..` is left to the system, since the folder may be a link itself.
  defp join(folder, to) do
    to = IO.chardata_to_string(to)
    if Path.type(to) == :absolute, do: to, else: Path.join(folder, to)
  end

  # `fun` gets a new file in the folder of the target, and its open device. It is removed unless `fun` has renamed it.
  defp with_part(target, fun) do
    # Not by the pid: in a container each run has the same one, and may find what a killed one has left.
    part = "#{target}.#{Base.url_encode64(:crypto.strong_rand_bytes(6))}.part"

    with {:ok, device} <- :file.open(part, [:write, :exclusive, :raw, :binary]) do
      result = with :ok <- take_mode(part, target), do: fun.(part, device)
      _ = :file.close(device)
      _ = File.rm(part)
      if result == :ok, do: sync_folder(target)
      result
    end
  end

  # Before there is content: others may not be allowed to read it.
  defp take_mode(part, target) do
    case File.stat(target) do
      {:ok, %{mode: mode}} -> File.chmod(part, mode &&& 0o777)
      {:error, :enoent} -> :ok
      {:error, reason} -> {:error, reason}
    end
  end

  # The new name is on the disk then. Some network file systems cannot do it; the file is there all the same.
  defp sync_folder(target) do
    with {:ok, device} <- :file.open(Path.dirname(target), [:read, :raw, :directory]) do
      _ = :file.sync(device)
      :file.close(device)
    end
  end

  defp failure(path, reason), do: "--out #{path}: #{text(reason)}"

  defp text(:no_name), do: "expected the name of a file"
  defp text(:eisdir), do: "is a folder; expected a file for the state"
  defp text(:not_regular), do: "is not a regular file, and would be replaced by one"
  defp text(reason), do: :file.format_error(reason)
end
