defmodule DSPex.PythonBridge.Pool.Options do
  @moduledoc false
  # The options of a pool, checked before any bridge starts: its own here, those of its bridges by
  # `DSPex.PythonBridge.Options`.

  alias DSPex.PythonBridge.{Options, Programs}

  # More Python processes than any machine has room for. Each has an atom, too.
  @max_size 1_000

  @enforce_keys [:name, :size, :cluster, :bridge, :programs] ++
                  [:default_timeout, :max_retries, :max_frame_bytes]
  # stub?: its one bridge has the name of the pool, for `DSPex.PythonBridge.Stub`.
  defstruct @enforce_keys ++ [stub?: false]

  @typedoc "`bridge`: the options that all bridges have in common, sealed; `programs`: the declared ones, sealed."
  @type t :: %__MODULE__{
          name: atom(),
          size: pos_integer(),
          cluster: atom() | String.t(),
          bridge: keyword(),
          programs: (-> [Programs.Declared.t()]),
          default_timeout: timeout(),
          max_retries: non_neg_integer(),
          max_frame_bytes: pos_integer(),
          stub?: boolean()
        }

  @doc "Settings from options, or the error that names the one that is wrong; `default`: the pool's name if none is given."
  @spec new(term(), atom()) :: {:ok, t()} | {:error, Exception.t()}
  def new(opts, default) do
    with :ok <- Options.check(opts, "python pool", &refusal/1),
         {own, bridge} = Keyword.split(opts, [:name, :pool_size, :cluster]),
         {:ok, options} <- Options.new([name: nil] ++ bridge) do
      {:ok,
       %__MODULE__{
         name: Keyword.get(own, :name, default),
         size: Keyword.get(own, :pool_size, 3),
         cluster: own[:cluster],
         bridge: bridge |> Keyword.delete(:programs) |> Options.seal(),
         programs: options.programs,
         default_timeout: options.default_timeout,
         max_retries: options.max_retries,
         max_frame_bytes: options.max_frame_bytes
       }}
    end
  end

  # The names of its bridges are made from it.
  defp refusal({:name, name}) when is_atom(name) and name not in [nil, true, false], do: nil
  defp refusal({:name, other}), do: Options.expected(:name, "an atom", other)
  defp refusal({:pool_size, n}) when n in 1..@max_size, do: nil
  defp refusal({:pool_size, other}), do: Options.expected(:pool_size, "1 to #{@max_size}", other)
  defp refusal({:cluster, name}) when is_atom(name) and name not in [true, false], do: nil
  defp refusal({:cluster, name}) when is_binary(name) and name != "", do: nil

  defp refusal({:cluster, other}),
    do: Options.expected(:cluster, "nil, an atom or a string", other)

  # The values of the bridges' options are checked by these.
  defp refusal({key, _value}) do
    if key not in [:transport | Options.known()],
      do: Options.unknown(key, [:pool_size, :cluster | Options.known()])
  end
end
