Code.require_file("../../../../../../tests/sim/all.exs", __DIR__)

defmodule DSPex.PythonBridge.Pool.Cluster.SimulationTest do
  @moduledoc """
  Clusters of many nodes by simulation (tests/sim): the real code of pools, with simulated links, peers and time.
  """

  use ExUnit.Case, async: true

  setup_all do
    Sim.Instrument.load(Sim.Of)
    :ok
  end

  # All runs at once, as many as there are processors.
  defp runs(list, fun) do
    list
    |> Task.async_stream(fun, timeout: 60_000)
    |> Enum.map(fn {:ok, result} -> result end)
  end

  test "with faults of all kinds no call is lost, and all nodes and peers have the same programs in the end" do
    assert_no_loss([{3, 1..5}, {12, 1..1}])
  end

  @tag :slow
  test "with faults of all kinds no call is lost, with twice as many seeds" do
    assert_no_loss([{3, 6..12}, {12, 2..3}])
  end

  defp assert_no_loss(sizes) do
    runs = for {nodes, seeds} <- sizes, seed <- seeds, do: {nodes, seed}

    results =
      runs(runs, fn {nodes, seed} = run ->
        {run, Sim.Scenarios.run(:faults, nodes: nodes, seed: seed)}
      end)

    assert for({run, %{wrong: wrong}} <- results, wrong != [], do: {run, wrong}) == []
    assert Enum.sum(for {_run, result} <- results, do: result.calls) > 700 * length(runs)
    assert Enum.sum(for {_run, result} <- results, do: result.elsewhere) > 35 * length(runs)
  end

  test "a second after a split has healed all nodes have the same programs" do
    for result <- runs([3, 12], &Sim.Scenarios.run(:split, nodes: &1, seed: 1)) do
      assert result.wrong == []
      assert result.unlike > 0
      assert result.equal_ms < 1_000
    end
  end

  test "a change is one message to each other node" do
    result = Sim.Scenarios.run(:costs, nodes: 12, seed: 1)
    assert result.wrong == []
    assert %{change: 11, hello: 0} = result.create.messages
    assert result.join.messages.hello == 24
  end

  test "a seed gives the same run again" do
    [one, same, other] = runs([5, 5, 6], &Sim.Scenarios.run(:faults, nodes: 3, seed: &1))
    assert one == same
    assert one != other
  end

  # One that was real.
  test "it finds defects", do: assert_found(Enum.take(Sim.Mutations.all(), -1))

  @tag :slow
  test "it finds defects of all kinds", do: assert_found(Enum.drop(Sim.Mutations.all(), -1))

  defp assert_found(mutations) do
    found =
      runs(mutations, fn mutation ->
        {elem(mutation, 0), Sim.Mutations.run(mutation).wrong}
      end)

    assert for({name, []} <- found, do: name) == []
  end
end
