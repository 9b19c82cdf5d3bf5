defmodule DSPex.PythonBridge.Supervisor do
  @moduledoc """
  A supervisor of a bridge and its monitor, for your application's supervision tree:

      children = [
        {DSPex.PythonBridge.Supervisor, bridge: [lm: "openai/gpt-4o-mini"], monitor: [interval: 10_000]}
      ]

  Options: `:name` (default: this module), `:bridge` (options of the bridge, see `DSPex.PythonBridge.Options`),
  `:monitor` (options of its `DSPex.PythonBridge.Monitor`).

  The supervisor owns the definitions of programs: they survive the bridge.
  """

  use Supervisor

  alias DSPex.PythonBridge.{Bridge, Monitor, Options, Programs}

  @doc """
  Starts both. A wrong option gives an error that names it: `{:error, %ArgumentError{}}` for an option of the
  supervisor, `{:error, {:shutdown, {:failed_to_start_child, id, %ArgumentError{}}}}` for one of a child.
  """
  @spec start_link(keyword()) :: Supervisor.on_start() | {:error, Exception.t()}
  def start_link(opts \\ []) do
    with :ok <- Options.check(opts, "python bridge supervisor", &refusal/1) do
      # The supervisor keeps them in its state.
      {name, opts} = opts |> seal() |> Keyword.pop(:name, __MODULE__)
      Supervisor.start_link(__MODULE__, opts, if(name, do: [name: name], else: []))
    end
  end

  @doc "The child specification; the id is the supervisor's name."
  @spec child_spec(keyword()) :: Supervisor.child_spec()
  def child_spec(opts) do
    # Secrets in the bridge's options must not show in a report about this child.
    %{
      id: if(Keyword.keyword?(opts), do: opts[:name]) || __MODULE__,
      start: {__MODULE__, :start_link, [seal(opts)]},
      type: :supervisor
    }
  end

  # All of them: if an option is given twice, both are kept.
  defp seal(opts) when is_list(opts) do
    Enum.map(opts, fn
      {:bridge, bridge} -> {:bridge, Options.seal(bridge)}
      other -> other
    end)
  end

  defp seal(opts), do: opts

  @impl Supervisor
  def init(opts) do
    bridge = Keyword.get(opts, :bridge, [])
    monitor = Keyword.put_new(Keyword.get(opts, :monitor, []), :bridge, bridge_name(bridge))
    # The table belongs to this process, so it survives the bridge.
    programs = Programs.Store.new()
    children = [{Bridge, [programs: programs] ++ bridge}, {Monitor, monitor}]
    Supervisor.init(children, strategy: :one_for_one)
  end

  # Wrong options are refused by the bridge.
  defp bridge_name(opts),
    do: with({:ok, options} <- Options.new(opts, Bridge), do: options.name, else: (_ -> Bridge))

  defp refusal({:name, _name}), do: nil

  defp refusal({key, value}) when key in [:bridge, :monitor] do
    cond do
      not Keyword.keyword?(value) -> "#{inspect(key)}: expected a keyword list"
      key == :bridge and Keyword.get(value, :name, :default) == nil -> ":bridge: needs a :name"
      true -> nil
    end
  end

  defp refusal({key, _value}), do: Options.unknown(key, [:name, :bridge, :monitor])
end
