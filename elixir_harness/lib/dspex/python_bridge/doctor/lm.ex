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

      model when model in ["offline/echo", "offline/script"] ->
        {:ok, "#{model}, which is built in and needs no key", nil, true}

      model ->
        look(python, model, options)
    end
  end

  @doc "Asks the default LM two small questions."
  @spec ask(Path.t(), Options.t()) :: result()
  def ask(python, options) do
    case setting("DSPY_BRIDGE_LM", options) do
      model when model in ["", "offline/echo"] ->
        {:note, "there is #{if model == "", do: "no LM", else: "only offline/echo"} to ask", nil,
         true}

      model ->
        with_facts(python, ["--ask"], @ask_limit_ms, model, options, fn
          %{"asked" => answer} -> asked(answer)
          answer -> result(answer, facts(options))
        end)
    end
  end

  defp setting(name, options), do: String.trim(options.env.()[name] || System.get_env(name, ""))

  defp look(python, model, options) do
    with_facts(python, [], @time_limit_ms, model, options, fn answer ->
      case result(answer, facts(options)) do
        {:failed, _found, _advice} = failed -> failed
        {_status, _found, _advice} = result -> reached(answer["unreachable"]) || result
      end
    end)
  end

  defp with_facts(python, args, limit_ms, model, options, result) do
    env = Options.port_env(options)

    with {:exit, 0, output} <-
           OS.Command.run(python, [script() | args], env: env, limit_ms: limit_ms),
         %{} = answer <- Probe.answer(output) do
      {status, found, advice} = result.(answer)
      fact = if status != :failed, do: true
      {status, Redaction.redact("#{model}: #{found}", options), advice, fact}
    else
      {:exit, _status, output} ->
        unknown(model, OS.Command.last_line(output) || "no reason", options)

      {:error, why} ->
        unknown(model, why, options)

      nil ->
        unknown(model, "no answer", options)
    end
  end

  # Of this library's own package: the peer's script may be another.
  defp script, do: Application.app_dir(:dspex, "priv/python/package/dspy_bridge/check_lm.py")

  defp unknown(model, why, options) do
    text = "#{model}: could not find out whether its key is set: #{why}"

    {:failed, Redaction.redact(text, options),
     "see whether `import dspy, litellm` works in that Python", nil}
  end

  defp facts(options) do
    given =
      case JSON.decode(setting("DSPY_BRIDGE_LM_OPTIONS", options)) do
        {:ok, %{} = given} -> given
        _none -> %{}
      end

    %{
      key?: given["api_key"] not in [nil, ""],
      address?: given["api_base"] != nil or given["base_url"] != nil,
      init?: setting("DSPY_BRIDGE_INIT", options) != ""
    }
  end

  defp result(%{"refused" => why}, _facts),
    do:
      {:failed, "it or its options are refused: #{why}",
       "correct :lm and :lm_options of the bridge"}

  defp result(%{"known" => false}, %{init?: true}),
    do: {:note, "neither DSPy nor LiteLLM knows its provider; DSPY_BRIDGE_INIT may bring it", nil}

  defp result(%{"known" => false}, _facts),
    do:
      {:failed, "neither DSPy nor LiteLLM knows its provider",
       "write it as provider/model, such as openai/gpt-4o-mini; for a server of your own that speaks as OpenAI's does: openai/model, and api_base in :lm_options"}

  # DSPy itself would refuse each call.
  defp result(%{"engine" => "dspy", "why" => why} = answer, facts) when why != nil do
    case answer["lacks"] do
      [] ->
        {:failed, "DSPy will refuse it: " <> why, "do as it says, in :lm_options"}

      names ->
        {:failed, "its key is not set", set(names, facts)}
    end
  end

  defp result(%{"engine" => "dspy", "key" => false}, _facts), do: {:ok, "needs no key", nil}

  defp result(%{"lacks" => []}, %{key?: true}),
    do: {:ok, "its key is set, in :lm_options or DSPY_BRIDGE_LM_OPTIONS", nil}

  defp result(%{"lacks" => [], "set" => [_one | _more] = set}, _facts),
    do: {:ok, "its key is set, #{Enum.join(set, ", ")}", nil}

  defp result(%{"engine" => "dspy"}, _facts), do: {:ok, "its key is set", nil}

  defp result(%{"lacks" => []}, _facts), do: {:ok, "no variable is known that it needs", nil}

  defp result(%{"lacks" => lacks}, facts) do
    keys = Enum.filter(lacks, &String.ends_with?(&1, @keys))

    cond do
      keys == [] ->
        {:note, "not set: #{Enum.join(lacks, ", ")}; it may find what it needs elsewhere", nil}

      facts.address? ->
        {:note, "its key is not set, which the server at its api_base may not need",
         set(keys, facts)}

      true ->
        {:failed, "its key is not set", set(keys, facts)}
    end
  end

  defp reached(nil), do: nil

  defp reached(why),
    do: {:failed, why, "start its server, or correct api_base in :lm_options"}

  defp asked(%{"error" => why}),
    do:
      {:failed, "it gave no answer: #{why}",
       "correct :lm, its key or :lm_options; or see the log of its server"}

  defp asked(%{"ms" => ms} = answer) do
    honours =
      for {name, text} <- [
            {"response_schema", "response schemas"},
            {"function_calling", "function calls"}
          ],
          do: "#{text}: #{if answer[name], do: "honoured", else: "not honoured"}"

    found = "answered in #{ms} ms; " <> Enum.join(honours, ", ")

    case answer["supports"] do
      nil -> {:ok, found, nil}
      names -> {:note, found, "add to its :lm_options: supports: #{inspect(names)}"}
    end
  end

  defp set(names, facts),
    do:
      "set #{Enum.join(names, " or ")} in the environment of the BEAM, or api_key in :lm_options" <>
        keyless(facts)

  defp keyless(%{address?: true}), do: ~s(; for a server that needs none, any text will do)
  defp keyless(_facts), do: ""
end
