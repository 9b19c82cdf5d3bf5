defmodule DSPex.PythonBridge.Doctor.Packages do
  @moduledoc false
  # Whether a distribution is installed, and if the peer or an optimizer needs it, in a version that was tested.

  alias DSPex.PythonBridge.EnvironmentCheck
  alias DSPex.PythonBridge.Python.Probe

  # Those of pyproject.toml; a test compares them.
  @needed [{"dspy", "3.4.1", "4"}, {"psutil", "5.9", nil}]
  @optimizers [{"numpy", "1.26", nil}, {"optuna", "3.4", nil}]
  @ranges @needed ++ @optimizers
  # What each optimizer imports that DSPy does not install.
  @imports [{"mipro_v2", "optuna"}, {"simba", "numpy"}]

  @spec needed() :: [String.t()]
  def needed, do: for({name, _least, _below} <- @needed, do: name)

  @doc "What some optimizers need in addition."
  @spec optimizers() :: [String.t()]
  def optimizers, do: for({name, _least, _below} <- @optimizers, do: name)

  @spec requirement(String.t()) :: String.t()
  def requirement(package) do
    case List.keyfind(@ranges, package, 0) do
      nil -> package
      {_name, least, nil} -> "#{package}>=#{least}"
      {_name, least, below} -> "#{package}>=#{least},<#{below}"
    end
  end

  @spec check(String.t(), Probe.t()) :: {:ok | :failed, String.t(), String.t() | nil, true | nil}
  def check(package, probe) do
    version = EnvironmentCheck.version(package, probe)

    cond do
      version == nil ->
        {:failed, "not installed in #{probe.python}", advice(package, probe), nil}

      fits?(package, version) ->
        {:ok, version, nil, true}

      true ->
        text = "#{version} in #{probe.python}; tested is #{requirement(package)}"
        {:failed, text, advice(package, probe), nil}
    end
  end

  @doc "Whether each optimizer has what it imports; programs run without it."
  @spec check_optimizers(Probe.t()) :: {:ok | :note, String.t(), nil, true}
  def check_optimizers(probe) do
    case for {optimizer, package} <- @imports,
             not there?(package, probe),
             do: {optimizer, package} do
      [] ->
        versions = Enum.map_join(optimizers(), ", ", &"#{&1} #{probe.found[&1]}")
        {:ok, "all of them, with #{versions}", nil, true}

      lacking ->
        needs = for {name, package} <- lacking, do: "#{name} (needs #{requirement(package)})"
        text = "all but #{Enum.join(needs, " and ")}: `mix dspex.setup --with optimizers`"
        {:note, text, nil, true}
    end
  end

  defp there?(package, probe) do
    version = probe.found[package]
    version != nil and fits?(package, version)
  end

  # Nothing should be installed into the system's Python or a shared one.
  defp advice(package, probe) do
    requirement = requirement(package)

    cond do
      package not in needed() and probe.venv? ->
        "install '#{requirement}' there"

      package not in needed() ->
        "`mix dspex.setup` makes a virtual environment; install '#{requirement}' there"

      probe.venv? ->
        "`mix dspex.setup` makes an environment with it, or install '#{requirement}' there"

      true ->
        "`mix dspex.setup` makes an environment with it"
    end
  end

  defp fits?(package, version) do
    case List.keyfind(@ranges, package, 0) do
      nil ->
        true

      {_name, least, below} ->
        not less?(version, least) and (below == nil or less?(version, below))
    end
  end

  # Only the numbers count: a release candidate of 4 is already too new.
  defp less?(one, other), do: numbers(one) < numbers(other)

  defp numbers(version) do
    [release] = Regex.run(~r/\A[\d.]*/, version)
    numbers = for number <- String.split(release, ".", trim: true), do: String.to_integer(number)
    Enum.take(numbers ++ [0, 0, 0], 3)
  end
end
