defmodule DSPex.PythonBridge.Doctor.Folders do
  @moduledoc false
  # Whether the folders in the peer's settings exist, and this user may read or write them.

  alias DSPex.PythonBridge.Options
  alias DSPex.PythonBridge.Python.Interpreter

  @read ["DSPY_BRIDGE_STATE_DIR", "DSPY_BRIDGE_FILES_DIR"]
  @write ["DSPY_BRIDGE_DISK_CACHE"]

  @spec check(Options.t()) :: {:ok | :failed, String.t(), String.t() | nil, true | nil}
  def check(options) do
    set =
      for name <- @read ++ @write,
          folder = String.trim(options.env.()[name] || System.get_env(name, "")),
          folder != "",
          do: {name, folder}

    errors =
      for {name, folder} <- set,
          path = Path.expand(folder),
          problem = problem(name, path),
          do: "#{name} names #{path}, #{problem}" <> Interpreter.relative(folder)

    cond do
      errors != [] ->
        {:failed, Enum.join(errors, "; "), "make the folder, or correct :env or the environment",
         nil}

      set == [] ->
        {:ok, "none are set", nil, true}

      true ->
        {:ok, Enum.map_join(set, ", ", fn {name, folder} -> "#{name} #{folder}" end), nil, true}
    end
  end

  defp problem(name, path) do
    case File.stat(path) do
      {:ok, %{type: :directory, access: access}} ->
        no_access(name, access)

      {:ok, _file} ->
        "which is not a folder"

      {:error, reason} when name in @write and reason in [:enoent, :enotdir] ->
        not_to_be_made(Path.dirname(path))

      {:error, reason} ->
        "where there is no folder: #{:file.format_error(reason)}"
    end
  end

  defp no_access(name, access) when name in @read,
    do: if(access not in [:read, :read_write], do: "which this user may not read")

  defp no_access(_name, access),
    do: if(access != :read_write, do: "which this user may not write to")

  # The cache's folder is made when it is needed.
  defp not_to_be_made(parent) do
    case File.stat(parent) do
      {:ok, %{type: :directory, access: :read_write}} -> nil
      {:error, reason} when reason in [:enoent, :enotdir] -> not_to_be_made(Path.dirname(parent))
      _other -> "which cannot be made in #{parent}"
    end
  end
end
