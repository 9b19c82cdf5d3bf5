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

  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.OTP.Sealed
  alias DSPex.PythonBridge.Programs
  alias DSPex.PythonBridge.Protocol.PeerEnv

  @whose "python bridge"
  # The limit of {:packet, 4}.
  @max_frame_bytes 2_147_483_647
  @secret [:lm, :lm_options, :env, :programs]
  # They only set variables of the peer.
  @variables [:lm, :lm_options, :adapter]
  # For the other modules here. observer: a module and a term, see `DSPex.PythonBridge.Calls.InFlight`. transport: starts a
  # process, linked to the caller, in the place of a port. store: the table of the bridge's supervisor, if it has one; the declared programs are in it.
  @internal [:observer, :transport, :store]

  defstruct [
              :name,
              :python_executable,
              :script_path,
              :env,
              :programs,
              :observer,
              :transport,
              :store
            ] ++
              [max_frame_bytes: 64 * 1024 * 1024, default_timeout: 30_000, max_retries: 3] ++
              [max_pending: 100_000, start_timeout: 30_000, drain_ms: 5_000]

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
          observer: {module(), term()} | nil,
          transport: (-> pid()) | nil,
          store: :ets.tid() | nil
        }

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
    with {:ok, opts} <- Table.check(unsealed(opts), table(), @whose, :python_bridge),
         :ok <- once(opts),
         do: {:ok, build(Keyword.put_new(opts, :name, name))}
  end

  defp once(opts) do
    case PeerEnv.lm_setting_twice(opts) do
      nil -> :ok
      name -> {:error, ArgumentError.exception("#{@whose}: :lm: #{name} is in :lm_options, too")}
    end
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

  defp unsealed(opts) when is_list(opts) do
    Enum.map(opts, fn
      {key, value} when key in @secret and is_function(value, 0) -> {key, value.()}
      other -> other
    end)
  end

  defp unsealed(opts), do: opts

  @doc "The same options for a peer that logs to its standard error."
  @spec log_to_stderr(t()) :: t()
  def log_to_stderr(%__MODULE__{env: env} = options),
    do: %{options | env: Sealed.new(PeerEnv.log_to_stderr(env.()))}

  @doc "The environment of the peer, as a port takes it."
  @spec port_env(t()) :: [{charlist(), charlist()}]
  def port_env(%__MODULE__{env: env}),
    do: for({name, value} <- env.(), do: {to_charlist(name), to_charlist(value)})

  defp build(opts) do
    env = PeerEnv.new(opts)
    script = opts[:script_path] || Application.app_dir(:dspex, "priv/python/dspy_bridge.py")
    own = Keyword.drop(opts, [:env, :script_path, :programs | @variables])

    struct!(
      __MODULE__,
      own ++
        [script_path: script(script), env: Sealed.new(env), drain_ms: PeerEnv.drain_ms(env)] ++
        [programs: Sealed.new(opts[:programs])]
    )
  end

  defp script(path) do
    in_priv = Application.app_dir(:dspex, Path.join("priv", path))
    there? = Path.type(path) == :relative and not File.exists?(path) and File.exists?(in_priv)
    if there?, do: in_priv, else: Path.expand(path)
  end

  @doc "The names of a bridge's options."
  @spec known() :: [atom()]
  def known, do: Keyword.keys(table()) -- @internal

  @doc "Whether a value is `nil`, an atom, `{:global, _}` or `{:via, module, _}`."
  @spec name?(term()) :: boolean()
  def name?({:global, _name}), do: true
  def name?({:via, module, _name}), do: is_atom(module)
  def name?(name), do: is_atom(name)

  defp table do
    string = {:test, &(&1 == nil or text?(&1)), "a string"}

    [
      name: {:test, &name?/1, "an atom, {:global, _} or {:via, …}"},
      python_executable: string,
      script_path: string,
      lm: &lm/1,
      lm_options: &lm_options/1,
      adapter: {:test, &(is_atom(&1) or text?(&1)), "a string"},
      env: &env/1,
      max_frame_bytes: 1..@max_frame_bytes,
      default_timeout: :timeout,
      max_retries: :count,
      max_pending: :positive,
      start_timeout: :ms,
      programs: {&Programs.Declared.new/1, []},
      observer: :any,
      transport: :any,
      store: :any
    ]
  end

  defp lm(nil), do: :ok

  defp lm(lm) do
    {model, settings} = PeerEnv.lm(lm)

    if text?(model) and PeerEnv.json(settings) != :error,
      do: :ok,
      else: {:error, "expected a string, or a map with model that can be written as JSON"}
  end

  defp lm_options(options) do
    with true <- options == nil or is_map(options) or Keyword.keyword?(options),
         {:ok, _json} <- PeerEnv.json(options || %{}) do
      :ok
    else
      _wrong -> {:error, "expected a map or keyword list that can be written as JSON"}
    end
  end

  defp env(env) do
    if is_map(env) and not is_struct(env) and
         Enum.all?(env, fn {k, v} -> env_name?(k) and env_value?(v) end),
       do: :ok,
       else: {:error, "expected a map from names to strings, without NUL characters"}
  end

  defp text?(value), do: is_binary(value) and value != "" and env_value?(value)
  defp env_name?(name), do: is_binary(name) and name =~ ~r/\A[^=\0]+\z/ and String.valid?(name)

  defp env_value?(value),
    do: is_binary(value) and String.valid?(value) and not String.contains?(value, <<0>>)
end
