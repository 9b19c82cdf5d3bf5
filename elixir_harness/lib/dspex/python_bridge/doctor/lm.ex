defmodule DSPex.PythonBridge.Doctor.LM do
  @moduledoc false
  # The default LM: its name, whether its server can be reached, and whether the key that it needs is set, never its value.
  # The script `check_lm.py` asks DSPy and LiteLLM which key that is, in the peer's environment. Only `ask` makes requests.

  alias DSPex.PythonBridge.{OS, Options}
  alias DSPex.PythonBridge.Bridge.Redaction
  alias DSPex.PythonBridge.Python.Probe

  # DSPy and LiteLLM are imported.
  @time_limit_ms 60_000
  # And the LM answers three questions, each within the minute of `probe.py`.
  @ask_limit_ms 4 * 60_000
  # The variables without a substitute: an address has a default, and clouds have roles.
  @keys ["_API_KEY", "_API_TOKEN", "_AUTH_TOKEN"]

  @type result :: {:ok | :note | :failed, String.t(), String.t() | nil, true | nil}

  @spec check(Path.t(), Options.t()) :: result()
  def check(python, options) do
    case setting("DSPY_BRIDGE_LM", options) do
      "" ->
        {:note, "config :dspex, :python_bridge has no default LM",
         ~s(config :dspex, :python_bridge, lm: "openai/gpt-4o-mini"; or each bridge, program or call names its own),
         true}

      "offline/" <> _ = model ->
        {:ok, "#{model}, which is built in and needs no key", nil, true}

      model ->
        look(python, model, options, [], @time_limit_ms)
    end
  end

  @doc "Asks the default LM two or three small questions."
  @spec ask(Path.t(), Options.t()) :: result()
  def ask(python, options) do
    case setting("DSPY_BRIDGE_LM", options) do
      model when model in ["", "offline/echo"] -> {:note, "there is no LM to ask", nil, true}
      model -> look(python, model, options, ["--ask"], @ask_limit_ms)
    end
  end

  defp setting(name, options), do: String.trim(options.env.()[name] || System.get_env(name, ""))

  defp look(python, model, options, args, limit_ms) do
    env = Options.port_env(options)
    run = OS.Command.run(python, [script() | args], env: env, limit_ms: limit_ms)

    {status, found, advice} =
      with {:exit, 0, output} <- run, %{} = answer <- Probe.answer(output) do
        result(answer, options)
      else
        {:error, why} -> unknown(why)
        {:exit, _status, output} -> unknown(OS.Command.last_line(output) || "no reason")
        nil -> unknown("no answer")
      end

    fact = if status != :failed, do: true
    {status, Redaction.redact("#{model}: #{found}", options), advice, fact}
  end

  # Of this library's own package: the peer's script may be another.
  defp script, do: Application.app_dir(:dspex, "priv/python/package/dspy_bridge/check_lm.py")

  defp unknown(why),
    do:
      {:failed, "could not find out whether its key is set: #{why}",
       "see whether `import dspy` works in that Python"}

  ## What the script found out

  defp result(%{"asked" => %{"error" => why}}, _options),
    do:
      {:failed, "it gave no answer: #{why}",
       "correct :lm, its key or :lm_options; or see the log of its server"}

  defp result(%{"asked" => %{"ms" => ms} = answer}, _options) do
    honoured = &if answer[&1], do: "honoured", else: "not honoured"

    found =
      "answered in #{ms} ms; response schemas: #{honoured.("response_schema")}, " <>
        "function calls: #{honoured.("function_calling")}"

    if names = answer["supports"],
      do: {:note, found, "add to its :lm_options: supports: #{inspect(names)}"},
      else: {:ok, found, nil}
  end

  defp result(%{"lacking" => why}, _options),
    do: {:failed, why, "`mix dspex.setup --with litellm`, or an LM and options that need none"}

  defp result(%{"refused" => why}, _options),
    do:
      {:failed, "it or its options are refused: #{why}",
       "correct :lm and :lm_options of the bridge"}

  defp result(%{"known" => false}, options) do
    if setting("DSPY_BRIDGE_INIT", options) != "",
      do: {:note, "its provider is not known; DSPY_BRIDGE_INIT may bring it", nil},
      else:
        {:failed, "neither DSPy nor LiteLLM knows its provider",
         "write it as provider/model, such as openai/gpt-4o-mini; for a server of your own that speaks as OpenAI's does: openai/model, and api_base in :lm_options"}
  end

  defp result(%{"lacks" => lacks} = answer, options) do
    keys = Enum.filter(lacks, &String.ends_with?(&1, @keys))

    cond do
      # DSPy itself would refuse each call.
      answer["why"] && lacks == [] ->
        {:failed, "DSPy will refuse it: #{answer["why"]}", "do as it says, in :lm_options"}

      answer["why"] || (keys != [] and not address?(options)) ->
        {:failed, "its key is not set", set(if(keys == [], do: lacks, else: keys), options)}

      keys != [] ->
        text = "its key is not set, which the server at its api_base may not need"
        {:note, text, set(keys, options)}

      lacks != [] ->
        {:note, "not set: #{Enum.join(lacks, ", ")}; it may find what it needs elsewhere", nil}

      answer["unreachable"] ->
        {:failed, answer["unreachable"], "start its server, or correct api_base in :lm_options"}

      true ->
        {:ok, key(answer, given(options)), nil}
    end
  end

  defp key(%{"key" => false}, _given), do: "needs no key"

  defp key(_answer, %{"api_key" => _}),
    do: "its key is set, in :lm_options or DSPY_BRIDGE_LM_OPTIONS"

  defp key(%{"set" => [_ | _] = set}, _given), do: "its key is set, #{Enum.join(set, ", ")}"
  defp key(_answer, _given), do: "no variable is known that it needs"

  defp given(options) do
    case JSON.decode(setting("DSPY_BRIDGE_LM_OPTIONS", options)) do
      {:ok, %{} = given} -> given
      _none -> %{}
    end
  end

  defp address?(options), do: given(options)["api_base"] != nil

  defp set(names, options) do
    keyless = if address?(options), do: "; for a server that needs none, any text will do"

    "set #{Enum.join(names, " or ")} in the environment of the BEAM, or api_key in :lm_options#{keyless}"
  end
end
