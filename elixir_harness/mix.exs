defmodule Mix.Tasks.Compile.DspexPython do
  @moduledoc false
  # The Python peer, from the checkout around this project into priv: releases and the Hex package carry
  # priv and nothing beside it. In a Hex package it is there already.

  use Mix.Task.Compiler

  @checkout Path.dirname(__DIR__)
  @package Path.join(__DIR__, "priv/python/package")
  # What pip needs to install it, besides.
  @project ~w(pyproject.toml README.md LICENSE)

  @impl Mix.Task.Compiler
  def run(_args) do
    if Enum.all?(["dspy_bridge/__main__.py" | @project], &File.regular?(in_checkout(&1))),
      do: bundle(),
      else: {:noop, []}
  end

  @impl Mix.Task.Compiler
  def clean,
    do: if(File.regular?(in_checkout("dspy_bridge/__main__.py")), do: File.rm_rf!(@package))

  defp bundle do
    wanted = Enum.sort(@project ++ modules(@checkout))
    changed = Enum.reject(wanted, &same?/1)
    gone = modules(@package) -- wanted
    File.mkdir_p!(Path.join(@package, "dspy_bridge"))
    Enum.each(changed, &File.cp!(in_checkout(&1), Path.join(@package, &1)))
    Enum.each(gone, &File.rm!(Path.join(@package, &1)))
    {if(changed == [] and gone == [], do: :noop, else: :ok), []}
  end

  defp modules(folder) do
    for path <- Path.wildcard(Path.join(folder, "dspy_bridge/*.{py,typed}")),
        do: Path.relative_to(path, folder)
  end

  defp same?(file), do: File.read(in_checkout(file)) == File.read(Path.join(@package, file))

  defp in_checkout(file), do: Path.join(@checkout, file)
end

defmodule DSPex.MixProject do
  use Mix.Project

  @version "0.1.0"

  def project do
    [
      app: :dspex,
      version: @version,
      elixir: "~> 1.18",
      description: "DSPy for Elixir over a plain Erlang port: LM programs in a Python peer.",
      elixirc_paths: elixirc_paths(Mix.env()),
      compilers: [:dspex_python | Mix.compilers()],
      start_permanent: Mix.env() == :prod,
      deps: [],
      package: package()
    ]
  end

  def application do
    [
      mod: {DSPex.Application, []},
      extra_applications: [:logger, telemetry: :optional]
    ]
  end

  defp elixirc_paths(:test), do: ["lib", "test/support"]
  defp elixirc_paths(_env), do: ["lib"]

  defp package do
    [
      licenses: ["MIT"],
      links: %{},
      files: [
        "lib",
        "mix.exs",
        ".formatter.exs",
        "priv/python/dspy_bridge.py",
        "priv/python/requirements.txt",
        # Made by the compiler above. By patterns: Python leaves its bytecode there.
        "priv/python/package/{pyproject.toml,README.md,LICENSE}",
        "priv/python/package/dspy_bridge/*.{py,typed}"
      ]
    ]
  end
end
