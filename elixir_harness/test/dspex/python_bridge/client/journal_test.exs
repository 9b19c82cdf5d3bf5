defmodule DSPex.PythonBridge.Client.JournalTest do
  @moduledoc """
  The journal of a run: the LM's answers that its peers have sent, with the real peer and an LM on loopback that counts what it is
  asked. Each of its answers has a number that no other has, so that one that was asked for again is seen.
  """

  use ExUnit.Case,
    async: true,
    parameterize: [%{api: DSPex.PythonBridge.Bridge}, %{api: DSPex.PythonBridge.Pool}]

  import DSPex.Test.Helpers

  alias DSPex.PythonBridge.{Error, Pool}
  alias DSPex.Test.Loopback

  @agent %{
    id: "agent",
    signature: "question -> answer",
    program_type: "react",
    options: %{max_iters: 5},
    tools: [%{name: "do", description: "does", args: %{what: "string"}}]
  }

  setup_all %{api: api} do
    asked = :counters.new(1, [])
    serve = fn socket, _owner -> Loopback.answer_chats(socket, &answer(&1, asked)) end
    url = "http://127.0.0.1:#{Loopback.start(serve)}/v1"
    lm_options = [api_base: url, api_key: "not-a-key", cache: false]

    opts =
      real_opts(lm: "openai/stub", lm_options: lm_options, name: Module.concat(api, "OfJournals"))

    opts = if api == Pool, do: [pool_size: 1] ++ opts, else: opts
    server = start_supervised!({api, opts})
    {:ok, _} = api.call(server, :create_program, @agent, 30_000)
    %{server: server, asked: asked}
  end

  # An agent's three steps, two of them with the tool, and its answer.
  defp answer(messages, asked) do
    :counters.add(asked, 1, 1)
    text = List.last(messages)["content"]
    step = length(Regex.scan(~r/\[\[ ## observation_/, text))
    number = :counters.get(asked, 1)

    cond do
      not (hd(messages)["content"] =~ "next_tool_name") ->
        write(reasoning: "So", answer: "no. #{number}")

      step < 2 ->
        step("do", ~s({"what": "#{step}"}), number)

      true ->
        step("finish", "{}", number)
    end
  end

  defp step(name, args, number),
    do: write(next_thought: "no. #{number}", next_tool_name: name, next_tool_args: args)

  defp write(fields) do
    fields = for {name, text} <- fields, into: "", do: "[[ ## #{name} ## ]]\n#{text}\n\n"
    fields <> "[[ ## completed ## ]]"
  end

  defp run(%{api: api, server: server}, opts),
    do:
      api.request(
        server,
        :execute_program,
        %{program_id: "agent", inputs: %{question: "Why?"}},
        opts
      )

  defp counted(asked, fun) do
    before = :counters.get(asked, 1)
    result = fun.()
    {:counters.get(asked, 1) - before, result}
  end

  test "a run that is given the first entries of another asks for the rest only", context do
    test = self()
    keep = fn entry -> send(test, {:entry, entry}) end
    tools = %{do: fn %{"what" => what} -> send(test, {:does, what}) && "did #{what}" end}
    opts = [tools: tools, journal: [], on_journal: keep]
    assert {4, {:ok, result, _meta}} = counted(context.asked, fn -> run(context, opts) end)
    {:messages, messages} = Process.info(self(), :messages)
    # Each answer comes before the tool call that follows from it.
    assert [
             {:entry, one},
             {:does, "0"},
             {:entry, two},
             {:does, "1"},
             {:entry, three},
             {:entry, four}
           ] =
             messages

    entries = [one, two, three, four]
    assert for(entry <- entries, do: JSON.decode!(entry)["n"]) == [1, 2, 3, 4]

    for known <- 0..4 do
      opts = [tools: tools, journal: Enum.take(entries, known)]
      assert {asked, {:ok, again, meta}} = counted(context.asked, fn -> run(context, opts) end)
      assert asked == 4 - known
      assert meta["journal"] == %{"replayed" => known, "live" => asked, "unused" => 0}
      if known == 4, do: assert(again == result)
    end
  end

  test "one whose entry cannot be kept ends before its next step", context do
    test = self()
    tools = %{do: fn _args -> send(test, :does) end}

    for keep <- [fn _entry -> {:error, "disk full"} end, fn _entry -> raise "disk full" end] do
      opts = [tools: tools, journal: [], on_journal: keep]

      assert {1, {:error, %Error{type: :cancelled} = error}} =
               counted(context.asked, fn -> run(context, opts) end)

      assert error.message =~ "disk full"
      refute_received :does
    end
  end

  test "one that fits no call is refused, without a request", context do
    opts = [
      tools: %{do: fn _ -> 1 end},
      journal: [
        ~s({"n":1,"key":"00","nth":0,"error":{"type":"LMError"}}),
        ~s({"n":2,"key":"01","nth":0,"error":{"type":"LMError"}})
      ]
    ]

    assert {0, {:error, %Error{type: :journal_mismatch}}} =
             counted(context.asked, fn -> run(context, opts) end)
  end
end
