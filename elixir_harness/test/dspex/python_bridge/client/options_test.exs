defmodule DSPex.PythonBridge.Client.OptionsTest do
  @moduledoc "The options of one call that the peer gets, by a bridge and by a pool: among the arguments, or beside `meta`."

  use ExUnit.Case,
    async: true,
    parameterize: [%{api: DSPex.PythonBridge.Bridge}, %{api: DSPex.PythonBridge.Pool}]

  alias DSPex.PythonBridge.{Error, Pool, Protocol}
  alias DSPex.Test.FakePeer

  @arguments [attempts: 10, budget: [lm_calls: 3], max_concurrency: 1, item_timeout_ms: 250]

  setup_all %{api: api} do
    %{echo: start(api, FakePeer.opts(:echo)), plays: start(api, FakePeer.opts(:plays))}
  end

  setup %{api: api} do
    Process.put(:api, api)
    :ok
  end

  defp api, do: Process.get(:api)

  defp start(api, opts) do
    name = Module.concat(__MODULE__, "Server#{System.unique_integer([:positive])}")
    size = if api == Pool, do: [pool_size: 1], else: []
    start_supervised!({api, Keyword.merge(opts, [name: name] ++ size)}, id: name)
  end

  test "four of them are arguments of execute_program", %{echo: bridge} do
    args = %{program_id: "qa", inputs: []}
    wanted = %{"attempts" => 10, "max_concurrency" => 1, "item_timeout_ms" => 250}
    wanted = Map.merge(wanted, %{"program_id" => "qa", "inputs" => []})
    wanted = Map.put(wanted, "budget", %{"lm_calls" => 3})

    for command <- [:execute_program, "execute_program"] do
      assert {:ok, %{"args" => ^wanted}, _meta} =
               api().request(bridge, command, args, @arguments)
    end

    assert [{:ok, %{"args" => ^wanted}, _meta}] =
             Enum.to_list(api().stream(bridge, args, @arguments))

    # Those that are not given are not sent.
    assert {:ok, %{"args" => %{"inputs" => [], "program_id" => "qa"} = sent}, _meta} =
             api().request(bridge, :execute_program, args, [])

    assert map_size(sent) == 2
  end

  test "the deadline that the peer gets counts from before the encoding", %{echo: bridge} do
    args = %{a: Enum.to_list(1..300_000)}
    encode = fn -> {:ok, _body} = Protocol.encode_body(:echo, args) end
    # Each encoding takes another time on a busy machine.
    us = Enum.min(for _ <- 1..3, do: elem(:timer.tc(encode), 0))
    assert {:ok, %{"timeout_ms" => told}, _} = api().request(bridge, :echo, args, timeout: 60_000)
    assert told < 60_000 - us / 4_000
  end

  test "history is beside meta, if it is true", %{plays: bridge} do
    args = %{play: [["reply", %{}]]}

    for {opts, asked} <- [{[history: true], ["meta", "history"]}, {[], ["meta"]}] do
      assert {:ok, _, %{"asked" => ^asked}} =
               api().request(bridge, :execute_program, args, opts)

      streamed = ["stream" | asked]

      assert [{:ok, _, %{"asked" => ^streamed}}] =
               Enum.to_list(api().stream(bridge, args, opts))
    end
  end

  test "each wrong value is refused by name, with what was expected", %{echo: bridge} do
    max = 4_294_967_295

    for {option, values, expected} <- [
          {:attempts, [0, 11, 1.0, "3", nil], "1 to 10"},
          {:max_concurrency, [0, -1, 1.5, :infinity, nil], "1 or more"},
          {:item_timeout_ms, [0, -1, 0.5, :infinity, max + 1, nil], "1 to #{max} ms"},
          {:history, [1, "true", nil], "true or false"}
        ],
        value <- values do
      text = ":#{option}: expected #{expected}, got #{inspect(value)}"

      assert {:error, %Error{type: :invalid_request, message: ^text}} =
               api().request(bridge, :execute_program, %{}, [{option, value}])

      assert [error: %Error{type: :invalid_request, message: ^text}] =
               Enum.to_list(api().stream(bridge, %{}, [{option, value}]))
    end

    for {budget, text} <- [
          {[], "expected one of :lm_calls, :tokens, :usd"},
          {[eur: 1], "unknown option :eur"},
          {[usd: 0], ":usd: expected a number above 0, got 0"}
        ] do
      assert {:error, %Error{message: ":budget: " <> ^text}} =
               api().request(bridge, :execute_program, %{}, budget: budget)
    end

    assert {:error, %Error{message: "unknown option :attempt, did you mean :attempts?"}} =
             api().request(bridge, :execute_program, %{}, attempt: 3)
  end

  test "an option that is there twice, or not taken, is refused", %{echo: bridge} do
    for {option, value} <- @arguments, key <- [option, "#{option}"] do
      twice = ":#{option}: there twice, as an option and as an argument"

      assert {:error, %Error{type: :invalid_request, message: ^twice}} =
               api().request(bridge, :execute_program, %{key => value}, [{option, value}])

      assert [error: %Error{message: ^twice}] =
               Enum.to_list(api().stream(bridge, %{key => value}, [{option, value}]))

      other = ":#{option}: only execute_program takes it"

      assert {:error, %Error{type: :invalid_request, message: ^other}} =
               api().request(bridge, :ping, %{}, [{option, value}])
    end

    # What is not a map is refused as without options.
    assert {:error, %Error{type: :invalid_args, message: "args: expected a map"}} =
             api().request(bridge, :execute_program, [], attempts: 2)
  end

  test "meta of an error reply reaches the caller of request and of stream", %{plays: bridge} do
    meta = %{"lm_calls" => 2, "history" => [%{"model" => "m"}]}
    args = %{play: [["fail", "output_invalid", meta]]}

    for opts <- [[], [on_chunk: &is_map/1]] do
      assert {:error, %Error{type: :output_invalid, meta: ^meta}} =
               api().request(bridge, :execute_program, args, opts)
    end

    assert [error: %Error{meta: ^meta}] = Enum.to_list(api().stream(bridge, args, []))

    assert {:error, %Error{meta: nil}} =
             api().request(bridge, :execute_program, %{play: [["fail", "lm_error"]]}, [])
  end
end
