defmodule DSPex.Test.StreamingLM do
  @moduledoc """
  A server on loopback that streams an LM's answer as the test controls it. It sends its owner for each
  request, `{:lm_request, lm}`, where `lm` is for `say/2` and `finish/1`, and of each connection that the
  other side closed: `{:lm_closed, lm}`.
  """

  alias DSPex.Test.Loopback

  @doc "Starts it for the calling process; gives its port."
  def start, do: Loopback.start(&serve(&1, &2, ""))

  @doc "Streams a piece of the answer."
  def say(lm, text), do: send(lm, {:say, %{role: "assistant", content: text}, nil})

  @doc "The answer is over."
  def finish(lm), do: send(lm, {:say, %{}, "stop"})

  defp serve(socket, owner, read) do
    case :gen_tcp.recv(socket, 0) do
      {:ok, data} ->
        if Loopback.whole?(read <> data),
          do: stream(socket, owner),
          else: serve(socket, owner, read <> data)

      {:error, _closed} ->
        :ok
    end
  end

  defp stream(socket, owner) do
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    :ok = :gen_tcp.send(socket, head)
    :ok = :inet.setopts(socket, active: true)
    send(owner, {:lm_request, self()})
    events(socket, owner)
  end

  defp events(socket, owner) do
    receive do
      {:say, delta, finish} ->
        choice = %{index: 0, delta: delta, finish_reason: finish}
        event = %{id: "c", object: "chat.completion.chunk", created: 0, model: "stub"}
        data = ["data: ", JSON.encode!(Map.put(event, :choices, [choice])), "\n\n"]
        :ok = :gen_tcp.send(socket, if(finish, do: [data, "data: [DONE]\n\n"], else: data))
        if finish, do: :gen_tcp.close(socket), else: events(socket, owner)

      {:tcp_closed, ^socket} ->
        send(owner, {:lm_closed, self()})
    end
  end
end
