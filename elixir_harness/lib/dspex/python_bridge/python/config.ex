defmodule DSPex.PythonBridge.Python.Config do
  @moduledoc false
  # Checks the configuration of the application `:dspex`. Errors name the key.

  alias DSPex.PythonBridge.Options
  alias DSPex.PythonBridge.Options.Table

  @keys [:python_environment, :python_bridge, :python_bridge_monitor, :autostart]

  @doc "The distributions that `config :dspex, :python_environment` requires."
  @spec required_packages() :: {:ok, [String.t()]} | {:error, String.t()}
  def required_packages do
    table = [
      virtual_env: {:test, &(&1 == nil or (is_binary(&1) and &1 != "")), "the path of a folder"},
      required_packages: {{:test, &packages?/1, "a list of package names"}, ["dspy", "psutil"]}
    ]

    case Table.check(Application.get_env(:dspex, :python_environment, []), table) do
      {:ok, config} -> {:ok, config[:required_packages]}
      {:error, text} -> {:error, "config :dspex, :python_environment: " <> text}
    end
  end

  # Names become arguments of the interpreter.
  defp packages?(packages) do
    is_list(packages) and not List.improper?(packages) and
      Enum.all?(packages, &(is_binary(&1) and &1 =~ ~r/\A[A-Za-z0-9][A-Za-z0-9._-]*\z/))
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
    others = Keyword.keys(Application.get_all_env(:dspex)) -- @keys

    case Enum.find(Enum.map(others, &Table.unknown(&1, @keys)), &(&1 =~ "did you mean")) do
      nil -> :ok
      text -> {:error, "config :dspex, " <> text}
    end
  end
end
