defmodule DSPex.Test.OptimizingLM do
  @moduledoc """
  A server on loopback, an LM that answers rightly under one instruction alone, which it proposes whenever it is asked for one.
  Each answer depends on the request alone. The right answer to a question is the question in capitals.
  """

  alias DSPex.Test.Loopback

  @good "Answer with the capitals of the question."

  @doc "Starts it for the calling process; gives its port, and the counter of its requests."
  def start do
    requests = :counters.new(1, [])

    answer = fn messages ->
      :counters.add(requests, 1, 1)
      answer(messages)
    end

    {Loopback.start(fn socket, _owner -> Loopback.answer_chats(socket, answer) end), requests}
  end

  @doc "The examples that it can answer."
  def examples(count),
    do: for(n <- 1..count, do: {%{question: "word #{n}"}, %{answer: "WORD #{n}"}})

  @doc "Options of a bridge or pool that make it the LM, with the disk cache in a folder if there is one."
  def opts({port, _requests}, folder \\ nil) do
    lm = [api_base: "http://127.0.0.1:#{port}/v1", api_key: "not-a-key", cache: folder != nil]
    env = if folder, do: %{"DSPY_BRIDGE_DISK_CACHE" => folder}, else: %{}
    [lm: "openai/stub", lm_options: lm, env: env]
  end

  @doc "How many requests it had."
  def requests({_port, requests}), do: :counters.get(requests, 1)

  defp answer(messages) do
    system = text(hd(messages))
    last = text(List.last(messages))
    [asked, wanted] = String.split(last, "Respond with", parts: 2)

    for [_, field] <- Regex.scan(~r/`\[\[ ## (\w+) ## \]\]`/, wanted), into: "" do
      "[[ ## #{field} ## ]]\n#{value(field, asked, system)}\n\n"
    end
  end

  defp value("completed", _asked, _system), do: ""

  defp value("answer", asked, system) do
    [_, question] = Regex.run(~r/\[\[ ## question ## \]\]\n(.*)\n/, asked)
    if system =~ @good, do: String.upcase(question), else: "no idea"
  end

  defp value(field, _asked, _system),
    do: if(field =~ "instruction", do: @good, else: "some #{field}")

  defp text(%{"content" => text}) when is_binary(text), do: text
  defp text(%{"content" => parts}), do: Enum.map_join(parts, & &1["text"])
end
