defmodule DSPex.PythonBridge.Options do
  @moduledoc """
  The options of a bridge, checked once: the result of `new/1` needs no further checks, and an option that is wrong is
  refused with an error that names it.

  | option | default | what |
  | --- | --- | --- |
  | `:name` | `DSPex.PythonBridge.Bridge` | how the bridge is registered; nil for not at all |
  | `:python_executable` | that of the environment, see docs/settings.md | path, or a name on the `PATH` |
  | `:script_path` | the drop-in in `priv/python` | the peer's script; a relative path is also looked for in the `priv` of `:dspex` |
  | `:lm` | the peer's own setting | the default LM, as DSPy names it: a string, or a map of `:model` and more `:lm_options` |
  | `:lm_options` | none | map or keyword list of `dspy.LM` arguments (`api_key`, …) |
  | `:adapter` | DSPy's | `chat`, `json`, `xml`, … |
  | `:env` | `%{}` | map of strings: more environment for the peer |
  | `:max_frame_bytes` | 64 MiB | a larger request fails before it is sent, a larger reply is `:frame_too_large` |
  | `:default_timeout` | 30 000 ms | of calls without a timeout; an integer or `:infinity` |
  | `:max_retries` | 3 | how often a call is sent again whose peer died |
  | `:max_pending` | 100 000 | calls that may wait for a reply; past it `:overloaded` |
  | `:start_timeout` | 30 000 ms | a peer that has not answered its first ping by then is replaced |
  | `:programs` | none | programs that are there from the start: a list of maps or keyword lists of `create_program`'s arguments, and of modules with a `definition/0` that returns one |

  Defaults come from `config :dspex, :python_bridge, …`.

  The peer's log records go to Logger, since `DSPY_BRIDGE_LOG_FRAMES=1` is in its environment by default; with
  `env: %{"DSPY_BRIDGE_LOG_FRAMES" => "0"}` they go to the standard error of the BEAM.

  The settings for the peer go into its environment, never into its arguments, which every user of the machine can
  read. They may hold keys, as may programs: `env` and `programs` of the struct are functions, so that no inspection, state
  dump or crash report shows them; `seal/1` does the same for an option list.
  """

  alias DSPex.PythonBridge.OTP.Sealed
  alias DSPex.PythonBridge.Programs
  alias DSPex.PythonBridge.Protocol.PeerEnv

  @whose "python bridge"
  # The limit of {:packet, 4}.
  @max_frame_bytes 2_147_483_647
  # The longest timeout of `receive`.
  @max_timeout 4_294_967_295
  @secret [:lm, :lm_options, :env, :programs]
  # They only set variables of the peer.
  @variables [:lm, :lm_options, :adapter]
  @fields [name: nil, python_executable: nil, script_path: nil, env: nil] ++
            [max_frame_bytes: 64 * 1024 * 1024, default_timeout: 30_000, max_retries: 3] ++
            [max_pending: 100_000, start_timeout: 30_000, programs: nil]
  @known Keyword.keys(@fields) ++ @variables
  # Names that are more alike than this are taken for one that was misspelt.
  @alike 0.8

  # slot: only in a pool. transport: starts a process, linked to the caller, in the place of a port; not for users. store: the table of the bridge's supervisor, if it has one; the declared programs are in it.
  defstruct @fields ++ [slot: nil, transport: nil, store: nil, drain_ms: 5_000]

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
          programs: (-> [{id :: String.t(), arguments :: %{String.t() => term()}}]) | nil,
          slot: tuple() | nil,
          transport: (-> pid()) | nil,
          store: :ets.tid() | nil
        }
  @typedoc "The text that refuses an option; nil for one that is accepted."
  @type refusal :: ({atom(), term()} -> String.t() | nil)

  @doc """
  Options from a keyword list over the application's configuration, or the error that names the one that is wrong.
  `name` is the bridge's name if neither has one.

      iex> {:ok, options} = DSPex.PythonBridge.Options.new(lm: "openai/gpt-4o-mini", max_retries: 1)
      iex> {options.max_retries, options.default_timeout}
      {1, 30000}
      iex> {:error, error} = DSPex.PythonBridge.Options.new(max_retries: -1)
      iex> Exception.message(error)
      "python bridge: :max_retries: expected 0 or more, got -1"
  """
  @spec new(keyword(), GenServer.name() | nil) :: {:ok, t()} | {:error, Exception.t()}
  def new(opts \\ [], name \\ nil) do
    with {:ok, opts} <- merge(opts, :python_bridge, @whose, &refusal/1),
         :ok <- once(opts),
         {:ok, programs} <- declared(opts),
         do: {:ok, build(Keyword.put_new(opts, :name, name), programs)}
  end

  defp once(opts) do
    case PeerEnv.lm_setting_twice(opts) do
      nil -> :ok
      name -> {:error, ArgumentError.exception("#{@whose}: :lm: #{name} is in :lm_options, too")}
    end
  end

  defp declared(opts) do
    with {:error, text} <- Programs.Declared.new(Keyword.get(opts, :programs, [])),
         do: {:error, ArgumentError.exception("#{@whose}: #{text}")}
  end

  @doc """
  Options over those of a key of the application's configuration, unsealed, if `check/3` accepts both.
  """
  @spec merge(term(), atom(), String.t(), refusal()) :: {:ok, keyword()} | {:error, Exception.t()}
  def merge(opts, key, whose, refusal) do
    config = Application.get_env(:dspex, key, [])

    with :ok <- keyword(config, "#{whose}: config"),
         :ok <- keyword(opts, "#{whose}: options"),
         # The first of two with the same key counts, as for Keyword.
         merged = (opts ++ config) |> Enum.uniq_by(&elem(&1, 0)) |> Enum.map(&unseal/1),
         :ok <- check(merged, whose, refusal),
         do: {:ok, merged}
  end

  @doc """
  Checks a list of options: a keyword list of which `refusal` returns nil for each. The error names the wrong one,
  after `whose`.
  """
  @spec check(term(), String.t(), refusal()) :: :ok | {:error, Exception.t()}
  def check(opts, whose, refusal) do
    with :ok <- keyword(opts, "#{whose}: options") do
      case Enum.find_value(opts, refusal) do
        nil -> :ok
        text -> {:error, ArgumentError.exception("#{whose}: #{text}")}
      end
    end
  end

  defp keyword(list, what) do
    if Keyword.keyword?(list),
      do: :ok,
      else: {:error, ArgumentError.exception("#{what}: expected a keyword list")}
  end

  @doc """
  The option list with its secret values wrapped in functions, which `new/1` takes as well. A
  supervisor logs the arguments of a child that it restarts: they must not show keys.

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

  defp unseal({key, value}) when key in @secret and is_function(value, 0), do: {key, value.()}
  defp unseal(option), do: option

  @doc """
  The text that refuses a value: what was expected of the option, and the value, cut short.

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
  The text that refuses an unknown option, with the known one that is most alike.

      iex> DSPex.PythonBridge.Options.unknown(:max_retrys, DSPex.PythonBridge.Options.known())
      "unknown option :max_retrys, did you mean :max_retries?"
  """
  @spec unknown(atom(), [atom()]) :: String.t()
  def unknown(key, known) do
    "unknown option #{inspect(key)}#{meant(key, known, @alike)}"
  end

  @doc false
  # The end of a text about an unknown word: the known one that is most alike, if it is more so than `alike`.
  @spec meant(atom() | String.t(), [atom() | String.t()], float()) :: String.t()
  def meant(word, known, alike) do
    likeness = &String.jaro_distance(to_string(word), to_string(&1))
    nearest = Enum.max_by(known, likeness)
    if likeness.(nearest) > alike, do: ", did you mean #{inspect(nearest)}?", else: ""
  end

  @doc "The same options for a peer that logs to its standard error."
  @spec log_to_stderr(t()) :: t()
  def log_to_stderr(%__MODULE__{env: env} = options),
    do: %{options | env: Sealed.new(PeerEnv.log_to_stderr(env.()))}

  @doc "The environment of the peer, as a port takes it."
  @spec port_env(t()) :: [{charlist(), charlist()}]
  def port_env(%__MODULE__{env: env}),
    do: for({name, value} <- env.(), do: {to_charlist(name), to_charlist(value)})

  defp build(opts, programs) do
    env = PeerEnv.new(opts)
    script = opts[:script_path] || Application.app_dir(:dspex, "priv/python/dspy_bridge.py")
    own = Keyword.drop(opts, [:env, :script_path, :programs | @variables])

    struct!(
      __MODULE__,
      own ++
        [script_path: script(script), env: Sealed.new(env), drain_ms: PeerEnv.drain_ms(env)] ++
        [programs: Sealed.new(programs)]
    )
  end

  defp script(path) do
    in_priv = Application.app_dir(:dspex, Path.join("priv", path))
    there? = Path.type(path) == :relative and not File.exists?(path) and File.exists?(in_priv)
    if there?, do: in_priv, else: Path.expand(path)
  end

  # One clause per option: nil for a value that is accepted. The text never has a value that may be secret.
  defp refusal({:name, name}) when is_atom(name), do: nil
  defp refusal({:name, {:global, _}}), do: nil
  defp refusal({:name, {:via, module, _}}) when is_atom(module), do: nil
  defp refusal({:name, other}), do: expected(:name, "an atom, {:global, _} or {:via, …}", other)

  defp refusal({key, nil}) when key in [:python_executable, :script_path, :lm, :lm_options],
    do: nil

  defp refusal({:adapter, value}) when is_atom(value), do: nil

  defp refusal({:lm, lm}) do
    {model, settings} = PeerEnv.lm(lm)

    if !text?(model) or PeerEnv.json(settings) == :error,
      do: ":lm: expected a string, or a map with model that can be written as JSON"
  end

  defp refusal({key, value}) when key in [:python_executable, :script_path, :adapter],
    do: if(!text?(value), do: expected(key, "a string", value))

  defp refusal({:lm_options, options}) do
    with true <- is_map(options) or Keyword.keyword?(options),
         {:ok, _json} <- PeerEnv.json(options) do
      nil
    else
      _wrong -> ":lm_options: expected a map or keyword list that can be written as JSON"
    end
  end

  defp refusal({:env, env}) do
    if is_map(env) and not is_struct(env) and
         Enum.all?(env, fn {k, v} -> env_name?(k) and env_value?(v) end),
       do: nil,
       else: ":env: expected a map from names to strings, without NUL characters"
  end

  defp refusal({:max_frame_bytes, n}) when n in 1..@max_frame_bytes, do: nil

  defp refusal({:max_frame_bytes, other}),
    do: expected(:max_frame_bytes, "a number of bytes from 1 to #{@max_frame_bytes}", other)

  defp refusal({:default_timeout, :infinity}), do: nil

  defp refusal({key, ms})
       when key in [:default_timeout, :start_timeout] and ms in 1..@max_timeout,
       do: nil

  defp refusal({key, other}) when key in [:default_timeout, :start_timeout],
    do: expected(key, "a positive number of milliseconds", other)

  defp refusal({:max_retries, n}) when is_integer(n) and n >= 0, do: nil
  defp refusal({:max_retries, other}), do: expected(:max_retries, "0 or more", other)
  defp refusal({:max_pending, n}) when is_integer(n) and n > 0, do: nil
  defp refusal({:max_pending, other}), do: expected(:max_pending, "1 or more", other)

  defp refusal({:slot, {_counters, index, coordinator, monitor}})
       when is_integer(index) and is_atom(coordinator) and is_atom(monitor),
       do: nil

  # Checked as a whole: see declared/1.
  defp refusal({:programs, _list}), do: nil
  defp refusal({:transport, start}) when is_function(start, 0), do: nil
  defp refusal({:store, table}) when is_reference(table), do: nil
  defp refusal({key, _value}), do: unknown(key, @known)

  defp text?(value), do: is_binary(value) and value != "" and env_value?(value)
  defp env_name?(name), do: is_binary(name) and name =~ ~r/\A[^=\0]+\z/ and String.valid?(name)

  defp env_value?(value),
    do: is_binary(value) and String.valid?(value) and not String.contains?(value, <<0>>)
end
