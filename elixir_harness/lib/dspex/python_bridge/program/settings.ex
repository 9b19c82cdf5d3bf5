defmodule DSPex.PythonBridge.Program.Settings do
  @moduledoc false
  # What a definition says besides its signature and tools, as far as it can be known at compile time: adapters, the
  # names of settings, and demos. The names are the peer's (`lm/lm_options.py`, `programs/module_factory.py`); a test compares them.

  import DSPex.PythonBridge.Program.Refusal

  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Program.{Cast, Field}
  alias DSPex.PythonBridge.Protocol.Payload

  @adapters ~w(chat json xml)
  @config ~w(api_base base_url api_key timeout connect_timeout headers extra_headers extra_query api_version organization
             project custom_llm_provider azure_ad_token extra max_in_flight requests_per_minute tokens_per_minute
             temperature max_tokens max_completion_tokens top_p top_k min_p n stop seed presence_penalty
             frequency_penalty repetition_penalty logit_bias logprobs top_logprobs response_format tools tool_choice
             parallel_tool_calls functions function_call reasoning_effort reasoning thinking verbosity modalities audio
             prediction user metadata store service_tier web_search_options extra_body cache rollout_id)
  @lm @config ++
        ~w(model model_type num_retries use_developer_role finetuning_model engine inherit answers supports)
  @scored ~w(n threshold fail_count reward module)
  # DSPy writes N and M.
  @options %{
    "predict" => [],
    "chain_of_thought" => [],
    "react" => ~w(max_iters),
    "best_of_n" => ["N" | @scored],
    "refine" => ["N" | @scored],
    "multi_chain_comparison" => ~w(m M temperature),
    "rlm" => ~w(max_iters max_llm_calls max_output_chars sub_lm)
  }

  @doc "Refuses what the peer would refuse in a program of this type with these fields."
  @spec check(keyword(), String.t(), [Field.t()]) :: :ok
  def check(passed, type, fields) do
    for {key, value} <- passed, do: one(key, value, type, fields)
    :ok
  end

  @doc "The names, for the test that compares them with the peer's."
  @spec names() :: map()
  def names,
    do: %{"lm" => @lm, "config" => ["allow_truncated" | @config], "options" => @options}

  defp one(:adapter, adapter, _type, _fields) when not is_map(adapter) and adapter != nil do
    if Payload.string(adapter) not in @adapters do
      expected = ~s(#{Enum.join(@adapters, ", ")}, or [name: "two_step", extraction_model: …])
      refuse("adapter", "unknown adapter #{shown(adapter)}; expected one of #{expected}")
    end
  end

  defp one(:adapter, %{} = given, _type, _fields),
    do: known!(given, :adapter, ~w(name native_tools parallel_tool_calls extraction_model))

  defp one(key, %{} = given, _type, _fields) when key in [:lm, :config],
    do: known!(given, key, names()["#{key}"])

  # A module of one's own has its own options.
  defp one(:options, %{} = given, type, _fields) when is_map_key(@options, type),
    do: known!(given, :options, @options[type])

  defp one(:demos, demos, _type, fields) when is_list(demos) do
    names = Enum.map(fields, & &1.name)

    for {demo, index} <- Enum.with_index(demos),
        not is_map(demo),
        do: refuse("demos[#{index}]", "expected a keyword list or a map, got #{shown(demo)}")

    for {demo, index} <- Enum.with_index(demos), {key, value} <- demo do
      known!(%{key => value}, "demos[#{index}]", names)
      field = Enum.find(fields, &(&1.name == Payload.string(key)))
      enum!(field.type, value, "demos[#{index}].#{field.name}")
    end
  end

  defp one(:demos, demos, _type, _fields) when demos != nil,
    do: refuse("demos", "expected a list of keyword lists or maps, got #{shown(demos)}")

  defp one(_key, _value, _type, _fields), do: :ok

  defp known!(given, where, known) do
    for {key, _value} <- given, name = Payload.string(key), name not in known do
      near = if known == [], do: "", else: Table.meant(name, known, 0.8)
      refuse("#{where}.#{name}", "unknown name#{near}")
    end
  end

  # The peer checks the other types.
  defp enum!({:optional, type}, value, where) when value != nil, do: enum!(type, value, where)

  defp enum!({:list, type}, values, where) when is_list(values) do
    for {value, index} <- Enum.with_index(values), do: enum!(type, value, "#{where}[#{index}]")
  end

  defp enum!({:enum, _values, _terms, dumps} = type, value, where) do
    value = Map.get(dumps, value, value)

    with {:error, text} <- Cast.cast(Payload.string(value) || value, type, where) do
      [where, text] = String.split(text, ": ", parts: 2)
      refuse(where, text)
    end
  end

  defp enum!(_type, _value, _where), do: :ok
end
