defmodule DSPex.PythonBridge.Supervisor do
  @moduledoc """
  A bridge and its monitor, for a host's own supervision tree:

      children = [
        {DSPex.PythonBridge.Supervisor, bridge: [lm: "openai/gpt-4o-mini"], monitor: [interval: 10_000]}
      ]

  Options: `:name` (default this module), `:bridge` (those of `DSPex.PythonBridge.Bridge`),
  `:monitor` (those of `DSPex.PythonBridge.Monitor`; it watches this bridge).

  The definitions of programs belong to the supervisor: they outlive the bridge.
  """

  use Supervisor

  alias DSPex.PythonBridge.{Bridge, Monitor, Options, Programs}

  @doc """
  Starts the two. An option that cannot be right gives an error that names it: of the supervisor's
  own as `{:error, %ArgumentError{}}`, of a child's inside the supervisor's usual
  `{:error, {:shutdown, {:failed_to_start_child, id, %ArgumentError{}}}}`.
  """
  @spec start_link(keyword()) :: Supervisor.on_start() | {:error, Exception.t()}
  def start_link(opts \\ []) do
    with :ok <- Options.check(opts, "python bridge supervisor", &refusal/1) do
      # The supervisor's state has them in it.
      {name, opts} = opts |> seal() |> Keyword.pop(:name, __MODULE__)
      Supervisor.start_link(__MODULE__, opts, if(name, do: [name: name], else: []))
    end
  end

  @doc "The child specification; the id is the supervisor's name."
  @spec child_spec(keyword()) :: Supervisor.child_spec()
  def child_spec(opts) do
    # Keys in the bridge's options must not show in a report about this child.
    %{
      id: if(Keyword.keyword?(opts), do: opts[:name]) || __MODULE__,
      start: {__MODULE__, :start_link, [seal(opts)]},
      type: :supervisor
    }
  end

  # All of them: of an option given twice, both are kept.
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
    # This process's, so that they outlive the bridge.
    programs = Programs.Store.new()
    children = [{Bridge, [programs: programs] ++ bridge}, {Monitor, monitor}]
    Supervisor.init(children, strategy: :one_for_one)
  end

  defp bridge_name(opts) do
    config = Application.get_env(:dspex, :python_bridge, [])
    # A configuration that is no keyword list is the bridge's to refuse.
    config = if Keyword.keyword?(config), do: config, else: []
    Keyword.get(opts, :name, Keyword.get(config, :name, Bridge))
  end

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
