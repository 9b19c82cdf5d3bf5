defmodule DSPex.Test.Loopback do
  @moduledoc "A server on loopback, for the LMs of the tests."

  @doc """
  Starts it for the calling process; gives its port. `serve` gets each connection's socket and that process.
  """
  def start(serve) do
    owner = self()

    {:ok, listener} =
      :gen_tcp.listen(0, [:binary, active: false, ip: {127, 0, 0, 1}, reuseaddr: true])

    {:ok, port} = :inet.port(listener)
    acceptor = spawn_link(fn -> accept(listener, &serve.(&1, owner)) end)
    :ok = :gen_tcp.controlling_process(listener, acceptor)
    port
  end

  @doc "Answers each HTTP request of a connection with what `answer` gives, until the client closes it."
  def answer_requests(socket, answer, read \\ "") do
    with {:ok, more} <- :gen_tcp.recv(socket, 0) do
      whole? = whole?(read <> more)
      if whole?, do: :ok = :gen_tcp.send(socket, answer.())
      answer_requests(socket, answer, if(whole?, do: "", else: read <> more))
    end
  end

  defp whole?(read) do
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
