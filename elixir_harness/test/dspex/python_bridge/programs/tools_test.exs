defmodule DSPex.PythonBridge.Programs.ToolsTest do
  @moduledoc "The functions of a call against the tools of its program."

  use ExUnit.Case, async: true

  import ExUnit.CaptureLog

  alias DSPex.PythonBridge.{Bridge, Error, Pool}
  alias DSPex.Test.FakePeer

  @signature "question -> answer"
  @agent %{
    id: "agent",
    signature: @signature,
    program_type: "react",
    tools: [%{name: "search", args: %{}}, %{name: "stock", args: %{}}]
  }
  @best %{
    id: "best",
    signature: @signature,
    program_type: "best_of_n",
    options: %{reward: %{tool: "brevity"}}
  }

  # It answers each run at once, and keeps what it is asked to create.
  defp start(programs) do
    bridge = start_supervised!({Bridge, FakePeer.opts(:who)}, id: make_ref())
    for program <- programs, do: create(bridge, program)
    bridge
  end

  defp create(bridge, program), do: {:ok, _} = Bridge.call(bridge, :create_program, program)

  defp run(bridge, id, names) do
    tools = Map.new(names, &{&1, fn _args -> 1 end})
    Bridge.request(bridge, :execute_program, args(id), tools: tools)
  end

  defp args(id), do: %{program_id: id, inputs: %{question: "Why?"}}

  defp refusal(text), do: {:error, Error.new(:invalid_args, ":tools: program " <> text)}

  test "a function that is not a tool of the program is refused by name" do
    bridge = start([@agent, @best, %{id: "plain", signature: @signature}])
    for names <- [[:search, :stock], ["search"]], do: {:ok, _, _} = run(bridge, "agent", names)
    {:ok, _, _} = run(bridge, "best", [:brevity])

    assert run(bridge, "agent", [:search, :serch, :a]) ==
             refusal("agent has no tool a, serch; it has search, stock")

    assert run(bridge, "best", [:search]) == refusal("best has no tool search; it has brevity")
    assert run(bridge, "plain", [:search]) == refusal("plain has no tool search; it has none")

    assert [refusal("plain has no tool search; it has none")] ==
             Enum.to_list(Bridge.stream(bridge, args("plain"), tools: %{search: & &1}))
  end

  test "the names are those of the program's present definition" do
    bridge = start([@agent])
    {:error, _} = run(bridge, "agent", [:other])
    create(bridge, %{@agent | tools: [%{name: "other", args: %{}}]})
    {:ok, _, _} = run(bridge, "agent", [:other])
    assert run(bridge, "agent", [:search]) == refusal("agent has no tool search; it has other")

    # What is not known here is the peer's to refuse.
    {:ok, _} = Bridge.call(bridge, :cleanup, %{program_ids: ["agent"]})
    assert {:error, %Error{type: :program_not_found}} = run(bridge, "agent", [:search])
    create(bridge, @agent)
    {:ok, _, _} = run(bridge, "agent", [:search])
    {:ok, _} = Bridge.call(bridge, :cleanup)
    assert {:error, %Error{type: :program_not_found}} = run(bridge, "agent", [:other])
  end

  test "a program with tools that is called without them is logged once" do
    bridge = start([@agent, @best, %{id: "plain", signature: @signature}])

    calls = [
      fn id -> Bridge.call(bridge, :execute_program, args(id)) end,
      fn id -> Bridge.call(bridge, "execute_program", args(id)) end,
      fn id -> Bridge.request(bridge, :execute_program, args(id), tools: %{}) end,
      fn id -> Enum.to_list(Bridge.stream(bridge, args(id), [])) end
    ]

    without = fn ids -> logged(bridge, fn -> for id <- ids, call <- calls, do: call.(id) end) end
    assert without.(["agent", "best", "plain"]) == ["agent (search, stock)", "best (brevity)"]
    assert without.(["agent", "best"]) == []
    create(bridge, @agent)
    # Calls with them do not count.
    assert logged(bridge, fn -> run(bridge, "agent", [:search]) end) == []
    assert without.(["agent"]) == ["agent (search, stock)"]
  end

  # The programs, with the names of their tools. Other tests log meanwhile.
  defp logged(server, fun) do
    line =
      ~r/#{Regex.escape(inspect(server))}: program (.*) is called without its tools (\(.*?\))/

    for [_, id, names] <- Regex.scan(line, capture_log(fun)), do: "#{id} #{names}"
  end

  test "a pool logs it, and its bridges refuse" do
    name = Module.concat(__MODULE__, Pool)
    opts = Keyword.put(FakePeer.opts(:who, pool_size: 2), :name, name)
    start_supervised!({Pool, opts})
    {:ok, _} = Pool.call(name, :create_program, @agent)

    call = fn -> Pool.call(name, :execute_program, args("agent")) end
    assert logged(name, fn -> for _ <- 1..2, do: call.() end) == ["agent (search, stock)"]
    {:ok, bridge} = Pool.checkout(name)
    {:ok, _, _} = run(bridge, "agent", [:search])
    assert {:error, %Error{type: :invalid_args}} = run(bridge, "agent", [:serch])
  end
end
