defmodule DSPex.PythonBridge.Interpreter do
  @moduledoc """
  Which Python to use. The bridge and the environment check both ask here, so that the check
  speaks of the interpreter that the bridge will start.

  The first of these that is set decides, and must then exist:

    1. the option `:python_executable`
    2. `config :dspex, :python_environment, virtual_env: "…"` (its `bin/python3` or `bin/python`)
    3. the environment variable `DSPY_VENV` (the same)
    4. the environment variable `PYTHON_EXECUTABLE`
    5. `python3` on the `PATH`

  A path is expanded; a name without a slash is looked up on the `PATH`.
  """

  @doc """
  The absolute path of the interpreter, or a text that says what was looked for.
  """
  @spec find(String.t() | nil) :: {:ok, Path.t()} | {:error, String.t()}
  def find(option \\ nil) do
    cond do
      option ->
        executable(option, "python_executable")

      venv = configured_venv() ->
        in_venv(venv, "virtual_env")

      venv = env("DSPY_VENV") ->
        in_venv(venv, "DSPY_VENV")

      path = env("PYTHON_EXECUTABLE") ->
        executable(path, "PYTHON_EXECUTABLE")

      true ->
        executable("python3", "no interpreter is configured and the default")
    end
  end

  @doc """
  Why `Port.open/2` did not start an interpreter, from what it raised. Nothing else of that is
  told: it may hold the environment that the peer was to have.
  """
  @spec start_failure(Exception.t()) :: String.t()
  def start_failure(%ErlangError{original: reason}) when is_atom(reason),
    do: reason |> :file.format_error() |> to_string()

  def start_failure(%SystemLimitError{}),
    do: "the runtime has no more ports (see +Q of erl), or the system no more processes"

  def start_failure(_error), do: "the system does not accept its path or environment"

  defp executable(path, source) do
    found =
      if String.contains?(path, "/"),
        do: existing(Path.expand(path)),
        else: System.find_executable(path)

    if found, do: {:ok, found}, else: {:error, "no Python found: #{source} names #{path}"}
  end

  defp in_venv(venv, source) do
    venv = Path.expand(venv)

    case Enum.find_value(["bin/python3", "bin/python"], &existing(Path.join(venv, &1))) do
      nil -> {:error, "no Python found: #{source} names #{venv}, which has no bin/python"}
      path -> {:ok, path}
    end
  end

  # Links stay as they are: a venv's python is a link, and finds its venv by the link's place.
  defp existing(path), do: if(File.regular?(path), do: path)

  # A wrong type here is EnvironmentCheck's to tell; the look-up only takes what it can use.
  defp configured_venv do
    with config when is_list(config) <- Application.get_env(:dspex, :python_environment, []),
         {:virtual_env, venv} when is_binary(venv) and venv != "" <-
           List.keyfind(config, :virtual_env, 0) do
      venv
    else
      _unset -> nil
    end
  end

  # An empty variable is an unset one, as shells have it.
  defp env(name) do
    case System.get_env(name, "") do
      "" -> nil
      value -> value
    end
  end
end
