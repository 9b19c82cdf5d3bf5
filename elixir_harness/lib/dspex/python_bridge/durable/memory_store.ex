defmodule DSPex.PythonBridge.Durable.MemoryStore do
  @moduledoc """
  A store of durable runs for tests: it ends with its process.

      start_supervised!({MemoryStore, name: MyApp.Runs})
      Durable.run(MyApp.Pool, args, id: "refund-7", store: {MemoryStore, MyApp.Runs}, tools: tools)
  """

  use Agent

  alias DSPex.PythonBridge.Durable.Store

  @behaviour Store

  @none %{owner: nil, until: nil, records: [], summary: nil}

  @doc "Starts it. `:name` – an atom."
  @spec start_link(keyword()) :: Agent.on_start()
  def start_link(opts), do: Agent.start_link(fn -> %{} end, name: opts[:name])

  @impl Store
  @spec claim(Agent.agent(), Store.id(), Store.owner(), pos_integer()) ::
          :ok | {:error, :claimed}
  def claim(agent, id, owner, lease) do
    Agent.get_and_update(agent, fn runs ->
      run = Map.get(runs, id, @none)
      until = now() + lease

      cond do
        run.owner == owner -> {:ok, Map.put(runs, id, %{run | until: until})}
        claimed?(run) -> {{:error, :claimed}, runs}
        true -> {:ok, Map.put(runs, id, %{run | owner: owner, until: until, summary: nil})}
      end
    end)
  end

  @impl Store
  @spec append(Agent.agent(), Store.id(), Store.owner(), binary()) :: :ok | {:error, :claimed}
  def append(agent, id, owner, record),
    do: change(agent, id, owner, &%{&1 | records: [record | &1.records]})

  @impl Store
  @spec read(Agent.agent(), Store.id()) :: {:ok, [binary()]}
  def read(agent, id),
    do: {:ok, Enum.reverse(Agent.get(agent, &Map.get(&1, id, @none).records))}

  @impl Store
  @spec finish(Agent.agent(), Store.id(), Store.owner(), binary()) :: :ok | {:error, :claimed}
  def finish(agent, id, owner, summary),
    do: change(agent, id, owner, &%{&1 | summary: summary, owner: nil, until: nil})

  @impl Store
  @spec list(Agent.agent()) :: {:ok, [{Store.id(), boolean(), binary() | nil}]}
  def list(agent) do
    runs = Agent.get(agent, & &1)
    {:ok, for({id, run} <- runs, do: {id, claimed?(run), run.summary})}
  end

  @impl Store
  @spec delete(Agent.agent(), Store.id()) :: :ok
  def delete(agent, id), do: Agent.update(agent, &Map.delete(&1, id))

  defp change(agent, id, owner, fun) do
    Agent.get_and_update(agent, fn
      %{^id => %{owner: ^owner} = run} = runs -> {:ok, %{runs | id => fun.(run)}}
      runs -> {{:error, :claimed}, runs}
    end)
  end

  defp claimed?(%{until: until}), do: until != nil and until > now()
  defp now, do: System.monotonic_time(:millisecond)
end
