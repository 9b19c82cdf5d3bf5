defmodule DSPex.PythonBridge.Pool.Options do
  @moduledoc false
  # The options of a pool, checked before any bridge starts: its own here, those of its bridges by
  # `DSPex.PythonBridge.Options`.

  alias DSPex.PythonBridge.{Options, Programs}
  alias DSPex.PythonBridge.Options.Table
  alias DSPex.PythonBridge.Pool.Budgets

  # More Python processes than any machine has room for. Each has an atom, too.
  @max_size 1_000

  @enforce_keys [:name, :size, :cluster, :bridge, :programs] ++
                  [:default_timeout, :max_retries, :max_frame_bytes, :journal_bytes]
  # stub?: its one bridge has the name of the pool, for `DSPex.PythonBridge.Stub`.
  defstruct @enforce_keys ++ [budgets: [], stub?: false]

  @typedoc "`bridge`: the options that all bridges have in common, sealed; `programs`: the declared ones, sealed."
  @type t :: %__MODULE__{
          name: atom(),
          size: pos_integer(),
          cluster: atom() | String.t(),
          budgets: [Budgets.t()],
          bridge: keyword(),
          programs: (-> [Programs.Declared.t()]),
          default_timeout: timeout(),
          max_retries: non_neg_integer(),
          max_frame_bytes: pos_integer(),
          journal_bytes: non_neg_integer(),
          stub?: boolean()
        }

  @doc "Settings from options, or the error that names the one that is wrong; `default`: the pool's name if none is given."
  @spec new(term(), atom()) :: {:ok, t()} | {:error, Exception.t()}
  def new(opts, default) do
    with {:ok, checked} <- Table.check(opts, table(default), "python pool"),
         bridge = Keyword.drop(opts, [:name, :pool_size, :cluster, :budgets]),
         {:ok, options} <- Options.new([name: nil] ++ bridge) do
      {:ok,
       %__MODULE__{
         name: checked[:name],
         size: checked[:pool_size],
         cluster: checked[:cluster],
         budgets: checked[:budgets],
         bridge: bridge |> Keyword.delete(:programs) |> Options.seal(),
         programs: options.programs,
         default_timeout: options.default_timeout,
         max_retries: options.max_retries,
         max_frame_bytes: options.max_frame_bytes,
         journal_bytes: options.journal_bytes
       }}
    end
  end

  # The names of the bridges are made from its own. The values of the bridges' options are checked by these.
  defp table(name) do
    cluster? = &((is_atom(&1) and &1 not in [true, false]) or (is_binary(&1) and &1 != ""))
    own = [name: {:atom, name}, pool_size: {1..@max_size, 3}, budgets: {&Budgets.check/1, []}]
    others = for key <- [:transport | Options.known() -- [:name]], do: {key, :any}
    own ++ [cluster: {:test, cluster?, "nil, an atom or a string"}] ++ others
  end
end
