defmodule DSPex.PythonBridge.Protocol.PeerEnv do
  @moduledoc false
  # The environment of a peer, made from the options of its bridge. What is not set here comes from the environment that
  # the peer inherits.

  @log_frames "DSPY_BRIDGE_LOG_FRAMES"
  @drain "DSPY_BRIDGE_DRAIN_MS"
  @default_drain_ms 5_000
  # Without fixed thresholds glibc maps and unmaps memory for each megabyte of arguments (1.0 instead of 0.5 ms), and
  # keeps more of large inputs.
  @malloc %{"MALLOC_MMAP_THRESHOLD_" => "4194304", "MALLOC_TRIM_THRESHOLD_" => "8388608"}

  @type t :: %{String.t() => String.t()}

  @doc "The environment for options that were checked."
  @spec new(keyword()) :: t()
  def new(opts) do
    {model, of_lm} = lm(opts[:lm])

    settings = %{
      "DSPY_BRIDGE_LM" => model,
      "DSPY_BRIDGE_LM_OPTIONS" => lm_options(of_lm, opts[:lm_options]),
      "DSPY_BRIDGE_ADAPTER" => opts[:adapter] && to_string(opts[:adapter]),
      "DSPY_BRIDGE_MAX_FRAME_BYTES" => opts[:max_frame_bytes] && "#{opts[:max_frame_bytes]}"
    }

    env = for {name, value} <- settings, value != nil, into: opts[:env] || %{}, do: {name, value}
    env = Map.merge(@malloc, env)
    # Log records go to Logger, unless :env or the BEAM's own environment has a value.
    if System.get_env(@log_frames), do: env, else: Map.put_new(env, @log_frames, "1")
  end

  defp lm_options(of_lm, options) do
    options = for {name, value} <- options || %{}, into: of_lm, do: {to_string(name), value}
    with true <- options != %{}, {:ok, json} <- json(options), do: json, else: (false -> nil)
  end

  @doc """
  The model of a `:lm`, and its other settings, which belong to `:lm_options`.

      iex> DSPex.PythonBridge.Protocol.PeerEnv.lm("openai/gpt-4o-mini")
      {"openai/gpt-4o-mini", %{}}
      iex> DSPex.PythonBridge.Protocol.PeerEnv.lm(%{model: "openai/gpt-4o-mini", temperature: 0.2})
      {"openai/gpt-4o-mini", %{"temperature" => 0.2}}
  """
  @spec lm(term()) :: {model :: term(), map()}
  def lm(%{} = lm),
    do: lm |> Map.new(fn {name, value} -> {to_string(name), value} end) |> Map.pop("model")

  def lm(model), do: {model, %{}}

  @doc "How long a peer may finish its calls. A value that the peer does not accept is the peer's to refuse."
  @spec drain_ms(t()) :: non_neg_integer()
  def drain_ms(env) do
    with text when text != nil <- env[@drain] || System.get_env(@drain),
         {ms, ""} when ms >= 0 <- Integer.parse(text) do
      ms
    else
      _none -> @default_drain_ms
    end
  end

  @doc """
  The arguments of `dspy.LM` as JSON, in ASCII only: what other characters become in an environment depends on the
  locale.
  """
  @spec json(map() | keyword()) :: {:ok, String.t()} | :error
  # By hand: OTP 26 has no `:json`.
  def json(options) do
    {:ok, for(<<char::utf8 <- JSON.encode!(Map.new(options))>>, into: "", do: ascii(char))}
  catch
    _kind, _reason -> :error
  end

  defp ascii(char) when char < 128, do: <<char>>

  defp ascii(char) do
    for <<unit::binary-size(2) <- :unicode.characters_to_binary([char], :utf8, :utf16)>>,
      into: "",
      do: "\\u" <> Base.encode16(unit)
  end
end
