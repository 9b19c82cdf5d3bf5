defmodule Mix.DSPex do
  @moduledoc false
  # What the Mix tasks share.

  alias DSPex.PythonBridge.Doctor

  @doc "Runs the doctor; the checks report what its bridge would log."
  @spec doctor(keyword()) :: boolean()
  def doctor(opts) do
    Logger.put_application_level(:dspex, :none)
    Doctor.print(opts, &Mix.shell().info/1)
  end

  @doc """
  Calls `fun`, which measures something. Whatever ends it ends Mix with the status 2: 1 is that of a task that has run, with
  a bad result.
  """
  @spec measured((-> value)) :: value when value: term()
  def measured(fun) do
    # The BEAM would exit with 0, as if all were good.
    :os.set_signal(:sigterm, :default)
    fun.()
  catch
    # The compiler has printed why.
    :exit, {:shutdown, status} when is_integer(status) ->
      exit({:shutdown, 2})

    :error, %kind{message: text} when kind in [Mix.Error, OptionParser.ParseError] ->
      Mix.raise(text, exit_status: 2)

    # User code, from here on down the stack Elixir's own.
    kind, reason ->
      stack = Enum.take_while(__STACKTRACE__, &(elem(&1, 0) not in [:elixir, :erl_eval, Code]))
      Mix.raise(String.trim(Exception.format(kind, reason, stack)), exit_status: 2)
  end

  @doc "Prints a result. The status of one that cannot be written is not that of a bad one."
  @spec print(iodata()) :: :ok
  def print(text) do
    IO.puts(text)
  rescue
    error in ErlangError ->
      text = "standard output: the result could not be written: #{inspect(error.original)}"
      Mix.raise(text, exit_status: 2)
  end

  @doc """
  Starts the project's application. `clean: true` keeps the logs from standard output, unless the project configures where
  they go.
  """
  @spec start(keyword()) :: :ok
  def start(opts \\ []) do
    Mix.Task.run("app.config")
    if opts[:clean], do: log_to_stderr()
    Mix.Task.run("app.start")
    :ok
  end

  defp log_to_stderr do
    with handler when is_list(handler) <- Application.get_env(:logger, :default_handler, []),
         config = Map.new(handler[:config] || []),
         false <- is_map_key(config, :file) or Keyword.has_key?(handler, :module) do
      config = Map.put(config, :type, :standard_error)
      Application.put_env(:logger, :default_handler, Keyword.put(handler, :config, config))
    end
  end

  @doc """
  Calls `fun` while all that this process and those that it starts print goes to standard error: standard output is kept
  for JSON.
  """
  @spec divert_output((-> value)) :: value when value: term()
  def divert_output(fun) do
    stdout = Process.group_leader()
    Process.group_leader(self(), Process.whereis(:standard_error))

    try do
      fun.()
    after
      Process.group_leader(self(), stdout)
    end
  end

  @doc "The default folder of the virtual environment: in `_build`, one for all environments of Mix."
  @spec default_venv() :: Path.t()
  def default_venv do
    path = Mix.Project.build_path()
    # The parent folder of MIX_BUILD_PATH is not Mix's.
    root = if System.get_env("MIX_BUILD_PATH"), do: path, else: Path.dirname(path)
    Path.join(root, "dspex_venv")
  end

  @doc "The file of the project's configuration, and whether it exists: `mix new` makes none."
  @spec config_file() :: {:there | :missing, Path.t()}
  def config_file do
    file = Mix.Project.config()[:config_path]
    {if(File.exists?(file), do: :there, else: :missing), file}
  end

  @doc "The line in the configuration that names a virtual environment."
  @spec config_line(Path.t()) :: String.t()
  def config_line(folder) do
    {_there, file} = config_file()
    config = Path.dirname(Path.expand(file))
    # In an umbrella, the file is the umbrella's.
    inside? = String.starts_with?(folder, Path.dirname(config) <> "/")

    value =
      if inside?,
        do: "Path.expand(#{inspect(Path.relative_to(folder, config, force: true))}, __DIR__)",
        else: inspect(folder)

    "config :dspex, :python_environment, virtual_env: " <> value
  end
end
