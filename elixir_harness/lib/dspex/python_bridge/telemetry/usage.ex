defmodule DSPex.PythonBridge.Telemetry.Usage do
  @moduledoc false
  # What a run has asked of LMs, from the `meta` of its reply: measurements and metadata for its events.

  alias DSPex.PythonBridge.Error

  # Of a run, by the names of OpenAI, or those that an LM of the user's may give.
  @input ["prompt_tokens", "input_tokens"]
  @output ["completion_tokens", "output_tokens"]

  # Of an LM call. What is not known is missing in the event.
  @measured [:wait_ms, :input_tokens, :output_tokens] ++
              [:first_chunk_ms, :cached_tokens, :reasoning_tokens, :cost_usd]
  # Of the tokens, where a provider tells.
  @cached [{"prompt_tokens_details", "cached_tokens"}, {"input_tokens_details", "cached_tokens"}]
  @reasoning [
    {"completion_tokens_details", "reasoning_tokens"},
    {"output_tokens_details", "reasoning_tokens"}
  ]

  @doc "A result without its LM calls, its `meta`, if it came with one, and these."
  @spec take(result) :: {result, map() | nil, lm_calls :: [map()]}
        when result: tuple() | :cancelled
  def take({:ok, id, result, meta}) do
    {lm_calls, meta} = Map.pop(meta, "lm_events", [])
    {{:ok, id, result, meta}, meta, lm_calls}
  end

  def take({:error, %Error{meta: %{} = meta} = error}) do
    {lm_calls, meta} = Map.pop(meta, "lm_events", [])
    {{:error, %{error | meta: meta}}, meta, lm_calls}
  end

  def take(result), do: {result, nil, []}

  @doc """
  The measurements of a run.

      iex> usage = %{"m" => %{"prompt_tokens" => 11, "completion_tokens" => 7}, "of-mine" => %{"input_tokens" => 2}}
      iex> DSPex.PythonBridge.Telemetry.Usage.measurements(%{"lm_usage" => usage, "lm_calls" => 3, "cache_hits" => 1})
      %{input_tokens: 13, output_tokens: 7, lm_calls: 3, cache_hits: 1, wait_ms: 0}
      iex> details = %{"prompt_tokens_details" => %{"cached_tokens" => 5}}
      iex> meta = %{"lm_usage" => %{"m" => details}, "lm_calls" => 1, "wait_ms" => 2.5, "cost_usd" => 0.01}
      iex> DSPex.PythonBridge.Telemetry.Usage.measurements(meta) |> Map.take([:wait_ms, :cached_tokens, :cost_usd])
      %{wait_ms: 2.5, cached_tokens: 5, cost_usd: 0.01}
      iex> DSPex.PythonBridge.Telemetry.Usage.measurements(nil)
      %{}
  """
  @spec measurements(map() | nil) :: map()
  def measurements(%{"lm_calls" => calls} = meta) do
    used = for {_model, %{} = tokens} <- meta["lm_usage"] || %{}, do: tokens
    # A provider, or an LM of the user's, may give anything.
    count? = &(is_number(&1) and &1 > 0)
    tokens = fn names -> Enum.sum_by(used, &Enum.find(for(n <- names, do: &1[n]), 0, count?)) end

    known(%{
      input_tokens: tokens.(@input),
      output_tokens: tokens.(@output),
      lm_calls: calls,
      cache_hits: meta["cache_hits"] || 0,
      wait_ms: meta["wait_ms"] || 0,
      cached_tokens: details(used, @cached),
      reasoning_tokens: details(used, @reasoning),
      cost_usd: meta["cost_usd"]
    })
  end

  def measurements(_unknown), do: %{}

  defp details(used, names) do
    counts =
      for tokens <- used,
          {part, name} <- names,
          %{^name => count} <- [tokens[part]],
          is_number(count),
          do: count

    if counts != [], do: Enum.sum(counts)
  end

  defp known(measurements), do: Map.reject(measurements, fn {_name, value} -> value == nil end)

  @doc "The models of which tokens were counted."
  @spec models(map() | nil) :: [String.t()]
  def models(meta), do: Enum.sort(Map.keys((meta || %{})["lm_usage"] || %{}))

  @doc """
  The event of an LM call: measurements and metadata. `now`: when its run's reply came, in native time; `whole`: the
  `meta` of that.
  """
  @spec lm_event(map(), integer(), map()) :: {map(), map()}
  def lm_event(call, now, whole) do
    # Times of the peer count from when it has received the request, as the duration of the whole does.
    ended = call["started_ms"] + call["wait_ms"] + call["duration_ms"]

    ago = max(whole["duration_ms"] - ended, 0)
    times = %{duration: native(call["duration_ms"]), monotonic_time: now - native(ago)}
    measurements = for name <- @measured, into: times, do: {name, call["#{name}"]}

    metadata = %{
      model: call["model"],
      cached: call["cached"],
      result: if(call["error_type"], do: :error, else: :ok),
      error_type: call["error_type"],
      finish_reason: call["finish_reason"]
    }

    {known(measurements), metadata}
  end

  defp native(ms), do: System.convert_time_unit(round(ms * 1_000), :microsecond, :native)
end
