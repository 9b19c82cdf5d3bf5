defmodule DSPex.PythonBridge.Programs.StoreTest do
  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.Programs

  doctest Programs.Store
  doctest Programs.Change

  defp ids(table), do: for({id, _stamp, _body} <- Programs.Store.definitions(table), do: id)

  test "definitions are listed oldest first; a replaced one is as old as its last change" do
    table = Programs.Store.new()
    for id <- ["a", "b", "c"], do: Programs.Store.put(table, id, Programs.Store.stamp(), id)
    true = Programs.Store.put(table, "a", Programs.Store.stamp(), "new")
    assert ids(table) == ["b", "c", "a"]
    assert {_stamp, "new"} = Programs.Store.get(table, "a")
    assert Programs.Store.get(table, "d") == nil
  end

  test "any order of changes has the same result: the latest of each program counts" do
    stamps = for _ <- 1..4, do: Programs.Store.stamp()
    [s1, s2, s3, s4] = stamps

    changes = [
      {{:create, "a", s1}, "a1"},
      {{:cleanup, ["a"], s2}, ""},
      {{:create, "b", s2}, "b2"},
      {{:cleanup, :all, s3}, ""},
      {{:create, "a", s4}, "a4"}
    ]

    for order <- permutations(changes) do
      table = Programs.Store.new()
      for {what, body} <- order, do: Programs.Store.apply_change(table, what, body)
      assert Programs.Store.definitions(table) == [{"a", s4, "a4"}]
      :ets.delete(table)
    end
  end

  test "merging returns what is new, and both tables end alike" do
    [one, two] = [Programs.Store.new(), Programs.Store.new()]
    [s1, s2, s3, s4] = for _ <- 1..4, do: Programs.Store.stamp()
    for table <- [one, two], id <- ["both", "gone"], do: Programs.Store.put(table, id, s1, id)
    Programs.Store.put(one, "mine", s2, "mine")
    Programs.Store.put(two, "both", s3, "newer")
    Programs.Store.remove(two, ["gone"], s4)
    exports = {Programs.Store.export(one), Programs.Store.export(two)}
    assert Programs.Store.merge(one, elem(exports, 1)) == ["both", "gone"]
    assert Programs.Store.merge(two, elem(exports, 0)) == ["mine"]
    assert Programs.Store.definitions(one) == Programs.Store.definitions(two)
    assert Programs.Store.merge(one, Programs.Store.export(two)) == []
  end

  @tag :slow
  test "tombstones are kept for a day, and their number is limited" do
    table = Programs.Store.new()
    {now, count, node} = Programs.Store.stamp()
    Programs.Store.remove(table, ["yesterday"], {now - 25 * 3_600 * 1_000_000, count, node})
    for n <- 1..999, do: Programs.Store.remove(table, ["#{n}"], Programs.Store.stamp())
    assert Programs.Store.put(table, "yesterday", {1, 0, node()}, "old")
    refute Programs.Store.put(table, "1", {1, 0, node()}, "old")
    for n <- 1_000..25_000, do: Programs.Store.remove(table, ["#{n}"], Programs.Store.stamp())
    assert :ets.info(table, :size) < 11_100
    # The last is still known.
    refute Programs.Store.put(table, "25000", {1, 0, node()}, "old")
  end

  test "a stamp of a change is later than what the program has, whatever the clock of the node that has made that" do
    table = Programs.Store.new()
    {now, count, _node} = Programs.Store.stamp()
    ahead = {now + 3_600_000_000, count, :other}
    assert Programs.Store.put(table, "a", ahead, "x")
    for ids <- ["a", ["b", "a"], :all], do: assert(Programs.Store.stamp(table, ids) > ahead)
    assert Programs.Store.stamp(table, "b") < ahead
  end

  test "many writers at once: none overwrites a later change" do
    table = Programs.Store.new()

    tasks =
      for _ <- 1..8 do
        Task.async(fn -> for _ <- 1..500, do: put_now(table) end)
      end

    last = tasks |> Task.await_many(60_000) |> List.flatten() |> Enum.max()
    assert {^last, _body} = Programs.Store.get(table, "a")
  end

  defp put_now(table) do
    stamp = Programs.Store.stamp()
    Programs.Store.put(table, "a", stamp, "x")
    stamp
  end

  defp permutations([]), do: [[]]
  defp permutations(list), do: for(x <- list, rest <- permutations(list -- [x]), do: [x | rest])

  describe "declared programs" do
    defp declare(ids) do
      table = Programs.Store.new()
      Programs.Store.declare(table, for(id <- ids, do: {id, {:ok, "declared #{id}"}}))
      table
    end

    defp bodies(table),
      do: for({id, _stamp, body} <- Programs.Store.definitions(table), into: %{}, do: {id, body})

    test "are definitions in their order, below those that were created, however early that was" do
      early = Programs.Store.stamp()
      table = declare(["b", "a"])
      assert ids(table) == ["b", "a"]
      assert {stamp, "declared a"} = Programs.Store.get(table, "a")
      assert Programs.Store.declared?(stamp)
      assert Programs.Store.put(table, "a", early, "created")
      assert bodies(table) == %{"a" => "created", "b" => "declared b"}
      assert {^early, "created"} = Programs.Store.get(table, "a")
      assert Programs.Store.count(table) == 2
    end

    test "are removed by a cleanup, unless that was made before they were declared" do
      early = Programs.Store.stamp()
      table = declare(["a", "b", "c"])
      Programs.Store.remove(table, ["a"], early)
      Programs.Store.remove(table, :all, early)
      assert ids(table) == ["a", "b", "c"]
      Programs.Store.remove(table, ["b"], Programs.Store.stamp())
      assert ids(table) == ["a", "c"]
      Programs.Store.remove(table, :all, Programs.Store.stamp())
      assert ids(table) == []
    end

    test "are not sent to other nodes" do
      [here, there] = [declare(["a"]), declare(["b"])]
      true = Programs.Store.put(there, "c", Programs.Store.stamp(), "c")
      assert [{{:program, "c"}, _stamp, "c"}] = Programs.Store.export(there)
      assert Programs.Store.merge(here, Programs.Store.export(there)) == ["c"]
      assert [{{:program, "c"}, _stamp, "c"}] = Programs.Store.export(here)
    end

    test "are uncovered by the removal of what was created before they were declared" do
      [created, removed] = [Programs.Store.stamp(), Programs.Store.stamp()]

      for order <- permutations([:create, :remove]) do
        table = declare(["a"])

        for what <- order do
          case what do
            :create -> Programs.Store.put(table, "a", created, "created")
            :remove -> Programs.Store.remove(table, ["a"], removed)
          end
        end

        assert bodies(table) == %{"a" => "declared a"}
      end

      table = declare(["a"])
      Programs.Store.put(table, "a", created, "created")
      exported = [{{:removed, "a"}, removed, nil}]
      assert Programs.Store.merge(table, exported) == ["a"]
      assert bodies(table) == %{"a" => "declared a"}
    end

    test "that are no definitions have a reason, until they are created or removed" do
      error = DSPex.PythonBridge.Error.new(:invalid_args, "no")

      for change <- [:create, :remove, :remove_all] do
        table = Programs.Store.new()
        Programs.Store.declare(table, [{"a", {:error, error}}, {"b", {:ok, "b"}}])
        assert Programs.Store.undeclared(table) == %{"a" => error}
        assert ids(table) == ["b"]
        stamp = Programs.Store.stamp()

        case change do
          :create -> Programs.Store.put(table, "a", stamp, "a")
          :remove -> Programs.Store.remove(table, ["a"], stamp)
          :remove_all -> Programs.Store.remove(table, :all, stamp)
        end

        assert Programs.Store.undeclared(table) == %{}
      end
    end
  end
end
