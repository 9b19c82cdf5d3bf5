defmodule DSPex.PythonBridge.OTP.ServerTest do
  use ExUnit.Case, async: true

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.PythonBridge.OTP.Server
  alias DSPex.Test.FakePeer

  @contents "the contents"

  defmodule Broken do
    @moduledoc "A registry that raises."
    def whereis_name(name), do: raise("no #{name}")
  end

  setup %{test: name} do
    pool = start_supervised!({Pool, [name: name, pool_size: 1] ++ FakePeer.opts(:echo)})
    {:ok, member} = DSPex.Test.Helpers.eventually(fn -> match_ok(Pool.checkout(name)) end)
    %{pool: pool, bridge: Process.whereis(member), member: member}
  end

  defp match_ok({:ok, _bridge} = found), do: found
  defp match_ok(_none), do: nil

  test "a bridge and a pool are found by pid and by name; any other term is none", context do
    %{pool: pool, bridge: bridge, member: member, test: name} = context
    for server <- [bridge, member], do: assert(Server.find(server) == {:bridge, bridge})
    for server <- [pool, name], do: assert({:pool, %{pid: ^pool}} = Server.find(server))
    elsewhere = :erlang.list_to_pid(~c"<0.1.999>")

    for term <- [
          nil,
          self(),
          elsewhere,
          :nobody,
          "name",
          5,
          {:via, Broken, :x},
          {:a},
          {:global, 1}
        ],
        do: assert(Server.find(term) == :none)
  end

  test "a bridge given as a pool, and a pool as a bridge, are named", context do
    %{pool: pool, bridge: bridge, test: name} = context
    text = "#{inspect(bridge)} is a bridge: use Bridge.call, Bridge.request or Bridge.stream"
    assert Pool.call(bridge, :ping) == {:error, text}
    error = Error.new(:invalid_request, text)
    assert Pool.request(bridge, :ping, %{}, []) == {:error, error}

    for server <- [pool, name] do
      named = "#{inspect(server)} is a pool"
      text = "#{named}: use Pool.call, Pool.request or Pool.stream, "
      text = text <> "or Pool.with_bridge for one of its bridges"
      error = Error.new(:invalid_request, text)
      assert Bridge.call(server, :ping, %{a: @contents}, 1_000) == {:error, text}
      assert Bridge.cast(server, :ping, %{a: @contents}) == {:error, text}
      assert Bridge.request(server, :ping, %{}, timeout: 1_000) == {:error, error}
      assert Bridge.request(server, :ping, %{}, tools: %{t: & &1}) == {:error, error}
      assert Enum.to_list(Bridge.stream(server, %{}, [])) == [error: error]
      text = "#{named}: name one of its bridges, which Pool.status/1 lists"
      assert %{state: :failed, last_error: ^text} = Bridge.get_status(server)
      assert Bridge.restart(server) == {:error, text}
    end

    assert {:ok, _} = Pool.call(pool, :ping)

    foreign = start_supervised!({Agent, fn -> nil end})
    assert {:error, :bridge_not_running} = Bridge.call(foreign, :ping, %{a: @contents}, 60_000)
    assert {:error, %Error{type: :bridge_not_running}} = Bridge.request(foreign, :ping, %{})
    assert [error: %Error{type: :bridge_not_running}] = Enum.to_list(Bridge.stream(foreign, %{}))
    assert :ok = Bridge.cast(foreign, :ping, %{a: @contents})
    assert %{state: :failed, os_pid: nil} = Bridge.get_status(foreign)
    assert {:error, :bridge_not_running} = Bridge.restart(foreign)
    assert :ok = Bridge.stop(foreign)
    assert {:error, :bridge_not_running} = Pool.call(foreign, :ping)
    assert {:error, :bridge_not_running} = Pool.checkout(foreign)
    assert %{peers: [], nodes: []} = Pool.status(foreign)
    assert Process.alive?(foreign)
  end

  test "messages and casts that are not for a bridge do not end it", %{bridge: bridge} do
    for message <- [@contents, {:any, @contents}, {:"$gen_cast", {:unknown, @contents}}],
        do: send(bridge, message)

    assert {:ok, _} = Bridge.call(bridge, :ping)
    assert Process.alive?(bridge)
  end
end
