defmodule DSPex.PythonBridge.Pool.Cluster.MessageTest do
  @moduledoc """
  What coordinators say to each other, in this and in other versions. The other coordinator is the test's process: a member of
  the cluster's group on this node.
  """

  use ExUnit.Case, async: true

  import DSPex.Test.Helpers

  import Bitwise

  alias DSPex.PythonBridge.{Pool, Programs, Protocol}
  alias DSPex.PythonBridge.Pool.{Cluster, Handle}
  alias DSPex.Test.PoolProbe

  @pool __MODULE__.Pool

  setup do
    cluster = "cluster #{System.unique_integer([:positive])}"
    opts = "who" |> fake_opts() |> Keyword.merge(name: @pool, cluster: cluster, pool_size: 1)
    start_supervised!({Pool, opts})
    eventually(fn -> match?([%{state: :running}], Pool.status(@pool).peers) end)
    %{cluster: cluster, coordinator: Process.whereis(Handle.coordinator(@pool))}
  end

  # From then on the coordinator sends this process what it sends any other.
  defp join(cluster), do: :ok = :pg.join(Cluster, cluster, self())

  defp create(id, signature \\ "q -> a"),
    do: Pool.call(@pool, :create_program, %{id: id, signature: signature}, 10_000)

  defp body(id, signature) do
    {:ok, body} = Protocol.encode_body(:create_program, %{id: id, signature: signature})
    body
  end

  # The coordinator has read all that was sent to it before.
  defp alive(coordinator) do
    :sys.get_state(Handle.coordinator(@pool))
    Process.whereis(Handle.coordinator(@pool)) == coordinator
  end

  defp known, do: PoolProbe.known(@pool)

  defp log(fun) do
    log = ExUnit.CaptureLog.capture_log(fun)
    log |> String.split("\n") |> Enum.filter(&(&1 =~ inspect(@pool)))
  end

  test "unknown messages are ignored, and logged once without their contents", context do
    %{coordinator: coordinator} = context
    stamp = Programs.Store.stamp()
    me = self()

    hellos =
      for programs <- [
            :hush,
            [:hush],
            [{{:program, "hush"}, :stamp, "body"}],
            [{{:program, "hush"}, stamp, nil}],
            [{{:program, <<255>>}, stamp, "body"}],
            [{{:removed, <<255>>}, stamp, nil}],
            [{{:hush, "hush"}, stamp, "body"}],
            [{:removed_all, {1, 2}, nil}],
            [{:removed_all, stamp, nil} | :hush],
            [{:removed_all, stamp, nil}, {:removed_all, stamp, nil, :hush}]
          ],
          do: {:hello, me, :pool, true, programs}

    others = [
      {:hello, me, :pool, :maybe, []},
      {:hello, "hush", :pool, true, []},
      {:hello, me, "hush", true, []},
      {:hello, me, :pool, true, [], :hush},
      {:serves, me, :pool, "hush"},
      {:serves, me, :pool},
      {:change, me, 1, {:hush, "one", stamp}, ""},
      {:change, me, 1, {:create, "hush", nil}, ""},
      {:change, me, 1, {:create, <<255>>, stamp}, ""},
      {:change, me, 1, {:create, "hush", stamp}, :body},
      {:change, me, 1, {:cleanup, ["one" | "hush"], stamp}, ""},
      {:change, me, 1, {:cleanup, [<<255>>], stamp}, ""},
      {:change, me, 1, {:cleanup, :hush, stamp}, ""},
      {:changed, :hush, me},
      {:changed, 1, "hush"},
      {:changed}
    ]

    log =
      log(fn ->
        for malformed <- hellos ++ others do
          send(coordinator, malformed)
          send(coordinator, {:dspex_cluster, 2, malformed})
        end

        # Of versions to come, of which nothing is known here.
        for version <- [3, 4, 1, 0, "hush", nil],
            do: send(coordinator, {:dspex_cluster, version, {:hello, me, :pool, true, []}})

        send(coordinator, {:dspex_cluster, 3, self(), %{hush: "hush"}})
        send(coordinator, {:dspex_cluster})
        assert alive(coordinator)
      end)

    assert [line] = log
    assert line =~ "not understood"
    refute line =~ "hush"
    assert PoolProbe.serving(@pool) == []
    assert {:ok, _} = create("one")
    assert known() == ["one"]
  end

  test "coordinators of this version number their messages",
       %{coordinator: coordinator} = context do
    join(context.cluster)
    assert_receive {:dspex_cluster, 2, {:hello, ^coordinator, @pool, true, []}}
    stamp = Programs.Store.stamp()
    hello = {:hello, self(), :other, true, [{{:program, "one"}, stamp, body("one", "q -> a")}]}
    send(coordinator, Cluster.Message.pack(hello, 2))
    eventually(fn -> PoolProbe.programs(@pool) == [%{"one" => "q -> a"}] end)
    assert [{_pid, _since, :other}] = PoolProbe.serving(@pool)

    creation = Task.async(fn -> create("two") end)

    assert_receive {:dspex_cluster, 2,
                    {:change, ^coordinator, id, {:create, "two", _stamp}, _body}}

    refute Task.yield(creation, 50)
    send(coordinator, {:dspex_cluster, 2, {:changed, id, self()}})
    assert {:ok, _} = Task.await(creation)

    change = {:change, self(), 7, {:cleanup, ["one"], Programs.Store.stamp()}, ""}
    send(coordinator, {:dspex_cluster, 2, change})
    assert_receive {:dspex_cluster, 2, {:changed, 7, ^coordinator}}
    assert known() == ["two"]
    send(coordinator, {:dspex_cluster, 2, {:serves, self(), :other, false}})
    assert alive(coordinator)
    assert PoolProbe.serving(@pool) == []
  end

  test "a coordinator of version 1 is understood, and gets messages of version 1",
       %{coordinator: coordinator} = context do
    {:ok, _} = create("one")
    join(context.cluster)
    # Which it would not understand.
    assert_receive {:dspex_cluster, 2, {:hello, ^coordinator, @pool, true, _programs}}

    assert log(fn ->
             stamp = Programs.Store.stamp()
             programs = [{{:program, "two"}, stamp, body("two", "q -> a")}]
             send(coordinator, {:hello, self(), :other, true, programs})
             assert_receive {:hello, ^coordinator, @pool, true, programs}
             assert Enum.any?(programs, &match?({{:program, "one"}, _stamp, _body}, &1))
             eventually(fn -> map_size(hd(PoolProbe.programs(@pool))) == 2 end)

             creation = Task.async(fn -> create("three") end)
             assert_receive {:change, ^coordinator, id, {:create, "three", _stamp}, _body}
             refute Task.yield(creation, 50)
             send(coordinator, {:changed, id, self()})
             assert {:ok, _} = Task.await(creation)

             send(
               coordinator,
               {:change, self(), 7, {:cleanup, ["one"], Programs.Store.stamp()}, ""}
             )

             assert_receive {:changed, 7, ^coordinator}
             assert Enum.sort(known()) == ["three", "two"]
             refute_received {:dspex_cluster, _version, _message}
           end) == []

    # Its successor is another process, and may be of this version.
    :ok = :pg.leave(Cluster, context.cluster, self())
    eventually(fn -> PoolProbe.serving(@pool) == [] end)
    join(context.cluster)
    assert_receive {:dspex_cluster, 2, {:hello, ^coordinator, @pool, true, _programs}}
  end

  describe "a coordinator that has left, or has not joined yet," do
    test "gets no hello, and is forgotten if it does not join", context do
      %{coordinator: coordinator} = context
      {node, gone} = gone_coordinator()
      change = {:change, gone, 7, {:cleanup, ["one"], Programs.Store.stamp()}, ""}
      # It cannot be sent the confirmation of the change.
      for said <- [{:hello, gone, :gone, true, []}, {:serves, gone, :gone, true}, change],
          do: send(coordinator, said)

      assert alive(coordinator)
      assert cluster().behind == MapSet.new()
      # One timer, whatever it says; as if it fired.
      assert [{^gone, timer}] = Map.to_list(cluster().strangers)
      assert :erlang.cancel_timer(timer) in 1..10_000
      send(coordinator, {:stranger, gone})
      assert alive(coordinator)
      assert cluster().strangers == %{}
      assert {cluster().older, PoolProbe.serving(@pool)} == {%{}, []}
      refute node in Node.list()
    end

    test "is known by its earlier messages when it joins", context do
      %{coordinator: coordinator} = context
      # Of the version before: its hello overtakes the news that it has joined.
      send(coordinator, {:hello, self(), :other, true, []})
      assert alive(coordinator)
      refute_received {:hello, _coordinator, _name, _serves, _programs}
      join(context.cluster)
      assert_receive {:hello, ^coordinator, @pool, true, []}
      refute_received {:dspex_cluster, _version, _message}
      send(coordinator, {:stranger, self()})
      assert alive(coordinator)
      assert [{_pid, _since, :other}] = PoolProbe.serving(@pool)
      assert cluster().older == %{self() => 1}
    end
  end

  defp cluster, do: :sys.get_state(Handle.coordinator(@pool)).cluster

  # Of a node that nobody is connected to: as a process of this node in the external format, with another name.
  defp gone_coordinator do
    node = :"gone@nowhere.invalid"
    name = Atom.to_string(node)
    <<131, 88, 119, size, _own::binary-size(size), rest::binary>> = :erlang.term_to_binary(self())
    pid = :erlang.binary_to_term(<<131, 88, 119, byte_size(name), name::binary, rest::binary>>)
    ^node = node(pid)
    {node, pid}
  end

  test "a change that follows one from a node with a later clock wins over it",
       context do
    # An hour ahead, and more than this node has counted in that microsecond.
    {time, _count, _node} = Programs.Store.stamp()
    stamp = {time + 3_600_000_000, 1 <<< 62, :"zzz@another.host"}
    hello = {:hello, self(), :other, false, [{{:program, "one"}, stamp, body("one", "b -> c")}]}
    send(context.coordinator, Cluster.Message.pack(hello, 2))
    eventually(fn -> PoolProbe.programs(@pool) == [%{"one" => "b -> c"}] end)

    assert {:ok, _} = create("one")
    assert [{"one", _stamp, body}] = Programs.Store.definitions(Handle.fetch(@pool).programs)
    assert body =~ "q -> a"
    assert {:ok, _} = Pool.call(@pool, :cleanup, %{program_ids: ["one"]}, 5_000)
    assert known() == []
  end
end
