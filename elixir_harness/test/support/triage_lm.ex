defmodule DSPex.Test.TriageLM do
  @moduledoc """
  A server on loopback, an LM that routes tickets, and knows of this company what its prompt says. Each answer depends on the request
  alone.

  "parcels go to logistics" in the instructions is a rule for tickets about a parcel. Without a rule it goes by the demos about the
  same thing; without those the team is support. Asked for better instructions, it writes down all rules that it reads.
  """

  alias DSPex.Test.Loopback

  @rule ~S/(\w+)s go to (\w+)/

  @doc "Starts it for the calling process; gives the options of a bridge or pool that make it the LM."
  def start do
    port = Loopback.start(fn socket, _owner -> Loopback.answer_chats(socket, &answer/1) end)

    [
      lm: "openai/stub",
      lm_options: [api_base: "http://127.0.0.1:#{port}/v1", api_key: "not-a-key"]
    ]
  end

  defp answer([%{"content" => system} | messages]) do
    {demos, [%{"content" => asked}]} = Enum.split(messages, -1)

    cond do
      # GEPA's, which asks for JSON.
      asked =~ "new_instruction" -> JSON.encode!(%{new_instruction: instruction(asked)})
      asked =~ "[[ ## why ## ]]" -> write("right", right(asked))
      true -> write("team", team(field(asked, "ticket"), system, demos))
    end
  end

  defp instruction(asked) do
    rules = for [rule | _] <- Regex.scan(Regex.compile!(@rule), asked), uniq: true, do: rule
    "Route the ticket: #{Enum.join(rules, ", ")}."
  end

  defp right(asked),
    do: if(field(asked, "why") =~ field(asked, "team"), do: "True", else: "False")

  defp team(ticket, system, demos) do
    rules = for [_, thing, team] <- Regex.scan(Regex.compile!(@rule), system), do: {thing, team}

    shown =
      for [%{"content" => asked}, %{"content" => answer}] <- Enum.chunk_every(demos, 2),
          thing <- ~w(parcel invoice password),
          field(asked, "ticket") =~ thing,
          do: {thing, field(answer, "team")}

    Enum.find_value(rules ++ shown, "support", fn {thing, team} ->
      if ticket =~ thing, do: team
    end)
  end

  defp field(text, name) do
    [_, value] = Regex.run(Regex.compile!("\\[\\[ ## #{name} ## \\]\\]\n(.*)"), text)
    value
  end

  defp write(field, value), do: "[[ ## #{field} ## ]]\n#{value}\n\n[[ ## completed ## ]]"
end
