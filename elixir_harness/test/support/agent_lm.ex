defmodule DSPex.Test.AgentLM do
  @moduledoc """
  A server on loopback, the LM of an agent that calls its tool `do` with one word of its question after the other. What it
  answers depends on the request alone, but for a number that no other of its answers has: one that was asked for again is seen.
  """

  alias DSPex.Test.Loopback

  @doc "Starts it for the calling process: the options of an LM, and an atomic with the number of the requests."
  def start do
    asked = :atomics.new(1, [])
    serve = fn socket, _owner -> Loopback.answer_chats(socket, &answer(&1, asked)) end
    url = "http://127.0.0.1:#{Loopback.start(serve)}/v1"
    {%{model: "openai/stub", api_base: url, api_key: "not-a-key", cache: false}, asked}
  end

  @doc "The arguments that create the agent."
  def agent(id, lm) do
    tool = %{name: "do", description: "does", args: %{what: "string"}}
    program = %{signature: "question -> answer", program_type: "react", tools: [tool]}
    Map.merge(program, %{id: id, lm: lm})
  end

  @doc """
  The arguments that create a program without an agent, whose LM calls all tools of a question such as `ask:x slow:y` at once.
  """
  def parallel(id, lm) do
    tools =
      for name <- ~w(ask slow), do: %{name: name, description: "does", args: %{what: "string"}}

    %{id: id, signature: "question -> answer", program_type: "predict", tools: tools, lm: lm}
  end

  @doc "The numbers of the answers in a result, or in entries of a journal."
  def numbers(term) do
    found = Regex.scan(~r/no\. (\d+)/, inspect(term, printable_limit: :infinity))
    Enum.sort(for [_, number] <- found, uniq: true, do: String.to_integer(number))
  end

  defp answer([%{"content" => system} | _] = messages, asked) do
    number = "no. #{:atomics.add_get(asked, 1, 1)}"
    text = List.last(messages)["content"]
    [_, question] = Regex.run(~r/## question ## \]\]\n(.*)/, text)
    what = Enum.at(String.split(question), length(Regex.scan(~r/## observation_/, text)))

    cond do
      not (system =~ "next_tool_name") and question =~ ":" ->
        write(answer: number, tool_calls: calls(question))

      not (system =~ "next_tool_name") ->
        write(reasoning: number, answer: number)

      what ->
        step(number, "do", JSON.encode!(%{what: what}))

      true ->
        step(number, "finish", "{}")
    end
  end

  defp calls(question) do
    calls =
      for call <- String.split(question),
          [name, what] = String.split(call, ":"),
          do: %{name: name, args: %{what: what}}

    JSON.encode!(%{tool_calls: calls})
  end

  defp step(number, name, args),
    do: write(next_thought: number, next_tool_name: name, next_tool_args: args)

  defp write(fields) do
    fields = for {name, text} <- fields, into: "", do: "[[ ## #{name} ## ]]\n#{text}\n\n"
    fields <> "[[ ## completed ## ]]"
  end
end
