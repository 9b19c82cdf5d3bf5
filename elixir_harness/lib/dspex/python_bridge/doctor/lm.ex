defmodule DSPex.PythonBridge.Doctor.LM do
  @moduledoc false
  # The default LM: its name, and whether the key that it needs is set, never its value. Which that is DSPy and
  # LiteLLM are asked, in the environment that the peer is to have. No request is made.

  alias DSPex.PythonBridge.{OS, Options}
  alias DSPex.PythonBridge.Bridge.Redaction
  alias DSPex.PythonBridge.Python.Probe

  # DSPy is imported, and LiteLLM.
  @time_limit_ms 60_000
  # Of what a provider may need, what nothing else stands in for: an address has a default, and clouds have roles.
  @keys ["_API_KEY", "_API_TOKEN", "_AUTH_TOKEN"]

  # The folder that it is started in is no place to find modules, first of all no dspy: that may be a part of the host's project.
  # A provider that DSPy's own engine serves has its key looked up by that engine's rules; others by LiteLLM's.
  # needs: what an empty environment lacks; lacks: what this one does; why: in DSPy's own words.
  @script """
  import sys
  sys.path[:] = [p for p in sys.path if p]
  import json, os
  os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")
  for name in [name for name, value in os.environ.items() if not value]:
      del os.environ[name]
  model = os.environ["DSPY_BRIDGE_LM"]
  options = json.loads(os.environ.get("DSPY_BRIDGE_LM_OPTIONS") or "{}")
  options.pop("model", None)
  answer = {"engine": "dspy", "known": True, "key": True, "needs": [], "lacks": [], "why": None}
  import dspy
  from dspy import lm15
  from dspy.clients.backend_selection import select_backend

  def native(chosen):
      provider, clients = chosen.resolution.provider, chosen.clients
      url = clients.get("api_base") or clients.get("base_url")

      def lacks(env, keys):
          urls = {provider: url} if url else None
          router = lm15.LMRouter(lm15.RouterConfig(env=env, api_keys=keys, base_urls=urls))
          try:
              router.lm(provider + ":" + chosen.resolution.model)
          except lm15.NotConfiguredError as error:
              return error

      alone = lacks({}, None)
      answer["key"] = alone is not None
      answer["needs"] = list(alone.env_keys) if alone else []
      error = lacks(None, {provider: clients["api_key"]} if "api_key" in clients else None)
      if error:
          answer.update(lacks=list(error.env_keys), why=str(error).strip().splitlines()[0])

  def compatible():
      import litellm
      litellm.suppress_debug_info = True
      address = options.get("api_base") or options.get("base_url")
      answer["engine"] = "litellm"
      try:
          litellm.get_llm_provider(model, custom_llm_provider=options.get("custom_llm_provider"), api_base=address)
      except Exception:
          answer["known"] = False
          return
      missing = litellm.validate_environment(model, options.get("api_key"), address)["missing_keys"]
      given = [name.upper() for name, value in options.items() if value]
      answer["lacks"] = [name for name in missing if not name.endswith(tuple("_" + option for option in given))]
      os.environ.clear()
      answer["needs"] = litellm.validate_environment(model)["missing_keys"]

  try:
      chosen = select_backend(dspy.LM(model, **options))
  except (TypeError, ValueError, dspy.LMError) as error:
      answer["refused"] = type(error).__name__ + ": " + str(error).strip().splitlines()[0]
  else:
      names = set(os.environ)
      native(chosen) if chosen.native else compatible()
      answer["set"] = [name for name in answer["needs"] if name in names]
  print("\\nDSPEX " + json.dumps(answer))
  """

  @type result :: {:ok | :note | :failed, String.t(), String.t() | nil, true | nil}

  @spec check(Path.t(), Options.t()) :: result()
  def check(python, options) do
    case setting("DSPY_BRIDGE_LM", options) do
      "" ->
        {:note, "config :dspex, :python_bridge has no default LM",
         ~s(config :dspex, :python_bridge, lm: "openai/gpt-4o-mini"; or each bridge, program or call names its own),
         true}

      "offline/echo" ->
        {:ok, "offline/echo, which is built in and needs no key; it only repeats the question",
         nil, true}

      model ->
        ask(python, model, options)
    end
  end

  defp setting(name, options), do: String.trim(options.env.()[name] || System.get_env(name, ""))

  defp ask(python, model, options) do
    env = Options.port_env(options)

    with {:exit, 0, output} <-
           OS.Command.run(python, ["-c", @script], env: env, limit_ms: @time_limit_ms),
         %{} = answer <- Probe.answer(output) do
      {status, found, advice} = result(answer, facts(model, options))
      {status, Redaction.redact("#{model}: #{found}", options), advice, true}
    else
      {:exit, _status, output} ->
        unknown(model, OS.Command.last_line(output) || "no reason", options)

      {:error, why} ->
        unknown(model, why, options)

      nil ->
        unknown(model, "no answer", options)
    end
  end

  defp unknown(model, why, options) do
    text = "#{model}: whether its key is set could not be told: #{why}"

    {:failed, Redaction.redact(text, options),
     "see whether `import dspy, litellm` works in that Python", nil}
  end

  defp facts(model, options) do
    given =
      case JSON.decode(setting("DSPY_BRIDGE_LM_OPTIONS", options)) do
        {:ok, %{} = given} -> given
        _none -> %{}
      end

    %{
      model: model,
      key?: given["api_key"] not in [nil, ""],
      address?: given["api_base"] != nil or given["base_url"] != nil,
      init?: setting("DSPY_BRIDGE_INIT", options) != ""
    }
  end

  defp result(%{"refused" => why}, _facts),
    do:
      {:failed, "DSPy refuses it or its options: #{why}",
       "correct :lm and :lm_options of the bridge"}

  defp result(%{"known" => false}, %{init?: true}),
    do: {:note, "neither DSPy nor LiteLLM knows its provider; DSPY_BRIDGE_INIT may bring it", nil}

  defp result(%{"known" => false}, _facts),
    do:
      {:failed, "neither DSPy nor LiteLLM knows its provider",
       "write it as provider/model, such as openai/gpt-4o-mini; for a server of your own that speaks as OpenAI's does: openai/model, and api_base in :lm_options"}

  # Certain: DSPy itself will refuse each call.
  defp result(%{"engine" => "dspy", "why" => why} = answer, facts) when why != nil do
    case answer["lacks"] do
      [] ->
        {:failed, "DSPy will refuse it: " <> why, "do as it says" <> options(facts.model)}

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

  defp set(names, facts),
    do:
      "set #{Enum.join(names, " or ")} in the environment of the BEAM, or api_key in :lm_options" <>
        keyless(facts)

  # By LiteLLM, whose words those are not.
  defp options("azure/" <> _name),
    do: ", or give api_key, api_base and api_version in :lm_options"

  defp options(_model), do: ""

  defp keyless(%{address?: true}), do: ~s(; for a server that needs none, any text will do)
  defp keyless(_facts), do: ""
end
