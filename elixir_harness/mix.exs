defmodule Mix.Tasks.Compile.DspexPython do
  @moduledoc false
  # The Python peer, from the checkout around this project into priv: releases and the Hex package carry
  # priv and nothing next to it. In a Hex package it is there already.

  use Mix.Task.Compiler

  @checkout Path.dirname(__DIR__)
  @package Path.join(__DIR__, "priv/python/package")
  # What pip needs to install it, besides.
  @project ~w(pyproject.toml README.md LICENSE)

  @impl Mix.Task.Compiler
  def run(_args) do
    cond do
      Enum.all?(["dspy_bridge/__main__.py" | @project], &File.regular?(in_checkout(&1))) ->
        bundle()

      File.regular?(Path.join(@package, "dspy_bridge/__main__.py")) ->
        {:noop, []}

      true ->
        warn("the Python peer is neither in priv nor next to this project")
    end
  end

  @impl Mix.Task.Compiler
  def clean,
    do: if(File.regular?(in_checkout("dspy_bridge/__main__.py")), do: File.rm_rf!(@package))

  defp bundle do
    wanted = @project ++ modules(@checkout)
    changed = Enum.reject(wanted, &same?/1)
    gone = modules(@package) -- wanted
    Enum.each(changed, &copy!/1)
    # Another mix, of another environment, may be at the same.
    Enum.each(gone, &File.rm(Path.join(@package, &1)))
    {if(changed == [] and gone == [], do: :noop, else: :ok), []}
  rescue
    # Bridges find the peer in the checkout all the same.
    error in [File.Error, File.RenameError] -> warn(Exception.message(error))
  end

  # Whole at any moment, and without the mode of what may be read-only there.
  defp copy!(file) do
    target = Path.join(@package, file)
    File.mkdir_p!(Path.dirname(target))
    File.write!("#{target}.#{System.pid()}", File.read!(in_checkout(file)))
    File.rename!("#{target}.#{System.pid()}", target)
  end

  defp modules(folder) do
    for file <- Path.wildcard(Path.join(folder, "dspy_bridge/**/*.{py,typed}")),
        do: Path.relative_to(file, folder)
  end

  defp same?(file), do: File.read(in_checkout(file)) == File.read(Path.join(@package, file))

  defp in_checkout(file), do: Path.join(@checkout, file)

  defp warn(text) do
    Mix.shell().error("warning: priv has no copy of the Python peer for a release: #{text}")
    {:noop, []}
  end
end

defmodule DSPex.MixProject do
  use Mix.Project

  @version "0.1.0"
  @pages [
    {"Start", ~w(getting-started)},
    {"Guide",
     ~w(guide/signatures guide/agents guide/durable guide/streaming guide/evaluating optimizing guide/lms guide/own-modules
        guide/liveview guide/jobs guide/tour.livemd local-models testing)},
    {"In production", ~w(deploying security settings errors telemetry cluster upgrading)},
    {"Inside", ~w(how-it-works performance protocol)},
    {"Coming from", ~w(coming-from erlport)}
  ]
  # Of DSPex.PythonBridge.
  @modules [
    {"Calls",
     ~w(Bridge Pool Program Evaluate Evaluate.Result Optimize Optimize.Result Error History)},
    {"Runs that survive",
     ~w(Durable Durable.Run Durable.Store Durable.FileStore Durable.MemoryStore)},
    {"Starting and setting", ~w(Supervisor Options Venv)},
    {"Looking at it", ~w(Monitor Telemetry Top Doctor EnvironmentCheck)},
    {"In tests", ~w(Stub)},
    {"The wire", ~w(Protocol)}
  ]

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
      docs: &docs/0,
      package: package()
    ]
  end

  def application do
    [
      mod: {DSPex.Application, []},
      extra_applications: [:crypto, :logger, telemetry: :optional]
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
        "usage-rules.md",
        ".formatter.exs",
        "priv/python/dspy_bridge.py",
        "priv/python/requirements.txt",
        "priv/python/litellm.txt",
        "priv/python/optimizers.txt",
        "priv/python/uv.txt",
        # Made by the compiler above. By patterns: Python leaves its bytecode there.
        "priv/python/package/{pyproject.toml,README.md,LICENSE}",
        "priv/python/package/dspy_bridge/**/*.{py,typed}"
      ]
    ]
  end

  # `make docs`.
  defp docs do
    [
      main: "readme",
      formatters: ["html"],
      extras:
        ["../README.md"] ++
          Enum.flat_map(@pages, fn {_group, pages} -> Enum.map(pages, &file/1) end) ++
          ["usage-rules.md", "../CONTRIBUTING.md", "../SECURITY.md", "../CHANGELOG.md"],
      groups_for_extras: for({group, pages} <- @pages, do: {group, Enum.map(pages, &file/1)}),
      groups_for_modules:
        [{"The application", [DSPex.Application]}] ++
          for(
            {group, names} <- @modules,
            do: {group, Enum.map(names, &Module.concat(DSPex.PythonBridge, &1))}
          ),
      nest_modules_by_prefix: [DSPex.PythonBridge],
      # The pictures of the pages.
      assets: %{"../docs/charts" => "charts"},
      before_closing_body_tag: &diagrams/1
    ]
  end

  defp file(page),
    do: "../docs/" <> if(Path.extname(page) == ".livemd", do: page, else: page <> ".md")

  # Diagrams are text. They are drawn where there is a network and the script is the one that is meant
  # here; elsewhere they are shown as they stand.
  defp diagrams(:html) do
    """
    <script defer src="https://cdn.jsdelivr.net/npm/mermaid@11.17.2/dist/mermaid.min.js" crossorigin="anonymous"
      integrity="sha384-EOXBFmc3gx5mb+vn0vPvvGqACToJD24hhacX5Yx+8NUUQrHIle/Qi5Bg9o3zKwW2"></script>
    <script>
      window.addEventListener("exdoc:loaded", () => {
        if (!window.mermaid) return;
        const theme = document.body.className.includes("dark") ? "dark" : "default";
        mermaid.initialize({startOnLoad: false, theme: theme});
        document.querySelectorAll("pre code.mermaid").forEach((code, number) =>
          mermaid.render("mermaid-" + number, code.textContent).then(({svg}) => {
            const drawn = document.createElement("div");
            drawn.innerHTML = svg;
            code.parentElement.replaceWith(drawn);
          }));
      });
    </script>
    """
  end

  defp diagrams(_other), do: ""
end
