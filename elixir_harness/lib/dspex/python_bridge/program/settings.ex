defmodule DSPex.PythonBridge.Program.Settings do
  @moduledoc false
  # What a definition may say besides its signature: adapters, and the names of the settings of LMs, of calls and of DSPy's
  # modules. They are the peer's (`lm/lm_options.py`, `programs/module_factory.py`), with which a test compares them.

  import DSPex.PythonBridge.Program.Refusal

  alias DSPex.PythonBridge.Protocol.Payload

  @adapters ~w(chat json xml)
  @of_server ~w(api_base base_url api_key timeout connect_timeout headers extra_headers extra_query api_version
                organization project custom_llm_provider azure_ad_token extra max_in_flight requests_per_minute
                tokens_per_minute)
  @of_calls ~w(temperature max_tokens max_completion_tokens top_p top_k min_p n stop seed presence_penalty
               frequency_penalty repetition_penalty logit_bias logprobs top_logprobs response_format tools tool_choice
               parallel_tool_calls functions function_call reasoning_effort reasoning thinking verbosity modalities audio
               prediction user metadata store service_tier web_search_options extra_body cache rollout_id)
  @of_lms ~w(model model_type num_retries use_developer_role finetuning_model engine inherit answers supports)
  @best ~w(n threshold fail_count reward module)
  @options %{
    "predict" => [],
    "chain_of_thought" => [],
    "react" => ["max_iters"],
    "best_of_n" => @best,
    "refine" => @best,
    "multi_chain_comparison" => ["m", "temperature"],
    "rlm" => ~w(max_iters max_llm_calls max_output_chars sub_lm)
  }

  @doc "Refuses an unknown adapter, and unknown names in `lm`, `config` and `options` of a program of this type."
  @spec check(keyword(), String.t()) :: :ok
  def check(passed, type) do
    for {key, value} <- passed, do: one(key, value, type)
    :ok
  end

  # With the LM that extracts the fields.
  defp one(:adapter, %{} = adapter, _type) do
    if not Enum.any?([:name, "name"], &(Payload.string(adapter[&1]) == "two_step")),
      do: adapter("unknown adapter")
  end

  defp one(:adapter, adapter, _type) do
    name = Payload.string(adapter)

    if name not in @adapters,
      do: adapter("unknown adapter #{shown(adapter)}#{meant(name || "", @adapters)}")
  end

  defp one(:lm, %{} = lm, _type), do: names(lm, "lm", @of_server ++ @of_calls ++ @of_lms)

  defp one(:config, %{} = config, _type),
    do: names(config, "config", @of_server ++ @of_calls ++ ["allow_truncated"])

  # DSPy's own spelling is N and M. A module of one's own has its own options.
  defp one(:options, options, type) when is_map_key(@options, type) do
    known = @options[type]
    names = for {key, _value} <- options, name = Payload.string(key), do: {lower(name), nil}
    names(Map.new(names), "options", known)
  end

  defp one(_key, _value, _type), do: :ok

  @spec adapter(String.t()) :: no_return()
  defp adapter(text) do
    two_step = ~s([name: "two_step", extraction_model: [model: …]])
    refuse("adapter", "#{text}; expected one of #{Enum.join(@adapters, ", ")}, or #{two_step}")
  end

  defp lower(name), do: if(String.length(name) == 1, do: String.downcase(name), else: name)

  defp names(given, where, known) do
    for {key, _value} <- given, name = Payload.string(key), name not in known do
      near = if known == [], do: "; this program type takes none", else: meant(name, known)
      refuse("#{where}.#{name}", "unknown option#{near}")
    end
  end

  @doc "The names, for the test that compares them with the peer's."
  @spec names() :: map()
  def names do
    %{
      adapters: @adapters,
      lm: @of_server ++ @of_calls ++ @of_lms,
      config: @of_server ++ @of_calls ++ ["allow_truncated"],
      options: @options
    }
  end
end
