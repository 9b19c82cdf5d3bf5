defmodule DSPex.PythonBridge.Python.Interpreter do
  @moduledoc false
  # Finds the Python interpreter, for bridges and for the environment check.
  #
  # The first of these that is set decides, and must then exist:
  #
  #   1. the option `:python_executable`
  #   2. `config :dspex, :python_environment, virtual_env: "…"` (its `bin/python3` or `bin/python`)
  #   3. the environment variable `DSPY_VENV` (the same)
  #   4. the environment variable `PYTHON_EXECUTABLE`
  #   5. `python3` on the `PATH`
  #
  # A path is expanded; a name without a slash is searched for on the `PATH`.

  @in_venv ["bin/python3", "bin/python"]
  @typedoc "What decides, in the order above."
  @type source :: :option | :virtual_env | :dspy_venv | :python_executable | :path

  @doc "The absolute path of the interpreter, or an error text."
  @spec find(String.t() | nil) :: {:ok, Path.t()} | {:error, String.t()}
  def find(option \\ nil) do
    with {:ok, path, _source} <- locate(option), do: {:ok, path}
  end

  @doc "As `find/1`, with the setting that decided."
  @spec locate(String.t() | nil) :: {:ok, Path.t(), source()} | {:error, String.t()}
  def locate(option \\ nil) do
    cond do
      option -> by(executable(option, "python_executable"), :option)
      venv = configured_venv() -> by(of_venv(venv, "virtual_env"), :virtual_env)
      venv = env("DSPY_VENV") -> by(of_venv(venv, "DSPY_VENV"), :dspy_venv)
      true -> base()
    end
  end

  @doc "The interpreter to make a virtual environment from by default: the last two of the list."
  @spec base() :: {:ok, Path.t(), source()} | {:error, String.t()}
  def base do
    named = env("PYTHON_EXECUTABLE")
    path = System.find_executable("python3")

    cond do
      named ->
        by(executable(named, "PYTHON_EXECUTABLE"), :python_executable)

      path ->
        {:ok, path, :path}

      true ->
        {:error,
         "no Python found: no interpreter is configured, nor is there a python3 on the PATH"}
    end
  end

  @doc "The setting that decided, as text."
  @spec describe(source()) :: String.t()
  def describe(:option), do: "the option :python_executable"
  def describe(:virtual_env), do: "virtual_env in config :dspex, :python_environment"
  def describe(:dspy_venv), do: "the environment variable DSPY_VENV"
  def describe(:python_executable), do: "the environment variable PYTHON_EXECUTABLE"
  def describe(:path), do: "the first python3 on the PATH"

  @doc """
  The absolute path of an interpreter: of a file, if there is a slash in `name`, else of a program on the `PATH`. The
  error starts with `whose`, the setting that has the name.
  """
  @spec executable(String.t(), String.t()) :: {:ok, Path.t()} | {:error, String.t()}
  def executable(name, whose) do
    if String.contains?(name, "/"), do: file(name, whose), else: on_path(name, whose)
  end

  defp on_path(name, whose) do
    if path = System.find_executable(name),
      do: {:ok, path},
      else: {:error, "no Python found: #{whose} names #{name}, which is not on the PATH"}
  end

  defp file(name, whose) do
    path = Path.expand(name)

    if File.regular?(path),
      do: {:ok, path},
      else: {:error, "no Python found: #{whose} names #{path}, which is not a file"}
  end

  # Links are not resolved: a venv's python is a link, and finds its venv by the path of the link.
  @doc "The interpreter in the folder of a virtual environment; nil if there is none."
  @spec in_venv(Path.t()) :: Path.t() | nil
  def in_venv(folder),
    do: @in_venv |> Enum.map(&Path.join(folder, &1)) |> Enum.find(&File.regular?/1)

  @doc "The folder of the packages of an environment."
  @spec site_packages(Path.t()) :: Path.t()
  def site_packages(folder) do
    lib = Path.join(folder, "lib")
    # Not Path.wildcard: the folder's own path may have pattern characters.
    "python3." <> _ = name = Enum.find(File.ls!(lib), &String.starts_with?(&1, "python3."))
    Path.join([lib, name, "site-packages"])
  end

  @doc "The folder of `config :dspex, :python_environment, virtual_env: …`, not expanded; nil if none."
  @spec configured_venv() :: String.t() | nil
  def configured_venv do
    # EnvironmentCheck reports wrong types.
    config = Application.get_env(:dspex, :python_environment, [])
    venv = if Keyword.keyword?(config), do: config[:virtual_env]
    if is_binary(venv) and venv != "", do: venv
  end

  defp by({:ok, path}, source), do: {:ok, path, source}
  defp by({:error, text}, _source), do: {:error, text}

  defp of_venv(venv, whose) do
    folder = Path.expand(venv)

    if path = in_venv(folder),
      do: {:ok, path},
      else: {:error, "no Python found: #{whose} names #{folder}, #{why(folder, whose)}"}
  end

  # With what to do.
  defp why(folder, whose) do
    # dspex.setup does not read that variable.
    path = if whose == "DSPY_VENV", do: " --path #{folder}", else: ""
    setup = "`mix dspex.setup#{path}` makes it"
    python = Path.join(folder, "bin/python")
    target = end_of_links(python)
    link = if target != python, do: "whose bin/python is a link to #{target}, "

    case File.stat(target) do
      {:error, :eacces} -> "#{link}which this user may not reach"
      {:error, _gone} when link != nil -> "#{link}which is gone (remove it, and #{setup} anew)"
      _no_program -> "which has no bin/python (#{setup})"
    end
  end

  # They may go in a circle.
  defp end_of_links(path, left \\ 40) do
    case left > 0 && File.read_link(path) do
      {:ok, target} -> end_of_links(Path.expand(target, Path.dirname(path)), left - 1)
      _no_link -> path
    end
  end

  # An empty variable counts as unset.
  defp env(name), do: with("" <- System.get_env(name, ""), do: nil)
end
