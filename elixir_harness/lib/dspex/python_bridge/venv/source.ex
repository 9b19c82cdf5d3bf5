defmodule DSPex.PythonBridge.Venv.Source do
  @moduledoc false
  # What is installed: the pins of requirements.txt and of the extras' files, and the peer's package.

  alias DSPex.PythonBridge.Python.Interpreter

  # Each has its pins in a file of its name, without those that are in requirements.txt.
  @extras ["optimizers"]
  @package "package/dspy_bridge"

  @enforce_keys [:folder, :extras]
  defstruct [:folder, :extras]

  @type t :: %__MODULE__{folder: Path.t(), extras: [String.t()]}

  @doc "That of a folder, with the extras; an error if one of them is unknown."
  @spec read(Path.t(), [String.t()]) :: {:ok, t()} | {:error, String.t()}
  def read(folder, extras) do
    unknown = List.first(extras -- @extras)
    needed = for(name <- ["uv", "requirements" | @extras], do: name <> ".txt") ++ [@package]

    cond do
      unknown ->
        {:error,
         "--with #{unknown} is not known; what may be added: " <> Enum.join(@extras, ", ")}

      missing = Enum.find(needed, &(not File.exists?(Path.join(folder, &1)))) ->
        {:error, "#{folder} lacks #{missing}: compile the dependency :dspex again"}

      true ->
        {:ok, %__MODULE__{folder: folder, extras: extras}}
    end
  end

  @doc "The files of pins."
  @spec requirements(t()) :: [Path.t()]
  def requirements(%__MODULE__{folder: folder, extras: extras}),
    do: for(name <- ["requirements" | extras], do: Path.join(folder, name <> ".txt"))

  @doc """
  Copies the peer to the packages of the environment. It is not built and installed: a build backend would be downloaded and
  run without a hash.
  """
  @spec copy_peer(t(), Path.t()) :: :ok | {:error, String.t()}
  def copy_peer(%__MODULE__{folder: source}, folder) do
    source = Path.join(source, @package)
    target = Path.join(Interpreter.site_packages(folder), "dspy_bridge")

    unless files(source) == files(target) do
      File.rm_rf!(target)

      for {name, text} <- files(source) do
        path = Path.join(target, name)
        File.mkdir_p!(Path.dirname(path))
        File.write!(path, text)
      end
    end

    :ok
  rescue
    error in File.Error -> {:error, Exception.message(error)}
  end

  # Not Path.wildcard: the folder's own path may have pattern characters.
  defp files(folder) do
    add = fn path, files ->
      Map.put(files, Path.relative_to(to_string(path), folder), File.read!(path))
    end

    :filelib.fold_files(to_charlist(folder), ~c"\\.(py|typed)$", true, add, %{})
  end
end
