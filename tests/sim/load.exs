defmodule Sim.Load do
  @moduledoc """
  What users do: calls of programs that stay, and changes of others. `own-NODE` is changed by one node only, one change after the
  other, so that it is known what all nodes must have in the end; `shared-N` by any.
  """

  alias Sim.{Net, Node, World}

  @stable 8
  @shared 5

  @doc "Creates the programs that are called."
  def prepare(node), do: for(n <- 1..@stable, do: change(node, {:create, "stable-#{n}", ""}))
  def stable, do: for(n <- 1..@stable, do: "stable-#{n}")

  @doc "Starts calls and changes: one each `call_ms` and `change_ms` on the average, over all nodes, until `stop/0`."
  def start(options) do
    World.note(:load, true)
    every(options.call_ms, fn -> call(pick(), options.timeout) end)
    every(options.change_ms, fn -> change(pick(), nil) end)
  end

  def stop, do: World.note(:load, false)

  defp every(ms, action) do
    World.in_ms(-ms * :math.log(1 - :rand.uniform()), fn ->
      if World.fact(:load) do
        action.()
        every(ms, action)
      end
    end)
  end

  # A node that hangs has no users, nor has one that has not met another one yet: it has no programs.
  defp pick do
    case Enum.filter(Net.nodes(), &(not Net.frozen?(&1) and Node.up?(&1) and is_map_key(Node.stamps(&1), "stable-1"))) do
      [] -> nil
      nodes -> Enum.random(nodes)
    end
  end

  ## Calls

  def call(nil, _timeout), do: :ok

  def call(node, timeout) do
    number = World.count(:calls)
    World.note({:call, number}, {node, World.now()})

    Node.call(node, :execute_program, %{program_id: "stable-#{:rand.uniform(@stable)}"}, timeout, fn
      {:ok, _id, %{"node" => served}, _meta} ->
        :ets.delete(World.here().facts, {:call, number})
        World.count(if served == Atom.to_string(node), do: :served_here, else: :served_elsewhere)

      {:error, error} ->
        :ets.delete(World.here().facts, {:call, number})
        World.note(:failed_calls, [{node, error.type} | World.fact(:failed_calls, [])])
    end)
  end

  @doc "Calls that have no result, of nodes that are there."
  def open, do: for({{:call, number}, {node, _}} <- :ets.tab2list(World.here().facts), node in Net.nodes(), do: {number, node})

  ## Changes

  def change(nil, _change), do: :ok

  def change(node, nil) do
    # Peers that refuse what others take are not expected to die, too.
    faults? = World.fact(:faults, false)

    case :rand.uniform(10) do
      n when n <= 4 -> own(node, n)
      n when n <= 6 -> change(node, {:cleanup, ["shared-#{:rand.uniform(@shared)}"]})
      7 when not faults? -> change(node, {:create, "shared-#{:rand.uniform(@shared)}", "refused on #{node}"})
      _ -> change(node, {:create, "shared-#{:rand.uniform(@shared)}", ""})
    end
  end

  def change(node, {:create, id, text}), do: ask(node, :create_program, arguments(id, text), fn _result -> :ok end)
  def change(node, {:cleanup, ids}), do: ask(node, :cleanup, %{program_ids: ids}, fn _result -> :ok end)

  # What it must be in the end: known when a change has succeeded, unknown while one is under way or has failed.
  defp own(node, n) do
    id = "own-#{node}"

    unless World.fact({:own, id}) == :under_way do
      World.note({:own, id}, :under_way)

      {command, arguments, outcome} =
        if n == 1, do: {:cleanup, %{program_ids: [id]}, :removed}, else: with(args = arguments(id, ""), do: {:create_program, args, args.options.tag})

      ask(node, command, arguments, fn
        {:ok, _, _, _} -> World.note({:own, id}, outcome)
        {:error, _error} -> World.note({:own, id}, :unknown)
      end)
    end
  end

  defp arguments(id, text) do
    padding = String.duplicate("x", World.here()[:program_bytes] || 900)
    %{id: id, signature: "question -> answer", options: %{tag: "tag-#{World.count(:tags)}", text: text, padding: padding}}
  end

  @doc "Makes one change; `done` gets its result."
  def ask(node, command, arguments, done) do
    World.count(:changes)

    Node.call(node, command, arguments, 20_000, fn result ->
      World.count(:changes_over)
      with {:error, error} <- result, do: World.count({:change_failed, error.type})
      done.(result)
    end)
  end

  @doc "The program that `own-NODE` has to be: `{id, tag}`; `:removed` for the tag. Of nodes that are there."
  def expected do
    for {{:own, "own-" <> node = id}, outcome} <- :ets.tab2list(World.here().facts),
        outcome not in [:under_way, :unknown],
        String.to_atom(node) in Net.nodes(),
        do: {id, outcome}
  end
end
