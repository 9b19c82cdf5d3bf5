defmodule DSPex.Test.Loopback do
  @moduledoc "A server on loopback, for the LMs of the tests."

  @doc """
  Starts it for the calling process; gives its port. `serve` gets each connection's socket and that process.
  """
  def start(serve) do
    owner = self()

    # With the default backlog of 5 the connections of 20 runs at once are tried again after a second.
    opts = [:binary, active: false, ip: {127, 0, 0, 1}, reuseaddr: true, backlog: 128]
    {:ok, listener} = :gen_tcp.listen(0, opts)

    {:ok, port} = :inet.port(listener)
    acceptor = spawn_link(fn -> accept(listener, &serve.(&1, owner)) end)
    :ok = :gen_tcp.controlling_process(listener, acceptor)
    port
  end

  @doc "Answers each chat completion of a connection with the text that `answer` gives to its messages."
  def answer_chats(socket, answer, read \\ "") do
    with {:ok, more} <- :gen_tcp.recv(socket, 0) do
      whole? = whole?(read <> more)
      if whole?, do: :ok = :gen_tcp.send(socket, chat(read <> more, answer))
      answer_chats(socket, answer, if(whole?, do: "", else: read <> more))
    end
  end

  # Head and body in one write: a delayed ACK between two takes 40 ms.
  defp chat(request, answer) do
    [_head, body] = String.split(request, "\r\n\r\n", parts: 2)
    %{"messages" => messages} = asked = JSON.decode!(body)
    text = answer.(messages)

    {type, body} =
      if asked["stream"],
        do: {"text/event-stream", events(text)},
        else: {"application/json", completion(text)}

    head = "HTTP/1.1 200 OK\r\ncontent-type: #{type}\r\n"
    [head, "content-length: #{byte_size(body)}\r\n\r\n", body]
  end

  # A word in each event.
  defp events(text) do
    deltas = for [word] <- Regex.scan(~r/\S*\s*/, text), do: %{role: "assistant", content: word}

    for delta <- deltas ++ [nil], into: "" do
      choice = %{index: 0, delta: delta || %{}, finish_reason: if(delta == nil, do: "stop")}
      event = %{id: "c", object: "chat.completion.chunk", created: 0, model: "stub"}
      "data: #{JSON.encode!(Map.put(event, :choices, [choice]))}\n\n"
    end <> "data: [DONE]\n\n"
  end

  defp completion(text) do
    choice = %{index: 0, message: %{role: "assistant", content: text}, finish_reason: "stop"}
    usage = %{prompt_tokens: 7, completion_tokens: 3, total_tokens: 10}
    about = %{id: "c", object: "chat.completion", created: 0, model: "stub"}
    JSON.encode!(Map.merge(about, %{choices: [choice], usage: usage}))
  end

  @doc "Whether these bytes are a whole HTTP request."
  def whole?(read) do
    with [head, body] <- String.split(read, "\r\n\r\n", parts: 2),
         [_, length] <- Regex.run(~r/content-length: (\d+)/i, head),
         do: byte_size(body) >= String.to_integer(length),
         else: (_part -> false)
  end

  defp accept(listener, serve) do
    {:ok, socket} = :gen_tcp.accept(listener)

    pid =
      spawn(fn ->
        receive do
          :go -> serve.(socket)
        end
      end)

    :ok = :gen_tcp.controlling_process(socket, pid)
    send(pid, :go)
    accept(listener, serve)
  end
end
