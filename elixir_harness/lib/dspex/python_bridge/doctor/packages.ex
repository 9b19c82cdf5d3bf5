defmodule DSPex.PythonBridge.Doctor.Packages do
  @moduledoc false
  # Whether a distribution is installed, and for those that the peer needs, whether in a version that it works with.

  alias DSPex.PythonBridge.{EnvironmentCheck, Probe}

  # As in pyproject.toml, of which a test holds them against.
  @ranges [{"dspy", "3.4.1", "3.5"}, {"psutil", "5.9", nil}]

  @spec needed() :: [String.t()]
  def needed, do: for({name, _least, _below} <- @ranges, do: name)

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

  defp advice(package, probe) do
    setup = if package in needed(), do: "`mix dspex.setup` makes an environment with it, or: "
    "#{setup}#{probe.python} -m pip install '#{requirement(package)}'"
  end

  defp fits?(package, version) do
    case List.keyfind(@ranges, package, 0) do
      nil ->
        true

      {_name, least, below} ->
        not less?(version, least) and (below == nil or less?(version, below))
    end
  end

  # The numbers decide: a candidate of 3.5 has what may not fit already.
  defp less?(one, other), do: numbers(one) < numbers(other)

  defp numbers(version) do
    [release] = Regex.run(~r/\A[\d.]*/, version)
    numbers = for number <- String.split(release, ".", trim: true), do: String.to_integer(number)
    Enum.take(numbers ++ [0, 0, 0], 3)
  end
end
