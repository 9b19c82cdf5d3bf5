defmodule DSPex.PythonBridge.Venv.Source do
  @moduledoc false
  # What is installed: the pins of requirements.txt and of the extras' files, the peer's package, and, where there is no uv,
  # that of uv.txt.

  @peer "dspy-bridge"
  # Each has its pins in a file of its name, without those that are in requirements.txt.
  @extras ["optimizers"]

  @enforce_keys [:requirements, :extras, :uv, :package, :pins, :stamp]
  defstruct [:requirements, :extras, :uv, :package, :pins, :stamp]

  @typedoc """
  `requirements`: the files of pins; `pins`: the versions of each distribution, and whether it is always installed or depends on a marker; `stamp`: a hash of
  the contents.
  """
  @type t :: %__MODULE__{
          requirements: [Path.t()],
          extras: [String.t()],
          uv: Path.t(),
          package: Path.t(),
          pins: %{String.t() => [{version :: String.t(), :always | :sometimes}]},
          stamp: String.t()
        }

  @doc "What the folder has, with the extras; an error if one of them is unknown."
  @spec read(Path.t(), [String.t()]) :: {:ok, t()} | {:error, String.t()}
  def read(folder, extras) do
    case extras -- @extras do
      [] ->
        read_files(folder, extras)

      [unknown | _rest] ->
        {:error,
         "--with #{unknown} is not known; what may be added: " <> Enum.join(@extras, ", ")}
    end
  end

  defp read_files(folder, extras) do
    requirements = for name <- ["requirements" | extras], do: Path.join(folder, name <> ".txt")
    uv = Path.join(folder, "uv.txt")
    package = Path.join(folder, "package")
    needed = [uv, Path.join(package, "pyproject.toml") | requirements]

    case Enum.reject(needed, &File.regular?/1) do
      [] ->
        {:ok,
         %__MODULE__{
           requirements: requirements,
           extras: extras,
           uv: uv,
           package: package,
           pins: pins(Enum.map_join(requirements, "\n", &File.read!/1)),
           stamp: stamp(requirements ++ files(package), folder)
         }}

      [missing | _rest] ->
        {:error,
         "#{folder} lacks #{Path.relative_to(missing, folder)}: compile the dependency :dspex again"}
    end
  end

  @doc "The paths of a folder's files, without Python's bytecode."
  @spec files(Path.t()) :: [Path.t()]
  # Not Path.wildcard: the folder's own path may have pattern characters.
  def files(package) do
    paths = :filelib.fold_files(to_charlist(package), ~c".*", true, &[to_string(&1) | &2], [])
    Enum.reject(paths, &String.contains?(&1, "__pycache__"))
  end

  defp stamp(paths, folder) do
    parts =
      for path <- Enum.sort(paths),
          do: [Path.relative_to(path, folder), 0, :erlang.md5(File.read!(path))]

    parts |> :erlang.md5() |> Base.encode16(case: :lower)
  end

  defp pins(text) do
    pin = ~r/\A([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;]+)\s*(;?)/

    pins =
      for line <- String.split(text, "\n"),
          [_all, name, version, marker] <- [Regex.run(pin, line)],
          do: {name, {version, if(marker == "", do: :always, else: :sometimes)}}

    Enum.group_by(pins, &elem(&1, 0), &elem(&1, 1))
  end

  @doc "The distributions to probe an interpreter for."
  @spec names(t()) :: [String.t()]
  def names(%__MODULE__{pins: pins}), do: [@peer | Map.keys(pins)]

  @doc "Whether an interpreter with these versions has everything."
  @spec installed?(t(), %{String.t() => String.t()}) :: boolean()
  def installed?(%__MODULE__{pins: pins}, found),
    do:
      is_map_key(found, @peer) and
        Enum.all?(pins, fn {name, pins} -> fits?(pins, found[name]) end)

  defp fits?(pins, nil), do: Enum.all?(pins, &match?({_version, :sometimes}, &1))
  defp fits?(pins, found), do: Enum.any?(pins, &match?({^found, _when}, &1))
end
