defmodule DSPex.PythonBridge.Options do
  @moduledoc """
  The options of a bridge, which [settings.md](settings.md#a-bridge) lists. They are checked once: the result of `new/1`
  needs no further checks, and an option that is wrong is refused with an error that names it.

  Defaults come from `config :dspex, :python_bridge, …`.

  The peer's log records go to Logger, since `DSPY_BRIDGE_LOG_FRAMES=1` is in its environment by default; with
  `env: %{"DSPY_BRIDGE_LOG_FRAMES" => "0"}` they go to the standard error of the BEAM.

  The settings for the peer go into its environment, never into its arguments, which every user of the machine can
  read. They may hold keys, as may programs: `env` and `programs` of the struct are functions, so that no inspection, state
  dump or crash report shows them; `seal/1` does the same for an option list.
  """

  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Programs
  alias DSPex.PythonBridge.Protocol.PeerEnv

  # The limit of {:packet, 4}.
  @max_frame_bytes 2_147_483_647
  @secret [:lm, :lm_options, :env, :programs]
  # For the other modules here. observer: a module and a term, see `DSPex.PythonBridge.Calls.InFlight`. transport: starts a
  # process, linked to the caller, in the place of a port. store: the table of the bridge's supervisor, if it has one; the
  # declared programs are in it.
  @internal [:observer, :transport, :store]

  defstruct ~w(name python_executable script_path env programs observer transport store)a ++
              [max_frame_bytes: 64 * 1024 * 1024, default_timeout: 30_000, max_retries: 3] ++
              [max_pending: 100_000, start_timeout: 30_000, drain_ms: 5_000] ++
              [journal_bytes: 8 * 1024 * 1024]

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
          journal_bytes: non_neg_integer(),
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
    with {:ok, opts} <- Table.check(unsealed(opts), table(), "python bridge", :python_bridge),
         do: {:ok, build(Keyword.put_new(opts, :name, name))}
  end

  @doc """
  The option list with its secret values wrapped in functions, which `new/1` takes as well. A
  supervisor logs the arguments of a child that it restarts: they must not show keys.

      iex> [lm_options: sealed] = DSPex.PythonBridge.Options.seal(lm_options: [api_key: "sk-…"])
      iex> is_function(sealed, 0)
      true
  """
  @spec seal(keyword()) :: keyword()
  def seal(opts), do: each_secret(opts, &if(is_function(&1, 0), do: &1, else: sealed(&1)))

  defp unsealed(opts), do: each_secret(opts, &if(is_function(&1, 0), do: &1.(), else: &1))

  # What is no keyword list may have secrets anywhere; new/1 refuses it.
  defp each_secret(opts, fun) do
    if Keyword.keyword?(opts),
      do: for({key, value} <- opts, do: {key, if(key in @secret, do: fun.(value), else: value)}),
      else: fun.(opts)
  end

  defp sealed(value), do: fn -> value end

  @doc "The environment of the peer, as a port takes it."
  @spec port_env(t()) :: [{charlist(), charlist()}]
  def port_env(%__MODULE__{env: env}),
    do: for({name, value} <- env.(), do: {to_charlist(name), to_charlist(value)})

  defp build(opts) do
    env = PeerEnv.new(opts)
    script = opts[:script_path] || Application.app_dir(:dspex, "priv/python/dspy_bridge.py")

    made =
      [script_path: script(script), env: sealed(env), drain_ms: PeerEnv.drain_ms(env)] ++
        [programs: sealed(opts[:programs])]

    # The variables of the peer are in its environment.
    struct!(__MODULE__, Keyword.merge(Keyword.drop(opts, [:lm, :lm_options, :adapter]), made))
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
      journal_bytes: :count,
      programs: {&Programs.Declared.new/1, []},
      observer: :any,
      transport: :any,
      store: :any
    ]
  end

  defp lm(nil), do: :ok

  defp lm(lm) do
    if text?(lm) or
         (is_map(lm) and PeerEnv.json(lm) != :error and text?(elem(PeerEnv.lm(lm), 0))),
       do: :ok,
       else: {:error, "expected a string, or a map with model that can be written as JSON"}
  end

  defp lm_options(options) do
    if options == nil or
         ((is_map(options) or Keyword.keyword?(options)) and PeerEnv.json(options) != :error),
       do: :ok,
       else: {:error, "expected a map or keyword list that can be written as JSON"}
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
