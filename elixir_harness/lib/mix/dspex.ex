defmodule Mix.DSPex do
  @moduledoc false
  # What the Mix tasks share.

  @doc """
  Loads the host's configuration, and starts nothing of it. With `quiet: true` what is compiled for that is not told of:
  standard output is to hold something else alone.
  """
  @spec load_config(keyword()) :: :ok
  def load_config(opts \\ []) do
    shell = Mix.shell()
    if opts[:quiet], do: Mix.shell(Mix.Shell.Quiet)

    try do
      Mix.Task.run("app.config")
      :ok
    after
      Mix.shell(shell)
    end
  end

  @doc "Where the virtual environment is if nothing is said: in `_build`, for all environments of Mix."
  @spec default_venv() :: Path.t()
  def default_venv do
    path = Mix.Project.build_path()
    # Of MIX_BUILD_PATH the folder around it is none of ours.
    root = if System.get_env("MIX_BUILD_PATH"), do: path, else: Path.dirname(path)
    Path.join(root, "dspex_venv")
  end

  @doc "The file of the host's configuration, and whether it is there: `mix new` makes none."
  @spec config_file() :: {:there | :missing, Path.t()}
  def config_file do
    file = Mix.Project.config()[:config_path]
    {if(File.exists?(file), do: :there, else: :missing), file}
  end

  @doc "The line that names a virtual environment in the host's configuration."
  @spec config_line(Path.t()) :: String.t()
  def config_line(folder) do
    {_there, file} = config_file()
    config = Path.dirname(Path.expand(file))
    # A child of an umbrella has the file of the umbrella's.
    inside? = String.starts_with?(folder, Path.dirname(config) <> "/")

    value =
      if inside?,
        do: "Path.expand(#{inspect(Path.relative_to(folder, config, force: true))}, __DIR__)",
        else: inspect(folder)

    "config :dspex, :python_environment, virtual_env: " <> value
  end
end
