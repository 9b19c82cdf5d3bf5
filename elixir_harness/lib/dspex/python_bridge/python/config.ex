defmodule DSPex.PythonBridge.Python.Config do
  @moduledoc false
  # Checks the configuration of the application `:dspex`. Errors name the key.

  alias DSPex.PythonBridge.Options

  @environment [:virtual_env, :required_packages]
  @default_packages ["dspy", "psutil"]
  @keys [:python_environment, :python_bridge, :python_bridge_monitor, :autostart]

  @doc "The distributions that `config :dspex, :python_environment` requires."
  @spec required_packages() :: {:ok, [String.t()]} | {:error, String.t()}
  def required_packages do
    config = Application.get_env(:dspex, :python_environment, [])

    if Keyword.keyword?(config) do
      case Enum.find_value(config, &refusal/1) do
        nil -> {:ok, Keyword.get(config, :required_packages, @default_packages)}
        text -> {:error, "config :dspex, :python_environment: " <> text}
      end
    else
      {:error, "config :dspex, :python_environment: expected a keyword list"}
    end
  end

  @doc "The options of a bridge: `opts` over `config :dspex, :python_bridge`."
  @spec bridge(keyword()) :: {:ok, Options.t()} | {:error, String.t()}
  def bridge(opts \\ []), do: checked(Options.new(opts), :python_bridge)

  @doc "The checked options, or an error message, which names the configuration key."
  @spec checked({:ok, options} | {:error, Exception.t()}, atom()) ::
          {:ok, options} | {:error, String.t()}
        when options: term()
  def checked({:ok, options}, _key), do: {:ok, options}

  def checked({:error, error}, key),
    do: {:error, "config :dspex, #{inspect(key)}: " <> Exception.message(error)}

  @doc """
  Finds misspelt keys. Keys that are not similar to any of these are ignored: your application may have its own.
  """
  @spec keys() :: :ok | {:error, String.t()}
  def keys do
    config = Application.get_all_env(:dspex)
    autostart = Keyword.get(config, :autostart, true)

    text =
      Enum.find_value(Keyword.keys(config) -- @keys, &misspelt/1) ||
        if not is_boolean(autostart),
          do: ":autostart: expected true or false, got #{inspect(autostart)}"

    if text, do: {:error, "config :dspex, " <> text}, else: :ok
  end

  defp misspelt(:programs), do: ":programs: they belong to :python_bridge"

  defp misspelt(key) do
    text = Options.unknown(key, @keys)
    if text =~ "did you mean", do: text
  end

  defp refusal({:virtual_env, nil}), do: nil
  defp refusal({:virtual_env, path}) when is_binary(path) and path != "", do: nil

  defp refusal({:virtual_env, other}),
    do: "virtual_env: expected the path of a folder, got #{inspect(other)}"

  # Names become arguments of the interpreter.
  defp refusal({:required_packages, packages}) do
    if is_list(packages) and
         Enum.all?(packages, &(is_binary(&1) and &1 =~ ~r/\A[A-Za-z0-9][A-Za-z0-9._-]*\z/)),
       do: nil,
       else: "required_packages: expected a list of package names, got #{inspect(packages)}"
  end

  defp refusal({key, _value}), do: Options.unknown(key, @environment)
end
