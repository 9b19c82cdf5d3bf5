defmodule DSPex.PythonBridge.Options do
  @moduledoc """
  The options of a bridge, checked once. What comes out of `new/1` can be used without looking
  again; what cannot be right is refused with a text that names the option.

  | option | default | what |
  | --- | --- | --- |
  | `:name` | `DSPex.PythonBridge.Bridge` | how the bridge is registered; nil for not at all |
  | `:python_executable` | see `DSPex.PythonBridge.Python.Interpreter` | path, or a name on the `PATH` |
  | `:script_path` | the drop-in in `priv/python` | the peer's script |
  | `:lm` | the peer's own setting | the default LM, as DSPy names it |
  | `:lm_options` | none | map or keyword list of `dspy.LM` arguments (`api_key`, …) |
  | `:adapter` | DSPy's | `chat`, `json`, `xml`, … |
  | `:env` | `%{}` | map of strings: more environment for the peer |
  | `:max_frame_bytes` | 64 MiB | a larger request fails before it is sent |
  | `:default_timeout` | 30 000 ms | of calls that name none; an integer or `:infinity` |
  | `:max_retries` | 3 | how often a call is sent again whose peer died |
  | `:max_pending` | 100 000 | calls that may wait for a reply; past it `:overloaded` |
  | `:start_timeout` | 30 000 ms | a peer that has not answered its first ping by then is replaced |

  Defaults come from `config :dspex, :python_bridge, …`.

  The peer's log records go to Logger (`DSPex.PythonBridge.Bridge.LogForwarder`), since `DSPY_BRIDGE_LOG_FRAMES=1` is in its
  environment if nothing else is said there; with `env: %{"DSPY_BRIDGE_LOG_FRAMES" => "0"}` they go to
  the standard error of the BEAM.

  The settings for the peer go into its environment, never into its arguments, which everybody on
  the machine can read. They may hold keys: `env` of the struct is a function, so that no
  inspection, state dump or crash report shows them; `seal/1` does the same to an option list.
  """

  alias DSPex.PythonBridge.Programs
  alias DSPex.PythonBridge.Calls.LoadCounters
  alias DSPex.PythonBridge.OTP.Sealed

  @default_max_frame_bytes 64 * 1024 * 1024
  # {:packet, 4} of a port carries no more.
  @max_frame_bytes 2_147_483_647
  # `receive` takes no longer timeout.
  @max_timeout 4_294_967_295
  @default_drain_ms 5_000
  @secret [:lm_options, :env]
  @log_frames "DSPY_BRIDGE_LOG_FRAMES"
  @known [:name, :python_executable, :script_path, :lm, :lm_options, :adapter, :env] ++
           [:max_frame_bytes, :default_timeout, :max_retries, :max_pending, :start_timeout]
  # Names that are nearer to each other than this are taken for one that was misspelt.
  @alike 0.8

  defstruct name: nil,
            python_executable: nil,
            script_path: nil,
            env: nil,
            max_frame_bytes: @default_max_frame_bytes,
            default_timeout: 30_000,
            max_retries: 3,
            max_pending: 100_000,
            start_timeout: 30_000,
            drain_ms: @default_drain_ms,
            # Of a bridge in a pool.
            slot: nil,
            # The table of its supervisor's; its own if there is none.
            programs: nil

  @type t :: %__MODULE__{
          name: GenServer.name() | nil,
          python_executable: String.t() | nil,
          script_path: Path.t(),
          env: (-> %{String.t() => String.t()}),
          max_frame_bytes: pos_integer(),
          default_timeout: timeout(),
          max_retries: non_neg_integer(),
          max_pending: pos_integer(),
          start_timeout: pos_integer(),
          drain_ms: non_neg_integer(),
          slot: slot() | nil,
          programs: Programs.Store.table() | nil
        }
  @typedoc "A bridge's place in its pool, and the names of the processes to tell of its state, and of silence."
  @type slot ::
          {LoadCounters.t(), index :: pos_integer(), coordinator :: atom(), monitor :: atom()}

  @doc """
  Options from a keyword list over the application's configuration, or the error that names the
  one that is not accepted. `name` is the bridge's where neither gives one.

      iex> {:ok, options} = DSPex.PythonBridge.Options.new(lm: "openai/gpt-4o-mini", max_retries: 1)
      iex> {options.max_retries, options.default_timeout}
      {1, 30000}
      iex> {:error, error} = DSPex.PythonBridge.Options.new(max_retries: -1)
      iex> Exception.message(error)
      "python bridge: :max_retries: expected 0 or more, got -1"
  """
  @spec new(keyword(), GenServer.name() | nil) :: {:ok, t()} | {:error, Exception.t()}
  def new(opts \\ [], name \\ nil) do
    with {:ok, config} <- keyword(Application.get_env(:dspex, :python_bridge, []), "config"),
         {:ok, opts} <- keyword(opts, "options") do
      # Of an option given twice the first counts, as Keyword has it.
      merged =
        (opts ++ config ++ [name: name]) |> Enum.uniq_by(&elem(&1, 0)) |> Enum.map(&unseal/1)

      case Enum.find_value(merged, &refusal/1) do
        nil -> {:ok, build(merged)}
        text -> {:error, ArgumentError.exception("python bridge: " <> text)}
      end
    end
  end

  @doc """
  The option list with its secret values wrapped in functions, which `new/1` takes as well. A
  supervisor logs the arguments of a child that it restarts: those must not show keys.

      iex> [lm_options: sealed] = DSPex.PythonBridge.Options.seal(lm_options: [api_key: "sk-…"])
      iex> is_function(sealed, 0)
      true
  """
  @spec seal(keyword()) :: keyword()
  def seal(opts) when is_list(opts) do
    Enum.map(opts, fn
      {key, value} when key in @secret and not is_function(value, 0) -> {key, Sealed.new(value)}
      other -> other
    end)
  end

  def seal(opts), do: opts

  @doc """
  Whether a list of options can be right: a keyword list of which `refusal` gives nil for each. The error
  names what cannot, after `whose`.
  """
  @spec check(term(), String.t(), ({atom(), term()} -> String.t() | nil)) ::
          :ok | {:error, Exception.t()}
  def check(opts, whose, refusal) do
    text =
      if Keyword.keyword?(opts),
        do: Enum.find_value(opts, refusal),
        else: "options: expected a keyword list"

    if text, do: {:error, ArgumentError.exception("#{whose}: #{text}")}, else: :ok
  end

  @doc """
  The text of a refusal: what was expected of an option, and what it got, cut short.

      iex> DSPex.PythonBridge.Options.expected(:max_pending, "1 or more", 0)
      ":max_pending: expected 1 or more, got 0"
  """
  @spec expected(atom(), String.t(), term()) :: String.t()
  def expected(key, what, value),
    do: "#{inspect(key)}: expected #{what}, got #{inspect(value, limit: 5, printable_limit: 80)}"

  @doc "The names of a bridge's options."
  @spec known() :: [atom()]
  def known, do: @known

  @doc """
  The text of a refusal of an option that there is not, with the nearest that there is.

      iex> DSPex.PythonBridge.Options.unknown(:max_retrys, DSPex.PythonBridge.Options.known())
      ":max_retrys: there is no such option; did you mean :max_retries?"
  """
  @spec unknown(atom(), [atom()]) :: String.t()
  def unknown(key, known) do
    text = "#{inspect(key)}: there is no such option"
    nearness = &String.jaro_distance(Atom.to_string(key), Atom.to_string(&1))
    nearest = Enum.max_by(known, nearness)
    if nearness.(nearest) > @alike, do: "#{text}; did you mean #{inspect(nearest)}?", else: text
  end

  @doc "The same options for a peer whose log records are to go to its standard error."
  @spec log_to_stderr(t()) :: t()
  def log_to_stderr(%__MODULE__{env: env} = options) do
    env = env.()
    # A value that the peer refuses is to be refused again.
    env = if env[@log_frames] == "1", do: %{env | @log_frames => "0"}, else: env
    %{options | env: Sealed.new(env)}
  end

  @doc "The environment of the peer's, as a port takes it."
  @spec port_env(t()) :: [{charlist(), charlist()}]
  def port_env(%__MODULE__{env: env}),
    do: for({name, value} <- env.(), do: {to_charlist(name), to_charlist(value)})

  defp unseal({key, value}) when key in @secret and is_function(value, 0), do: {key, value.()}
  defp unseal(option), do: option

  defp keyword(list, what) do
    if Keyword.keyword?(list),
      do: {:ok, list},
      else: {:error, ArgumentError.exception("python bridge: #{what}: expected a keyword list")}
  end

  # One clause per option: nil for a value that can be right, else what was expected. Values that
  # may be secret are never repeated in the text.
  defp refusal({:name, name}) when is_atom(name), do: nil
  defp refusal({:name, {:global, _}}), do: nil
  defp refusal({:name, {:via, module, _}}) when is_atom(module), do: nil
  defp refusal({:name, other}), do: expected(:name, "an atom, {:global, _} or {:via, …}", other)

  defp refusal({:python_executable, nil}), do: nil
  defp refusal({:python_executable, value}), do: text(:python_executable, value)
  defp refusal({:script_path, nil}), do: nil
  defp refusal({:script_path, value}), do: text(:script_path, value)
  defp refusal({:lm, nil}), do: nil
  defp refusal({:lm, value}), do: text(:lm, value)
  defp refusal({:adapter, value}) when is_atom(value), do: nil
  defp refusal({:adapter, value}), do: text(:adapter, value)

  defp refusal({:lm_options, nil}), do: nil

  defp refusal({:lm_options, options}) do
    with true <- is_map(options) or Keyword.keyword?(options),
         {:ok, _json} <- ascii_json(options) do
      nil
    else
      _wrong -> ":lm_options: expected a map or keyword list that can be written as JSON"
    end
  end

  defp refusal({:env, %{} = env}) do
    if Enum.all?(env, fn {k, v} -> env_name?(k) and env_value?(v) end),
      do: nil,
      else: ":env: expected a map from names to texts, without NUL characters"
  end

  defp refusal({:env, _other}), do: ":env: expected a map from names to texts"

  defp refusal({:max_frame_bytes, n}) when n in 1..@max_frame_bytes, do: nil

  defp refusal({:max_frame_bytes, other}),
    do: expected(:max_frame_bytes, "a number of bytes from 1 to #{@max_frame_bytes}", other)

  defp refusal({:default_timeout, :infinity}), do: nil
  defp refusal({:default_timeout, ms}), do: milliseconds(:default_timeout, ms)
  defp refusal({:start_timeout, ms}), do: milliseconds(:start_timeout, ms)
  defp refusal({:max_retries, n}) when is_integer(n) and n >= 0, do: nil
  defp refusal({:max_retries, other}), do: expected(:max_retries, "0 or more", other)
  defp refusal({:max_pending, n}) when is_integer(n) and n > 0, do: nil
  defp refusal({:max_pending, other}), do: expected(:max_pending, "1 or more", other)

  defp refusal({:slot, {_counters, index, coordinator, monitor}})
       when is_integer(index) and is_atom(coordinator) and is_atom(monitor),
       do: nil

  defp refusal({:programs, table}) when is_reference(table), do: nil
  defp refusal({key, _value}), do: unknown(key, @known)

  defp text(key, value) do
    if is_binary(value) and value != "" and env_value?(value),
      do: nil,
      else: expected(key, "a text", value)
  end

  defp milliseconds(_key, ms) when ms in 1..@max_timeout, do: nil
  defp milliseconds(key, other), do: expected(key, "a positive number of milliseconds", other)

  defp env_name?(name), do: is_binary(name) and name =~ ~r/\A[^=\0]+\z/ and String.valid?(name)

  defp env_value?(value),
    do: is_binary(value) and String.valid?(value) and not String.contains?(value, <<0>>)

  defp build(opts) do
    env = peer_env(opts)
    script = opts[:script_path] || Application.app_dir(:dspex, "priv/python/dspy_bridge.py")

    opts
    |> Keyword.drop([:lm, :lm_options, :adapter, :env, :script_path])
    |> then(&struct!(__MODULE__, &1))
    |> Map.merge(%{
      script_path: Path.expand(script),
      env: Sealed.new(env),
      drain_ms: drain_ms(env)
    })
  end

  # What the peer itself takes; one that it will refuse is its own to refuse.
  defp drain_ms(env) do
    with text when text != nil <-
           env["DSPY_BRIDGE_DRAIN_MS"] || System.get_env("DSPY_BRIDGE_DRAIN_MS"),
         {ms, ""} when ms >= 0 <- Integer.parse(text) do
      ms
    else
      _not_said -> @default_drain_ms
    end
  end

  # What is not set here is left to the environment that the peer inherits.
  defp peer_env(opts) do
    [
      {"DSPY_BRIDGE_LM", opts[:lm]},
      {"DSPY_BRIDGE_LM_OPTIONS", lm_options_json(opts[:lm_options])},
      {"DSPY_BRIDGE_ADAPTER", opts[:adapter] && to_string(opts[:adapter])},
      {"DSPY_BRIDGE_MAX_FRAME_BYTES", opts[:max_frame_bytes] && "#{opts[:max_frame_bytes]}"}
    ]
    |> Enum.reject(fn {_name, value} -> is_nil(value) end)
    |> Enum.into(Map.get(Map.new(opts), :env, %{}))
    |> log_frames(System.get_env(@log_frames))
  end

  # Its records are for Logger, unless :env or the BEAM's own environment says something else.
  defp log_frames(env, nil), do: Map.put_new(env, @log_frames, "1")
  defp log_frames(env, _inherited), do: env

  defp lm_options_json(nil), do: nil

  defp lm_options_json(options) do
    {:ok, json} = ascii_json(options)
    json
  end

  # ASCII only: what other characters become in a child's environment depends on the locale. By hand: OTP 26
  # has no `:json`.
  defp ascii_json(options) do
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
